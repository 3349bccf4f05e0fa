"""Frames of hidden layers: which ones, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from bestrq2.errors import ConfigError

Layers: TypeAlias = "int | Sequence[int] | str | None"


def layer_indices(layers: Layers, blocks: int) -> list[int] | None:
    """Places in the model's `hidden_states`; None for its last states.

    Args:
        layers: 0 for what enters the first block, n for the output of block n, negative ones counted from the last
            block; several for their mean; "mean" for that of all blocks; None for the output behind the final norm.
        blocks: how many there are.

    Raises:
        ConfigError: there is no such layer.
    """
    if layers is None:
        return None
    if layers == "mean":
        return list(range(1, blocks + 1))
    wanted = [layers] if isinstance(layers, int) else layers
    whole = isinstance(wanted, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in wanted)
    if not whole or isinstance(wanted, str) or not wanted or not all(-blocks - 1 <= int(n) <= blocks for n in wanted):
        raise ConfigError(
            f"layers must be None, 'mean', or whole numbers from {-blocks - 1} to {blocks} "
            f"(0 enters the first of {blocks} blocks), got {layers!r}"
        )
    return [int(n) % (blocks + 1) for n in wanted]


def mean_frames(hidden_states: Sequence[Tensor], layers: Sequence[int], rows: int) -> Tensor:
    """Mean over layers and frequency rows: [B, N, D] each to float32 [B, T', D]; padding is not blanked."""
    total = hidden_states[layers[0]].float()
    for layer in layers[1:]:
        total = total + hidden_states[layer].float()
    return total.unflatten(1, (rows, -1)).mean(dim=1) / len(layers)
