"""Which patches are hidden: drawn per clip, a pure function of (seed, step, place in the global batch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .configuration_bestrq2 import BestRQ2Config

# Keeps the ratio's random stream apart from those of the clips, whose places start at 0.
_RATIO_STREAM = 2**32 - 1


def draw_hidden_mask(
    config: BestRQ2Config, columns: Sequence[int], seed: int, step: int, places: Sequence[int]
) -> Tensor:
    """Draw the hidden patches of every clip of a batch.

    The ratio is drawn once per step, so clips of equal length hide equally many patches: floor(ratio * patches), at
    least one, and at least one stays visible.

    Args:
        config: gives the rows of the grid, `mask_ratio`, `mask_shape` and `mask_block_size`.
        columns: patch columns of each clip.
        seed: of the run.
        step: of the optimiser.
        places: place of each clip in the global batch.

    Returns:
        bool [B, rows * max(columns)] on the CPU, True = hidden; False behind the end of a clip.

    Raises:
        ValueError: if a clip has a single patch: nothing could be hidden and still be predicted.
    """
    low, high = config.mask_ratio
    ratio = np.random.default_rng([seed, step, _RATIO_STREAM]).uniform(low, high)
    rows, widest = config.patch_rows, max(columns)
    masks = np.zeros((len(columns), rows, widest), dtype=bool)
    for mask, clip_columns, place in zip(masks, columns, places, strict=True):
        patches = rows * clip_columns
        if patches < 2:
            raise ValueError("a clip of one patch cannot be masked; drop clips shorter than two patches")
        hidden = min(max(1, int(ratio * patches)), patches - 1)
        rng = np.random.default_rng([seed, step, place])
        if config.mask_shape == "block":
            mask[:, :clip_columns] = _blocks(rows, clip_columns, hidden, config.mask_block_size, rng)
        else:
            mask[:, :clip_columns].flat[rng.permutation(patches)[:hidden]] = True
    return torch.from_numpy(masks.reshape(len(columns), -1))


def _blocks(rows: int, columns: int, hidden: int, size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Rectangles at random places until `hidden` patches are covered; the last one is thinned to the exact number."""
    height, width = min(size[0], rows), min(size[1], columns)
    mask = np.zeros((rows, columns), dtype=bool)
    while (missing := hidden - int(mask.sum())) > 0:
        row, column = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = np.zeros_like(mask)
        block[row : row + height, column : column + width] = True
        fresh = np.flatnonzero(block & ~mask)
        mask.flat[rng.permutation(fresh)[:missing]] = True
    return mask


def order_by_mask(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the selected patches of every clip, in grid order.

    Static shapes come from the largest count in the batch, read on the device of the mask: keep masks on the CPU to
    spare the accelerator a synchronisation.

    Args:
        selected: bool [B, N].

    Returns:
        index: int64 [B, K], K the largest number selected in one clip; surplus places point at unselected patches.
        real: bool [B, K], False at those surplus places.
    """
    counts = selected.sum(dim=1)
    most = int(counts.max())
    index = torch.argsort((~selected).to(torch.uint8), dim=1, stable=True)[:, :most]
    real = torch.arange(most, device=selected.device) < counts[:, None]
    return index, real
