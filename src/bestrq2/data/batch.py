"""Audio batches: rows of clips, each clip reflected at its own ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bestrq2.data.batch_memory import new_rows, packed, unpacked
from bestrq2.data.rejections import Shorter
from bestrq2.data.rows import Rows, SegmentRows, Segments, buffer_samples, gap_frames
from bestrq2.data.waveforms import put_samples
from bestrq2.model.fields import ModelFields
from bestrq2.model.packing import Packing
from bestrq2.model.waveforms import FULL_SCALE

DrawMask = Callable[[Tensor, int, Tensor], Tensor]
"""From the clips of rows, int64 [R, C] as in `Packing`, step, and places int64 [R] of the rows in the global batch to
hidden_mask bool [R, N]."""

_TENSORS = ("input_values", "lengths", "places", "hidden_mask")


@dataclass
class AudioBatch:
    """R rows of one step with B clips, numbered row by row; there may be none, where no segment can be used.

    Attributes:
        input_values: [R, S], the clips of a row one after the other, each reflected at its own ends as in `LogMel`,
            zeros elsewhere: float32, or int16 (full scale 32768) where all clips are, so that half as many bytes
            travel; `to` makes it float32.
        lengths: int64 [B], samples of each clip; stays on the CPU.
        step: number of the step.
        places: int64 [R], positions of the rows in the global batch; stays on the CPU.
        packing: the clip of each patch column, and where its frames are; stays on the CPU.
        rejected: recordings of segments that could not be used, each with the reason.
        hidden_mask: bool [R, N], patches to hide, where the loader draws them; stays on the CPU.
        recordings: B names, the recording of each clip as its source describes it.
        shorter: recordings that end before their header promised.
    """

    input_values: Tensor
    lengths: Tensor
    step: int
    places: Tensor
    packing: Packing
    rejected: list[tuple[str, str]] = field(default_factory=list)
    hidden_mask: Tensor | None = None
    recordings: list[str] = field(default_factory=list)
    shorter: list[Shorter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: packed(value) if name in _TENSORS else value for name, value in self.__dict__.items()}
        return {**state, "packing": [packed(value) for value in vars(self.packing).values()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {name: unpacked(value) if name in _TENSORS else value for name, value in state.items()}
        self.packing = Packing(*(torch.as_tensor(unpacked(value)) for value in state["packing"]))

    def pin_memory(self) -> AudioBatch:
        """The batch with its audio and mask in page-locked memory."""
        mask = None if self.hidden_mask is None else self.hidden_mask.pin_memory()
        return replace(self, input_values=self.input_values.pin_memory(), hidden_mask=mask)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AudioBatch:
        """The batch with its audio on a device, as float32; 16-bit samples are converted there."""
        # Only CUDA's allocator keeps the source of an asynchronous copy until it is done.
        waiting = torch.device(device).type != "cuda" or not non_blocking
        values = self.input_values.to(device, non_blocking=not waiting)
        if values.dtype == torch.int16:
            values = values.to(torch.float32).mul_(1 / FULL_SCALE["int16"])
        return replace(self, input_values=values)


def sample_type(waveform: np.ndarray) -> np.dtype:
    """Data type of a waveform in a batch: 16-bit samples stay what they are, everything else becomes float32."""
    return np.dtype(np.int16 if waveform.dtype == np.int16 else np.float32)


class RowWriter:
    """Rows of a batch under construction; they are filled one after the other.

    Args:
        fields: fields of the model.
        rows: number of rows.
        columns: patch columns of a row.
        samples: samples of a row, see `buffer_samples`.
    """

    def __init__(self, fields: ModelFields, rows: int, columns: int, samples: int) -> None:
        self.fields, self.shape = fields, (rows, samples)
        self.values: np.ndarray | None = None
        self.packing = np.zeros((3, rows, columns), np.int64)
        self.lengths: list[int] = []
        self.counts = np.zeros(rows, np.int64)
        # End of what was written in each row: samples, and patch columns.
        self._ends, self._columns = np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    def add(self, row: int, clip: np.ndarray) -> None:
        """Put a clip behind the others of a row.

        Args:
            row: number of the row.
            clip: [samples], int16 or float32. Its whole patch columns must fit.
        """
        fields, width = self.fields, self.fields.patch_size[1]
        columns, column = fields.columns(len(clip)), int(self._columns[row])
        frame = column * width + int(self.counts[row]) * gap_frames(fields)
        start = frame * fields.hop_length
        end = start + buffer_samples(columns, 1, fields)
        values = self._values_for(clip)[row]
        values[self._ends[row] : start] = 0
        put_reflected(clip, values[start:end], fields.n_fft // 2)
        segments, positions, frames = self.packing[:, row, column : column + columns]
        self.counts[row] += 1
        segments[:] = self.counts[row]
        positions[:] = np.arange(columns)
        frames[:] = frame + width * positions
        self._ends[row], self._columns[row] = end, column + columns
        self.lengths.append(len(clip))

    def _values_for(self, clip: np.ndarray) -> np.ndarray:
        """The rows [rows, samples]: int16 as long as all clips are, else float32."""
        kind, values = sample_type(clip), self.values
        if values is None or (values.dtype != kind and kind == np.float32):
            self.values = new_rows(self.shape, kind)
            for row, before, end in zip(self.values, () if values is None else values, self._ends, strict=False):
                put_samples(before[:end], row[:end])
        assert self.values is not None
        return self.values

    def batch(self, step: int, places: Sequence[int], recordings: Sequence[str] = ()) -> AudioBatch:
        """The batch of all rows; nothing may be added after that.

        Args:
            step: number of the step.
            places: position of each row in the global batch.
            recordings: name of the recording of each clip.
        """
        values = new_rows(self.shape, np.dtype(np.int16)) if self.values is None else self.values
        for row, end in zip(values, self._ends, strict=True):
            row[end:] = 0
        return AudioBatch(
            torch.from_numpy(values),
            torch.tensor(self.lengths, dtype=torch.int64),
            step,
            torch.tensor(places, dtype=torch.int64),
            Packing(*map(torch.from_numpy, self.packing)),
            recordings=list(recordings),
        )


def put_reflected(clip: np.ndarray, row: np.ndarray, reach: int) -> None:
    """Write a clip [samples] into a row [samples] from sample `reach` on, reflected at both ends as in `LogMel`.

    The row gets as much of the clip as fits; where the clip is too short it is reflected repeatedly.
    """
    inside = min(len(clip), len(row) - reach)
    behind = len(row) - reach - inside
    if len(clip) > max(reach, behind):
        put_samples(clip[reach:0:-1], row[:reach])
        put_samples(clip[:inside], row[reach : reach + inside])
        put_samples(clip[len(clip) - 1 - behind : len(clip) - 1][::-1], row[reach + inside :])
        return
    period = max(1, 2 * (len(clip) - 1))
    folded = np.arange(-reach, len(row) - reach) % period
    put_samples(clip[np.minimum(folded, period - folded)], row)


def fixed_batches(clips: Sequence[np.ndarray], fields: ModelFields, batch_rows: int) -> list[AudioBatch]:
    """Batches of clips that do not change, as `fixed_crops` gives them, in as few rows as they fit.

    Args:
        clips: waveforms [samples], at most as long as the model takes.
        fields: fields of the model.
        batch_rows: rows of each batch; the last one may have fewer.
    """
    rows = SegmentRows(Segments(np.array([len(clip) for clip in clips], np.int64), fields.max_samples, 1, 0), fields, 0)
    batches = []
    for first in range(0, len(rows), batch_rows):
        own = range(first, min(first + batch_rows, len(rows)))
        writer = row_writer(rows, fields, own)
        for number, row in enumerate(own):
            for segment in rows.segments(0, row):
                writer.add(number, clips[segment.recording])
        batches.append(writer.batch(0, own))
    return batches


def row_writer(rows: Rows, fields: ModelFields, numbers: Sequence[int]) -> RowWriter:
    """Writer of a batch of some rows: as wide as any batch, or where these are made by length, as the longest."""
    columns, samples = rows.capacity, rows.samples
    if rows.by_length:
        columns = max(sum(rows.widths(number)) for number in numbers)
        samples = buffer_samples(columns, 1, fields)
    return RowWriter(fields, len(numbers), columns, samples)
