"""Packed rows: several clips in one row of a batch, each treated as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def sum_over_clips(values: Tensor, segments: Tensor) -> Tensor:
    """Sum values over the columns of each clip: float [R, C] and `segments` to the sum at every column, [R, C]."""
    # Not a matrix product: that may round to fewer bits on an accelerator.
    same = segments[:, :, None] == segments[:, None, :]
    return (values[:, None, :] * same).sum(dim=-1)
