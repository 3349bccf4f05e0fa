"""Attention through the interface of transformers: masks, kernels by name, outputs of single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_bestrq2 import BestRQ2Config


def make_attention_mask(config: BestRQ2Config, tokens: Tensor, valid: Tensor | None) -> Any:
    """Attention mask of a batch, in the form that the configured attention implementation takes.

    Args:
        config: configuration with the name of the implementation.
        tokens: [B, N, D], queries and keys.
        valid: bool [B, N], True for tokens to attend to, or int64 [B, N], number of the clip of each token in a packed
            row, where tokens attend to those of the same number; None for all.

    Returns:
        bool [B, 1, 1, N], for packed rows [B, 1, N, N], for "eager" and "sdpa", what transformers makes for other
        implementations; None if every token attends to all.

    Raises:
        ValueError: for packed rows and an implementation that cannot keep the clips of a row apart.
    """
    if valid is None:
        return None
    if valid.dtype != torch.bool:
        return _packed_attention_mask(config, tokens, valid)
    if config._attn_implementation in (None, "eager", "sdpa"):
        # That of transformers has N equal rows, and some releases wait for the device to learn whether any value is
        # False.
        return valid[:, None, None, :]
    return masking_utils.create_bidirectional_mask(config, tokens, valid)  # new in transformers 5


def _packed_attention_mask(config: BestRQ2Config, tokens: Tensor, segments: Tensor) -> Any:
    """Block-diagonal attention mask of packed rows; empty tokens, of number 0, attend to each other."""
    if config._attn_implementation in (None, "eager", "sdpa"):
        return segments[:, None, :, None] == segments[:, None, None, :]
    if config._attn_implementation == "flex_attention":
        same_clip = masking_utils.packed_sequence_mask_function(segments)
        return masking_utils.create_bidirectional_mask(config, tokens, None, and_mask_function=same_clip)
    raise ValueError(
        f"attention implementation '{config._attn_implementation}' cannot keep the clips of a packed row apart; "
        "choose 'sdpa', 'eager' or 'flex_attention'"
    )


def attend(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Any, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Attention by the implementation that the configuration of a module names.

    Args:
        module: attention module; dropout follows its mode.
        queries: [B, heads, N, d].
        keys: [B, heads, N, d].
        values: [B, heads, N, d].
        mask: from `make_attention_mask`, or a float bias [B, heads, N, N] for "eager" and "sdpa".
        dropout: dropout rate of the weights in training.

    Returns:
        Mixed values [B, N, heads * d], and the weights [B, heads, N, N] if the implementation is "eager".
    """
    config: Any = module.config
    # `get_interface` does not exist in transformers 5.0.
    function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager_attention_forward)
    rate, device = dropout if module.training else 0.0, queries.device.type
    # On a CPU the bfloat16 kernel is slower, and its backward pass takes several times as long.
    precise = device == "cpu" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if precise else nullcontext():
        if precise:
            queries, keys, values = queries.float(), keys.float(), values.float()
            if isinstance(mask, Tensor) and mask.is_floating_point():
                mask = mask.float()
        mixed, weights = function(module, queries, keys, values, mask, dropout=rate, scaling=queries.shape[-1] ** -0.5)
    return mixed.flatten(2), weights


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, with the signature of transformers' kernels, for which it is the reference.

    Args:
        module: ignored.
        query: [B, heads, N, d].
        key: [B, heads, N, d].
        value: [B, heads, N, d].
        attention_mask: bool, True for keys to attend to, or float, added to the scores; None for neither.
        scaling: factor of the scores.
        dropout: dropout rate of the weights.
        unused: ignored arguments of other kernels.

    Returns:
        Mixed values [B, N, heads, d], and the weights [B, heads, N, N].
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None and attention_mask.dtype.is_floating_point:
        scores = scores + attention_mask
    elif attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@dataclass
class Record:
    """Outputs of single blocks, collected while they run.

    Attributes:
        hidden_states: the input of the first block and the output of every block, [B, N, D] each; None to keep none.
        attentions: attention weights of every block, [B, heads, N, N] each; None to keep none.
    """

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None

    def add(self, tokens: Tensor, weights: Tensor | None) -> None:
        """Keep what is requested of the output of a block, or of its input, which has no weights."""
        if self.hidden_states is not None:
            self.hidden_states.append(tokens)
        if self.attentions is not None and weights is not None:
            self.attentions.append(weights)

    def fields(self) -> dict[str, Any]:
        """Fields of a model output."""
        return {name: None if kept is None else tuple(kept) for name, kept in vars(self).items()}


def run_blocks(
    blocks: nn.ModuleList, record: Record | None, tokens: Tensor, *others: Any, own: Sequence[Any] | None = None
) -> Tensor:
    """Run tokens [B, N, D] through a sequence of blocks.

    Args:
        blocks: modules that map the tokens and `others` to tokens and attention weights.
        record: where the outputs of the blocks are kept; None to keep none.
        tokens: input of the first block.
        others: further arguments of every block.
        own: last argument of each block, one per block; None for none.
    """
    if record is not None:
        record.add(tokens, None)
    for index, block in enumerate(blocks):
        tokens, weights = block(tokens, *others) if own is None else block(tokens, *others, own[index])
        if record is not None:
            record.add(tokens, weights)
    return tokens
