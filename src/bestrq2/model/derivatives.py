"""RMSNorm, rotation and gate with derivatives written out: fewer passes over memory than autograd's, and less kept.

Compilers and exporters get the plain formula, which they fuse and differentiate by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def traced() -> bool:
    """Whether a compiler or an exporter is reading the code at this moment."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class RMSNormalization(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) * weight in the weight's type; keeps x as it is and one value a row. [..., D], [D]."""

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
        # Both sums are products with a vector, which read the product of gradient and input once each.
        wide = x.to(weight.dtype)
        along = gradient * wide
        of_weight = inverse.flatten() @ along.flatten(0, -2)
        share = (along @ weight)[..., None] * inverse.square() / x.shape[-1]
        of_x = (gradient * weight).addcmul_(wide, share, value=-1.0).mul_(inverse)
        return of_x.to(x.dtype), of_weight, None


class Rotation(torch.autograd.Function):
    """Pairs of values turned by an angle; keeps the angles alone.

    States [..., d] hold `parts` groups, each all first values and then all second values of its pairs; cosine and sine
    have the states' width, the same in both halves of a group, and broadcast otherwise.
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
    """silu(first half) * second half of the last dimension; keeps its input alone. [..., 2 I] to [..., I]."""

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
