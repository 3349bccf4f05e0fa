"""Rows of several clips, packed by hand."""

from __future__ import annotations

import numpy as np
import torch

from bestrq2.model.fields import ModelFields
from bestrq2.model.packing import Packing


def pack(config: ModelFields, rows: list[list[torch.Tensor | int]], capacity: int) -> tuple[torch.Tensor, Packing]:
    """Pack clips [samples] into rows of `capacity` patch columns; a number stands for so many empty columns.

    Samples that no clip reads are 0.5.
    """
    width, hop, reach = config.patch_size[1], config.hop_length, config.n_fft // 2
    gap = -(-config.n_fft // hop) - 1
    buffers, places = [], np.zeros((3, len(rows), capacity), dtype=np.int64)
    for row, clips in enumerate(rows):
        parts, column, frame, number = [], 0, 0, 0
        for clip in clips:
            columns = clip if isinstance(clip, int) else config.columns(len(clip))
            samples = torch.full(((columns * width + gap) * hop,), 0.5)
            if not isinstance(clip, int):
                number += 1
                index = np.arange((columns * width - 1) * hop + config.n_fft) - reach
                period = max(1, 2 * (len(clip) - 1))
                index = np.minimum(index % period, -index % period)
                samples[: len(index)] = clip[torch.from_numpy(index)]
                own = slice(column, column + columns)
                places[0, row, own] = number
                places[1, row, own] = np.arange(columns)
                places[2, row, own] = frame + np.arange(columns) * width
            parts.append(samples)
            column, frame = column + columns, frame + columns * width + gap
        assert column <= capacity
        buffers.append(torch.cat([*parts, torch.full((config.n_fft,), 0.5)]))
    total = max(map(len, buffers))
    values = torch.stack([torch.nn.functional.pad(buffer, (0, total - len(buffer)), value=0.5) for buffer in buffers])
    return values, Packing(*(torch.from_numpy(place) for place in places))


def by_clip(grid: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
    """Values of each clip's own patches [patches of the clip, ...], row by row, from the grids [R, N, ...]."""
    columns = packing.segments.shape[1]
    parts = []
    for of_row, segments in zip(grid.unflatten(1, (-1, columns)), packing.segments, strict=True):
        parts += [of_row[:, segments == clip].flatten(0, 1) for clip in range(1, int(segments.max()) + 1)]
    return parts
