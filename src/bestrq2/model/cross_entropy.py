"""Linear head and cross-entropy in one, a chunk of rows at a time, so that the logits of a batch never exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits made at a time, and rows at least: a processor wants the logits in its caches, a GPU wants large products, and
# both pay for every chunk with a pass over the gradient of the weights.
_VALUES_ON_CPU, _VALUES_ELSEWHERE, _LEAST_ROWS, _MOST_ROWS_IN_FLOAT16 = 2**19, 2**25, 128, 4096


def head_cross_entropy(
    head: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `head(states)`, and how many targets have the largest logit.

    Loss and gradients are those of the logits written out, up to rounding; the gradients are worked out together with
    the loss, from the same logits. Products are in the type that autocast asks for, all else is float32.

    Args:
        head: linear map from D to books * V.
        states: float [B, H, D].
        targets: int64 [B, H] or [B, H, books].
        weights: bool [B, H], which rows count; None for all.

    Returns:
        loss: float32 [], nats, over rows and books.
        right: float32 [].
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
        if dtype == torch.float16:  # whose largest number is 65504, and a chunk's sum is not divided by anything
            chunk = min(chunk, _MOST_ROWS_IN_FLOAT16)
        for first in range(0, len(states), chunk):
            part = slice(first, first + chunk)
            inputs, answers = states[part].to(dtype), targets[part]
            counted = None if rows is None else rows[part, None]
            logits = F.linear(inputs, cast_weight, cast_bias).float().unflatten(-1, (answers.shape[1], -1))
            shares = logits.log_softmax(dim=-1)
            chosen = shares.gather(-1, answers[..., None])[..., 0]
            # Finding the place of the maximum takes a CPU ten times as long; only rounded logits tie.
            hit = chosen >= shares.amax(dim=-1) if dtype == torch.float32 else logits.argmax(dim=-1) == answers
            del logits
            loss -= chosen.sum() if counted is None else chosen.masked_fill(~counted, 0.0).sum()
            right += hit.sum() if counted is None else (hit & counted).sum()
            if of_states is None or of_weight is None:
                continue
            # d loss / d logits = share - one at the target; to be divided by nothing here, which float16 could not hold
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
