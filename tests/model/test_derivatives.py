"""Derivatives written out are the true ones, and keep no more than their inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bestrq2.model import kernels
from bestrq2.model.kernels import RMSNormalization, Rotation, SwiGLU


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = numbers(5, parts, 1, 6 // parts, seed=1).expand(-1, -1, 2, -1).reshape(5, 12)
    return half.cos(), half.sin()


CASES = [
    (lambda x, weight: RMSNormalization.apply(x, weight, 1e-5), [(2, 5, 12), (12,)]),
    (lambda x: Rotation.apply(x, *angles(1), 1), [(2, 3, 5, 12)]),
    (lambda x: Rotation.apply(x, *angles(2), 2), [(2, 3, 5, 12)]),
    (SwiGLU.apply, [(2, 5, 12)]),
]


@pytest.mark.parametrize(("compute", "shapes"), CASES, ids=["rms", "rotation", "rotation 2-D", "swiglu"])
def test_derivatives_are_those_of_finite_differences(compute, shapes):
    inputs = [numbers(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(compute, inputs)
    # Queries and keys come as slices of a wider tensor.
    wide = torch.cat([inputs[0].detach(), numbers(*shapes[0], seed=9)], dim=-1).chunk(2, dim=-1)[0].transpose(0, 1)
    sliced = [wide.transpose(0, 1).requires_grad_(), *inputs[1:]]
    assert not sliced[0].is_contiguous()
    assert torch.autograd.gradcheck(compute, sliced)


def test_norm_and_gate_are_pytorchs():
    x, weight = 3.0 * numbers(2, 5, 12), numbers(12, seed=1)
    torch.testing.assert_close(RMSNormalization.apply(x, weight, 1e-5), F.rms_norm(x, (12,), weight, 1e-5))
    gate, values = x.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGLU.apply(x), F.silu(gate) * values)


@pytest.mark.parametrize("positions", ["rope_2d", "rope_time"])
def test_a_compiler_is_given_plain_formulas_with_the_same_result(tiny_pretraining, monkeypatch, positions):
    model = tiny_pretraining(
        position_embedding=positions, norm="rmsnorm", activation="swiglu", use_bias=False, qk_norm=True
    ).train()
    tokens = numbers(2, 64, 32).float().requires_grad_()
    results = []
    for plain in (False, True):
        for module in ("transformer", "patches"):
            monkeypatch.setattr(f"bestrq2.model.{module}.traced", lambda answer=plain: answer)
        model.zero_grad()
        tokens.grad = None
        states = model.bestrq2.encoder(tokens, 8, None, None)
        states.square().sum().backward()
        results.append([states, tokens.grad, *(p.grad for p in model.bestrq2.encoder.parameters())])
    assert kernels.traced() is False
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def test_only_inputs_are_kept():
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    x, weight = numbers(4, 100, 64).requires_grad_(), numbers(64).requires_grad_()
    cosine, sine = (numbers(100, 64, seed=seed) for seed in (1, 2))
    for compute, expected in (
        (lambda: RMSNormalization.apply(x, weight, 1e-5), x.numel() + 64 + 400),
        (lambda: Rotation.apply(x, cosine, sine, 1), 2 * 6400),
        (lambda: SwiGLU.apply(x), x.numel()),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            compute()
        assert sum(kept) == expected
