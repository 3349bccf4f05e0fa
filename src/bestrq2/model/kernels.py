"""Hand-written kernels: fused autograd functions, chunked cross-entropy, copies to a device, cached constants.

Each autograd function makes fewer passes over memory than the plain formula and keeps less for the backward pass.
Compilers and exporters get the plain formula instead, which they fuse and differentiate themselves (see `traced`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

# Logits per chunk and the fewest rows per chunk. A CPU is fastest with chunks that fit its caches, a GPU with large
# products; every chunk costs one pass over the gradient of the weights.
_VALUES_ON_CPU, _VALUES_ELSEWHERE, _LEAST_ROWS, _MOST_ROWS_IN_FLOAT16 = 2**19, 2**25, 128, 4096


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device: asynchronously through page-locked memory to a GPU, synchronously elsewhere.

    Other devices may read the source after it has been freed, so their copies are waited for.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def traced() -> bool:
    """Return whether a compiler or an exporter is tracing the code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def cached(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Cache the tensors of a function, such as positions of a grid, for use anywhere later.

    They are plain tensors with values, wherever they are first needed: tensors created in inference mode could not take
    part in a later training step, and those created under `torch.export` would be fake.
    """
    kept = lru_cache(maxsize=64)(function)

    @wraps(function)
    def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Made:
        if torch.compiler.is_dynamo_compiling():  # it puts the computation itself into its graph
            return function(*arguments, **keywords)
        with torch.inference_mode(False), _disable_current_modes():
            return kept(*arguments, **keywords)  # type: ignore[arg-type]

    call.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return call


class RMSNormalization(torch.autograd.Function):
    """RMS norm x / sqrt(mean(x²) + eps) * weight of x [..., D], in the dtype of weight [D].

    Keeps x and one value per row for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(weight.dtype)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        # Both reductions are matrix-vector products, so gradient * input is read once for each.
        wide = x.to(weight.dtype)
        along = gradient * wide
        of_weight = inverse.flatten() @ along.flatten(0, -2)
        share = (along @ weight)[..., None] * inverse.square() / x.shape[-1]
        of_x = (gradient * weight).addcmul_(wide, share, value=-1.0).mul_(inverse)
        return of_x.to(x.dtype), of_weight, None


class Rotation(torch.autograd.Function):
    """Rotary embedding: rotation of pairs of values by an angle; keeps only the angles for the backward pass.

    States [..., d] hold `parts` groups, each with the first values of all its pairs followed by the second values.
    Cosine and sine have width d too, repeat in both halves of a group, and broadcast over the other dimensions.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.parts = parts
        return _turned(states, cosine, sine, parts, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, sine, ctx.parts, -1.0), None, None, None


def _turned(states: Tensor, cosine: Tensor, sine: Tensor, parts: int, direction: float) -> Tensor:
    turned = states * cosine
    first, second = states.unflatten(-1, (parts, 2, -1)).unbind(-2)
    sine = sine.unflatten(-1, (parts, 2, -1))[..., 0, :]
    turned_first, turned_second = turned.unflatten(-1, (parts, 2, -1)).unbind(-2)
    turned_first.addcmul_(second, sine, value=-direction)
    turned_second.addcmul_(first, sine, value=direction)
    return turned


class SwiGLU(torch.autograd.Function):
    """Gate silu(first half) * second half of the last dimension, [..., 2 I] to [..., I]; keeps only its input."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        gate, values = inner.chunk(2, dim=-1)
        return F.silu(gate).mul_(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        gate, values = inner.chunk(2, dim=-1)
        of_inner = torch.empty_like(inner)
        of_gate, of_values = of_inner.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_values)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient * values, gate))
        return of_inner


def head_cross_entropy(
    head: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Linear head and cross-entropy in one, a chunk of rows at a time, so that the logits of a batch never exist.

    Loss and gradients equal those of `F.cross_entropy(head(states))` up to rounding. The gradients are computed in the
    forward pass, from the same logits. Products use the autocast dtype, everything else is float32.

    Args:
        head: linear map from D to books * V.
        states: float [B, H, D].
        targets: int64 [B, H] or [B, H, books].
        weights: bool [B, H], rows that count; None for all.

    Returns:
        loss: float32 [], sum of the cross-entropies over rows and books, nats.
        right: float32 [], number of targets with the largest logit.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    rows = None if weights is None else weights.flatten()
    flat = targets.reshape(states.shape[0] * states.shape[1], -1)
    with torch.autocast(device, enabled=False):
        return _HeadCrossEntropy.apply(
            states.flatten(0, 1), head.weight, head.bias, flat, rows, dtype, torch.is_grad_enabled()
        )


class _HeadCrossEntropy(torch.autograd.Function):
    """See `head_cross_entropy`; states [R, D], targets [R, books], rows bool [R] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        dtype: torch.dtype,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        loss, right = states.new_zeros((), dtype=torch.float32), states.new_zeros((), dtype=torch.float32)
        of_states = torch.empty_like(states) if differentiate else None
        of_weight = torch.zeros_like(weight) if differentiate else None
        of_bias = torch.zeros_like(bias) if differentiate and bias is not None else None
        values = _VALUES_ON_CPU if states.device.type == "cpu" else _VALUES_ELSEWHERE
        chunk = max(_LEAST_ROWS, values // weight.shape[0])
        if dtype == torch.float16:  # the unscaled sum over a chunk must stay below its largest number, 65504
            chunk = min(chunk, _MOST_ROWS_IN_FLOAT16)
        for first in range(0, len(states), chunk):
            part = slice(first, first + chunk)
            inputs, answers = states[part].to(dtype), targets[part]
            counted = None if rows is None else rows[part, None]
            logits = F.linear(inputs, cast_weight, cast_bias).float().unflatten(-1, (answers.shape[1], -1))
            shares = logits.log_softmax(dim=-1)
            chosen = shares.gather(-1, answers[..., None])[..., 0]
            # amax is ten times as fast as argmax on a CPU; without rounding, ties are practically impossible.
            hit = chosen >= shares.amax(dim=-1) if dtype == torch.float32 else logits.argmax(dim=-1) == answers
            del logits
            loss -= chosen.sum() if counted is None else chosen.masked_fill(~counted, 0.0).sum()
            right += hit.sum() if counted is None else (hit & counted).sum()
            if of_states is None or of_weight is None:
                continue
            # d loss / d logits = softmax - one-hot target, left unscaled: divided by the rows it underflows in float16
            of_logits = shares.exp_()
            of_logits.scatter_add_(-1, answers[..., None], of_logits.new_full((), -1.0).expand(*answers.shape, 1))
            if counted is not None:
                of_logits.masked_fill_(~counted[..., None], 0.0)
            rounded = of_logits.flatten(1).to(dtype)
            of_states[part] = rounded @ cast_weight
            if dtype == of_weight.dtype:
                torch.addmm(of_weight, rounded.T, inputs, out=of_weight)
            else:
                of_weight += rounded.T @ inputs
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0).flatten()
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else gradient * of_loss for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None
