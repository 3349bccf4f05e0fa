"""Audio batches: crops of one step, padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bestrq2.data.batch_memory import new_rows, packed, unpacked
from bestrq2.data.order import CropKey
from bestrq2.data.rejections import Shorter
from bestrq2.data.waveforms import put_samples
from bestrq2.model.waveforms import FULL_SCALE

DrawMask = Callable[[Tensor, int, Tensor], Tensor]
"""From lengths int64 [B] in samples, step, and places int64 [B] in the global batch to hidden_mask bool [B, N]."""


@dataclass(frozen=True)
class Crop:
    """One item of a batch.

    Attributes:
        key: place in the schedule.
        waveform: float32 [samples], or int16 (full scale 32768).
        rejected: recordings tried before it, each with the reason why it was not used.
        recording: name of its recording, as the source describes it.
        shorter: its recording, if that ends before its header promised.
    """

    key: CropKey
    waveform: np.ndarray
    rejected: tuple[tuple[str, str], ...] = ()
    recording: str = ""
    shorter: tuple[Shorter, ...] = ()


_TENSORS = ("input_values", "lengths", "places", "hidden_mask")


@dataclass
class AudioBatch:
    """Crops of one step, padded to the longest.

    Attributes:
        input_values: [B, S], zeros after each clip's end: float32, or int16 (full scale 32768) where all crops are, so
            that half as many bytes travel; `to` makes it float32.
        lengths: int64 [B], samples of each clip; stays on the CPU.
        step: number of the step.
        places: int64 [B], positions in the global batch; stays on the CPU.
        rejected: recordings passed over, each with the reason.
        hidden_mask: bool [B, N], patches to hide, where the loader draws them; stays on the CPU.
        recordings: B names, the recording of each clip as its source describes it.
        shorter: recordings that end before their header promised.
    """

    input_values: Tensor
    lengths: Tensor
    step: int
    places: Tensor
    rejected: list[tuple[str, str]] = field(default_factory=list)
    hidden_mask: Tensor | None = None
    recordings: list[str] = field(default_factory=list)
    shorter: list[Shorter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {name: packed(value) if name in _TENSORS else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {name: unpacked(value) if name in _TENSORS else value for name, value in state.items()}

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


def collate(items: Sequence[Crop], draw_mask: DrawMask | None = None) -> AudioBatch:
    """Pad the crops of one step to the longest.

    Args:
        items: crops of the same step.
        draw_mask: function that draws the hidden patches; None leaves that to the model.
    """
    lengths = torch.tensor([len(item.waveform) for item in items], dtype=torch.int64)
    places = torch.tensor([item.key.place for item in items], dtype=torch.int64)
    longest = int(lengths.max())
    rows = _shared_rows([item.waveform for item in items])
    if rows is None:
        rows = new_rows((len(items), longest), np.result_type(*(sample_type(item.waveform) for item in items)))
        for row, item in zip(rows, items, strict=True):
            put_samples(item.waveform, row[: len(item.waveform)])
    input_values = np.ascontiguousarray(rows[:, :longest])
    for row, length in zip(input_values, lengths.tolist(), strict=True):
        row[length:] = 0
    step = items[0].key.step
    mask = None if draw_mask is None else draw_mask(lengths, step, places)
    rejected = [entry for item in items for entry in item.rejected]
    recordings = [item.recording for item in items]
    shorter = [entry for item in items for entry in item.shorter]
    return AudioBatch(torch.from_numpy(input_values), lengths, step, places, rejected, mask, recordings, shorter)


def _shared_rows(waveforms: Sequence[np.ndarray]) -> np.ndarray | None:
    """The array whose rows begin with these waveforms, as `CropDataset` makes a batch; None if there is none."""
    rows = waveforms[0].base
    if rows is None or rows.dtype not in (np.float32, np.int16) or rows.ndim != 2 or len(rows) != len(waveforms):
        return None
    begin, stride = rows.ctypes.data, rows.strides[0]
    places = (waveform.ctypes.data - begin for waveform in waveforms)
    return rows if all(place == number * stride for number, place in enumerate(places)) else None


def fixed_batches(crops: Sequence[np.ndarray], batch_size: int) -> list[AudioBatch]:
    """Batches of crops that do not change, as `fixed_crops` gives them, in their order.

    Args:
        crops: waveforms [samples].
        batch_size: clips of each batch; the last one may have fewer.
    """
    items = [Crop(CropKey(0, index, 0, index), crop) for index, crop in enumerate(crops)]
    return [collate(items[first : first + batch_size]) for first in range(0, len(items), batch_size)]
