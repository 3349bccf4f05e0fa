"""Masks of hidden patches, drawn per clip as a pure function of (seed, step, place in the global batch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .configuration_bestrq2 import BestRQ2Config
from .kernels import to_device

# Separates the random stream of the ratio from those of the clips, whose places start at 0.
_RATIO_STREAM = 2**32 - 1


def draw_hidden_mask(
    config: BestRQ2Config, columns: Sequence[int], seed: int, step: int, places: Sequence[int]
) -> Tensor:
    """Draw the hidden patches of every clip of a batch.

    The ratio is drawn once per step, so clips of equal length hide equally many patches: floor(ratio * patches), at
    least one, and at least one stays visible.

    Args:
        config: configuration with the rows of the grid and the `mask_*` fields.
        columns: patch columns of each clip.
        seed: random seed of the run.
        step: optimizer step.
        places: place of each clip in the global batch.

    Returns:
        bool [B, rows * max(columns)] on the CPU. True = hidden; False after the end of a clip.

    Raises:
        ValueError: for a clip of a single patch, of which nothing can be hidden and predicted.
    """
    ratio = _ratio(config, seed, step)
    rows, widest = config.patch_rows, max(columns)
    drawn = np.zeros((len(columns), rows, widest), dtype=bool)
    for mask, clip_columns, place in zip(drawn, columns, places, strict=True):
        rng = np.random.default_rng([seed, step, place])
        _draw_clip(mask[:, :clip_columns], int(ratio * (rows * clip_columns)), rng)
    return torch.from_numpy(drawn).flatten(1)


def draw_packed_mask(config: BestRQ2Config, segments: Tensor, seed: int, step: int, places: Sequence[int]) -> Tensor:
    """Draw the hidden patches of every clip of a batch of packed rows.

    The ratio is drawn once per step. Every clip hides its share, rounded up or down such that a row hides the rounded
    share of its patches; at least one patch of a clip is hidden and one stays visible. Empty patches count as hidden
    where the clips of a row hide fewer than floor(ratio * N), so that all rows, whatever their clips, have equally many
    hidden and equally many other patches (clips so short that they cannot hide their share excepted).

    Args:
        config: configuration with the rows of the grid and the `mask_*` fields.
        segments: int64 [R, C], the clips of each row as in `Packing`.
        seed: random seed of the run.
        step: optimizer step.
        places: place of each row in the global batch.

    Returns:
        bool [R, rows * C] on the CPU. True = hidden.

    Raises:
        ValueError: for a clip of a single patch, of which nothing can be hidden and predicted.
    """
    ratio = _ratio(config, seed, step)
    height, columns = config.patch_rows, segments.shape[1]
    drawn = np.zeros((len(segments), height, columns), dtype=bool)
    for mask, numbers, place in zip(drawn, segments.cpu().numpy(), places, strict=True):
        before = 0
        for clip in range(1, int(numbers.max()) + 1):
            (own,) = (numbers == clip).nonzero()
            through = before + height * len(own)
            hidden = int(ratio * through) - int(ratio * before)  # so that rounding errors do not add up over a row
            rng = np.random.default_rng([seed, step, place, clip])
            _draw_clip(mask[:, own[0] : own[-1] + 1], hidden, rng)
            before = through
        missing = int(ratio * height * columns) - int(mask.sum())
        (empty,) = np.broadcast_to(numbers == 0, (height, columns)).ravel().nonzero()
        mask.reshape(-1)[empty[: max(0, missing)]] = True
    return torch.from_numpy(drawn).flatten(1)


def _ratio(config: BestRQ2Config, seed: int, step: int) -> float:
    """Draw the share of hidden patches of a step."""
    low, high = config.mask_ratio
    return np.random.default_rng([seed, step, _RATIO_STREAM]).uniform(low, high)


def _draw_clip(mask: np.ndarray, hidden: int, rng: np.random.Generator) -> None:
    """Draw the mask of one clip, bool [rows, columns] and all False so far: `hidden` patches without replacement.

    At least one patch is hidden, and at least one is not.
    """
    if mask.size < 2:
        raise ValueError("a clip of one patch cannot be masked; drop clips shorter than two patches")
    mask.flat[rng.permutation(mask.size)[: min(max(1, hidden), mask.size - 1)]] = True


def order_by_mask(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the selected patches of every clip, in grid order.

    The largest count in the batch sets the shape and is read on the device of the mask: keep masks on the CPU to spare
    the accelerator a synchronization.

    Args:
        selected: bool [B, N].

    Returns:
        index: int64 [B, K], K the largest number selected in one clip; surplus entries point at unselected patches.
        real: bool [B, K], False at surplus entries.
    """
    counts = selected.sum(dim=1)
    most = int(counts.max())
    index = torch.argsort((~selected).to(torch.uint8), dim=1, stable=True)[:, :most]
    real = torch.arange(most, device=selected.device) < counts[:, None]
    return index, real


@dataclass(frozen=True)
class Split:
    """Places of K visible and H hidden patches in the grids of B clips.

    Attributes:
        places: int64 [B, K + H], index of each patch in the grid: visible, then hidden, each in grid order.
        positions: int64 [B, K + H], place of each patch in the grid of its clip; `places` itself unless packed.
        visible_count: K, the largest number of visible patches in one clip or packed row.
        valid: bool [B, K + H], False at surplus entries; in packed rows int64, number of the clip of each patch, 0 at
            surplus entries and empty patches; None if the whole batch has neither.
    """

    places: Tensor
    positions: Tensor
    visible_count: int
    valid: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """Places of the visible patches, int64 [B, K]."""
        return self.places[:, : self.visible_count]

    @property
    def hidden(self) -> Tensor:
        """Places of the hidden patches, int64 [B, H]."""
        return self.places[:, self.visible_count :]

    @property
    def visible_valid(self) -> Tensor | None:
        """`valid` of the visible patches, [B, K]."""
        return None if self.valid is None else self.valid[:, : self.visible_count]

    @property
    def hidden_valid(self) -> Tensor | None:
        """Which hidden patches count, bool [B, H]; None for all."""
        return None if self.valid is None else self.valid[:, self.visible_count :] != 0


def split_by_mask(hidden_mask: Tensor, valid: Tensor | None, device: torch.device) -> Split:
    """Split grids into visible and hidden patches, and move the result to a device.

    Args:
        hidden_mask: bool [B, N]; on the CPU it costs an accelerator no synchronization.
        valid: bool [B, N] on the same device, True for patches inside their clip; None for all.
        device: device of the result.
    """
    visible_mask = ~hidden_mask if valid is None else ~hidden_mask & valid
    visible_counts, hidden_counts = visible_mask.sum(dim=1), hidden_mask.sum(dim=1)
    if all(bool((counts == counts[0]).all()) for counts in (visible_counts, hidden_counts)):
        parts = [mask.nonzero()[:, 1].view(len(mask), -1) for mask in (visible_mask, hidden_mask)]
        places = to_device(torch.cat(parts, dim=1), device)
        return Split(places, places, parts[0].shape[1])
    (visible, visible_valid), (hidden, hidden_valid) = order_by_mask(visible_mask), order_by_mask(hidden_mask)
    places = to_device(torch.cat([visible, hidden], dim=1), device)
    return Split(places, places, visible.shape[1], to_device(torch.cat([visible_valid, hidden_valid], dim=1), device))


def split_packed(hidden_mask: Tensor, segments: Tensor, positions: Tensor, device: torch.device) -> Split:
    """Split packed rows into visible and hidden patches, and move the result to a device.

    Rows in which equally many patches are marked as hidden, as `draw_packed_mask` does it, are split into N patches
    without surplus entries, so that batches of one ratio have one shape.

    Args:
        hidden_mask: bool [B, N]; on the CPU it costs an accelerator no synchronization.
        segments: int64 [B, N] on the same device, number of the clip of each patch, 0 for empty patches.
        positions: int64 [B, N] on the same device, place of each patch in the grid of its clip.
        device: device of the result.
    """
    visible_mask, counts = ~hidden_mask, hidden_mask.sum(dim=1)
    if bool((counts != counts[0]).any()):
        visible_mask, hidden_mask = visible_mask & (segments != 0), hidden_mask & (segments != 0)
    (visible, is_visible), (hidden, is_hidden) = order_by_mask(visible_mask), order_by_mask(hidden_mask)
    places, real = torch.cat([visible, hidden], dim=1), torch.cat([is_visible, is_hidden], dim=1)
    numbers = segments.gather(1, places).masked_fill(~real, 0)
    moved = to_device(torch.stack([places, positions.gather(1, places), numbers]), device)
    return Split(moved[0], moved[1], visible.shape[1], moved[2])
