"""Packed rows: several clips in one row of a batch, each treated as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import to_device

# Smallest deviation (dB) that a clip, or a band of it, is divided by: silence has none.
MIN_DEVIATION = 1e-3


@dataclass
class Packing:
    """Clips of packed rows: the clip of each patch column, and where its frames are.

    The columns of a clip follow each other. Keep the tensors on the CPU: there they cost an accelerator no
    synchronization.

    Attributes:
        segments: int64 [R, C], number of the clip in its row, from 1 on without gaps; 0 for empty columns.
        positions: int64 [R, C], number of the column in its clip; 0 for empty columns.
        frames: int64 [R, C], first frame of the column in the spectrogram of its row; 0 for empty columns.
    """

    segments: Tensor
    positions: Tensor
    frames: Tensor

    def clips(self) -> Tensor:
        """Return the number of clips in each row, int64 [R]."""
        return self.segments.amax(dim=1)

    def patch_segments(self, rows: int) -> Tensor:
        """Return the number of the clip of each patch, int64 [R, rows * C], frequency-major; 0 for empty patches."""
        return self.segments.repeat(1, rows)

    def patch_positions(self, rows: int) -> Tensor:
        """Return the place of each patch in the grid that its clip alone would have, int64 [R, rows * C].

        Places are those of a grid of C columns: row * C + number of the column in its clip.
        """
        first = torch.arange(rows, device=self.positions.device) * self.positions.shape[1]
        return (self.positions[:, None] + first[:, None]).flatten(1)


def normalize_clips(log_mel: Tensor, segments: Tensor, per_band: bool) -> Tensor:
    """Standardize each clip of packed rows to mean 0 and deviation 1.

    Args:
        log_mel: float32 [R, bands, C * width] in dB.
        segments: int64 [R, C] as in `Packing`.
        per_band: one mean and deviation per band, over its frames, instead of one over all bands and frames.
    """
    segments, grid = to_device(segments, log_mel.device), log_mel.unflatten(-1, (segments.shape[1], -1))
    # In float64, because a matrix product in float32 may round to fewer bits on an accelerator; Apple's has no float64.
    wide = torch.float32 if log_mel.device.type == "mps" else torch.float64
    same = (segments[:, :, None] == segments[:, None, :]).to(wide)
    count = same.sum(dim=-1)[:, None] * (grid.shape[3] if per_band else grid.shape[1] * grid.shape[3])

    def mean(values: Tensor) -> Tensor:
        """Mean over the clip of each column: [R, bands, C, width] to [R, bands or 1, C, 1]."""
        sums = values.sum(dim=3) if per_band else values.sum(dim=(1, 3))[:, None]
        return (sums.to(wide) @ same / count)[..., None].to(values.dtype)

    centred = grid - mean(grid)
    # Again, because a band that hardly changes is divided by little, and so is the rounding error of its mean.
    centred = centred - mean(centred)
    return (centred / mean(centred.square()).sqrt().clamp_min(MIN_DEVIATION)).flatten(2)
