"""Fused kernels: chunked cross-entropy, and autograd functions equal to their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_masks import OBJECTIVES, random_mask

from bestrq2.model import kernels
from bestrq2.model.kernels import RMSNormalization, Rotation, SwiGLU, head_cross_entropy
from example_sounds import padded_batch


def case(books: int, bias: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(books)
    head = torch.nn.Linear(24, 40 * books, bias=bias, dtype=dtype)
    states = torch.randn(3, 70, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(40, (3, 70, books))
    return head, states, targets if books > 1 else targets[..., 0], torch.rand(3, 70) < 0.8


def written_out(head, states, targets, weights):
    books = targets.flatten(2).shape[-1] if targets.ndim == 3 else 1
    logits = head(states).float().view(-1, head.out_features // books)
    counted = weights.flatten().repeat_interleave(books)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses[counted].sum(), (logits.argmax(-1) == targets.flatten())[counted].sum()


@pytest.mark.parametrize("books", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_chunked_loss_accuracy_and_gradients_equal_those_of_full_logits(monkeypatch, books, bias, rows):
    monkeypatch.setattr(kernels, "_LEAST_ROWS", rows)  # 210 rows in 30, 4 and 1 chunks
    monkeypatch.setattr(kernels, "_VALUES_ON_CPU", 1)
    head, states, targets, weights = case(books, bias)
    results = []
    for compute in (written_out, head_cross_entropy):
        head.zero_grad()
        states.grad = None
        loss, right = compute(head, states, targets, weights)
        (loss * 0.01).backward()
        results.append([loss.detach(), right.float(), states.grad, *(p.grad for p in head.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    everything, _ = head_cross_entropy(head, states, targets, None)
    torch.testing.assert_close(
        everything, written_out(head, states, targets, torch.ones_like(weights))[0], rtol=1e-6, atol=0
    )


def test_autocast_gradients_are_as_accurate_as_those_of_autograd():
    head, states, targets, weights = case(2, True)
    gradients = {}
    for name, compute, enabled in (
        ("true", written_out, False), ("autograd", written_out, True), ("ours", head_cross_entropy, True),
    ):  # fmt: skip
        head.zero_grad()
        states.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = compute(head, states, targets, weights)
        loss.backward()
        gradients[name] = [states.grad, head.weight.grad, head.bias.grad]
        assert all(gradient.dtype == torch.float32 for gradient in gradients[name])
    for true, autograd, ours in zip(*gradients.values(), strict=True):
        assert (ours - true).norm() < 1.1 * (autograd - true).norm() + 1e-6 * true.norm()
        assert (ours - true).norm() < 0.01 * true.norm()


def test_no_gradients_are_computed_without_grad():
    head, states, targets, weights = case(1, True)
    with torch.no_grad():
        loss, right = head_cross_entropy(head, states, targets, weights)
    expected, hits = written_out(head, states, targets, weights)
    assert not loss.requires_grad
    assert (loss.item(), right.item()) == (pytest.approx(expected.item(), rel=1e-6), hits.item())


def test_loss_of_an_extreme_logit_is_exact():
    """The share of the code is too small for float32; its logarithm is not."""
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data.copy_(torch.tensor([[0.0], [300.0]]))
    loss, right = head_cross_entropy(head, torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), None)
    assert (loss.item(), right.item()) == (300.0, 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("codebooks", [1, 3])
def test_training_without_logits_equals_training_with_logits(tiny_pretraining, objective, codebooks):
    model = tiny_pretraining(objective=objective, num_codebooks=codebooks, quantizer_normalization="layernorm")
    lengths = [80_000, 31_000, 52_000]
    batch, attention_mask = padded_batch(lengths)
    hidden = random_mask(model, [8, 3, 5])
    whole = model(batch, attention_mask, hidden)
    whole.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    lean = model(batch, hidden_mask=hidden, lengths=torch.tensor(lengths), output_logits=False)
    lean.loss.backward()
    assert lean.logits is None
    assert lean.target_entropy is None
    assert lean.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert lean.accuracy.item() == pytest.approx(whole.accuracy.item(), rel=1e-6)
    for name in ("targets", "hidden_valid", "code_counts", "hidden_mask"):
        assert torch.equal(lean[name], whole[name]), name
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-6 * scale, msg=name)


def test_memory_for_the_backward_pass_does_not_grow_with_the_number_of_targets(tiny_pretraining):
    """Beyond the states, of which there are 24 values a target: 2048 logits would be 2048."""

    def kept(rows: int, compute) -> int:
        head = torch.nn.Linear(24, 2048)
        states = torch.randn(1, rows, 24, requires_grad=True)
        sizes: dict[int, int] = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = compute(head, states, torch.zeros(1, rows, dtype=torch.int64), torch.ones(1, rows) > 0)
        assert loss.requires_grad
        return sum(sizes.values())

    assert kept(4000, head_cross_entropy) - kept(2000, head_cross_entropy) == 2000 * 24 * 4
    assert kept(4000, written_out) - kept(2000, written_out) > 2000 * 2048 * 4


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
def test_gradients_match_finite_differences(compute, shapes):
    inputs = [numbers(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(compute, inputs)
    # Queries and keys come as slices of a wider tensor.
    wide = torch.cat([inputs[0].detach(), numbers(*shapes[0], seed=9)], dim=-1).chunk(2, dim=-1)[0].transpose(0, 1)
    sliced = [wide.transpose(0, 1).requires_grad_(), *inputs[1:]]
    assert not sliced[0].is_contiguous()
    assert torch.autograd.gradcheck(compute, sliced)


def test_norm_and_gate_equal_those_of_pytorch():
    x, weight = 3.0 * numbers(2, 5, 12), numbers(12, seed=1)
    torch.testing.assert_close(RMSNormalization.apply(x, weight, 1e-5), F.rms_norm(x, (12,), weight, 1e-5))
    gate, values = x.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGLU.apply(x), F.silu(gate) * values)


@pytest.mark.parametrize("positions", ["rope_2d", "rope_time"])
def test_tracing_uses_plain_formulas_with_the_same_result(tiny_pretraining, monkeypatch, positions):
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


def test_only_inputs_are_kept_for_the_backward_pass():
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
