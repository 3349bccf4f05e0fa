"""Batches: which crop comes when, as a pure function of (seed, step, place in the global batch).

Workers, processes and resumption change nothing: a schedule of keys says what belongs into each batch, and each item is
made from its key alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bestrq2.data.batch_memory import BatchMemory, memory_for, new_rows, packed, unpacked
from bestrq2.data.decoder import FULL_SCALE, UnreadableAudioError, put_samples
from bestrq2.data.schedule import BatchSchedule, CropKey
from bestrq2.data.sources import Source
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.seeding import generator

MAX_TRIES = 1000
# First word of the seed sequence of crops, so that they share no random numbers with others.
CROP = 0xC409

DrawMask = Callable[[Tensor, int, Tensor], Tensor]
"""From lengths int64 [B] in samples, step, and places int64 [B] in the global batch to hidden_mask bool [B, N]."""


@dataclass(frozen=True)
class Crop:
    """One item.

    Attributes:
        key: where it belongs.
        waveform: float32 [samples], or int16 (full scale 32768).
        rejected: recordings tried before it, each with the reason why it was not used.
        recording: what its source calls the recording it is from.
    """

    key: CropKey
    waveform: np.ndarray
    rejected: tuple[tuple[str, str], ...] = ()
    recording: str = ""


class LoaderError(DataError):
    """What can go wrong in a loader's worker.

    A DataLoader builds the error anew from a worker's stack trace; this keeps the sentence and leaves out the trace.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class AllRejectedError(LoaderError):
    """No recording of a source is usable."""


def check_seed(seed: int) -> None:
    """Pass if there are random numbers for a seed.

    Raises:
        ConfigError: it is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or more.")


class CropDataset(Dataset[Crop]):
    """Random crops of a source, looked up by key.

    A recording that cannot be used is replaced by the next one in the order of its epoch; what was passed over is
    listed in the item. Everything is a function of (seed, epoch, index).

    Args:
        source: where the audio comes from.
        sampling_rate: Hz.
        max_seconds: longest crop.
        seed: of order and crops; the same as the schedule's.
        min_samples: shorter recordings are rejected.
    """

    def __init__(self, source: Source, sampling_rate: int, max_seconds: float, seed: int, min_samples: int = 1) -> None:
        check_seed(seed)
        if sampling_rate <= 0 or not max_seconds > 0:
            raise ConfigError(f"Crops of {max_seconds} s at {sampling_rate} Hz are impossible; both must be positive.")
        if len(source) == 0:
            raise DataError(f"{source.name} holds no recordings.")
        self.source = source
        self.sampling_rate = sampling_rate
        self.max_seconds = max_seconds
        self.seed = seed
        self.longest = max(1, round(max_seconds * sampling_rate))
        self.min_samples = min_samples
        self.order = source.order(seed)
        # Recordings of which no crop is usable: known ones are not opened again. The outcome is the same either way.
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: CropKey) -> Crop:
        """The item of a key.

        Raises:
            AllRejectedError: every recording, or 1000 in a row, is unusable.
        """
        crop = self._crop(key)
        # A view into a file that may change is good for this moment only.
        return crop if crop.waveform.flags.owndata else replace(crop, waveform=crop.waveform.copy())

    def _crop(self, key: CropKey) -> Crop:
        """The item of a key; its waveform may be a view that is good until the next one is read."""
        key = CropKey(*key)
        tries = min(len(self.source), MAX_TRIES)
        rejected: list[tuple[str, str]] = []
        for attempt, index in zip(range(tries), self._candidates(key), strict=False):
            result = self._read(key.epoch, index, attempt)
            if isinstance(result, np.ndarray):
                return Crop(key, result, tuple(rejected), self.source.describe(index))
            rejected.append((self.source.describe(index), result))
        tries = len(rejected)
        some = f"{tries:,} recordings in a row" if tries == MAX_TRIES else f"all {tries} recordings"
        which = "its only recording was" if tries == 1 else f"{some} were"
        name, reason = rejected[0]
        raise AllRejectedError(f"{self.source.name}: {which} rejected; first: {name}: {reason}")

    def __getitems__(self, keys: Sequence[CropKey]) -> list[Crop]:
        """The items of one batch, each put into its row while it is still in the processor's caches.

        The waveforms are views into one array [items, longest crop], which `collate` takes over: int16 where all
        crops are, else float32.

        Raises:
            AllRejectedError: as for single items.
        """
        shape, rows = (len(keys), self.longest), None
        crops: list[Crop] = []
        for place, key in enumerate(keys):
            crop = self._crop(key)
            length, kind = len(crop.waveform), _kept_type(crop.waveform)
            if rows is None or (rows.dtype != kind and kind == np.float32):
                fresh = new_rows(shape, kind)
                for row, before in zip(fresh, crops, strict=False):
                    put_samples(before.waveform, row[: len(before.waveform)])
                crops = [replace(c, waveform=row[: len(c.waveform)]) for c, row in zip(crops, fresh, strict=False)]
                rows = fresh
            put_samples(crop.waveform, rows[place, :length])
            crops.append(replace(crop, waveform=rows[place, :length]))
        return crops

    def _candidates(self, key: CropKey) -> Iterator[int]:
        yield key.recording
        yield from self.order.replacements(key.epoch, key.recording)

    def _read(self, epoch: int, index: int, attempt: int) -> np.ndarray | str:
        """A waveform, or the reason why there is none."""
        if index in self._unreadable:
            return self._unreadable[index]
        rng = generator(CROP, self.seed, epoch, index, attempt)
        try:
            waveform = self.source.read(index, self.sampling_rate, rng, self.max_seconds)
            check_length(waveform, self.min_samples, self.sampling_rate)
            return waveform
        except AudioError as error:
            reason = rejection(self.source, index, error)
            if isinstance(error, UnreadableAudioError):
                self._unreadable[index] = reason
            return reason


def _kept_type(waveform: np.ndarray) -> np.dtype:
    """What a waveform is stored as in a batch: 16-bit samples stay what they are, all else becomes float32."""
    return np.dtype(np.int16 if waveform.dtype == np.int16 else np.float32)


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
        recordings: B names, what the source calls the recording of each clip.
        shard_counts: of a stream, recordings in the remote shards that were read to their end since the last batch.
    """

    input_values: Tensor
    lengths: Tensor
    step: int
    places: Tensor
    rejected: list[tuple[str, str]] = field(default_factory=list)
    hidden_mask: Tensor | None = None
    recordings: list[str] = field(default_factory=list)
    shard_counts: dict[str, int] = field(default_factory=dict)

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
        # Other devices do not all keep the source until they have read it.
        waiting = torch.device(device).type != "cuda" or not non_blocking
        values = self.input_values.to(device, non_blocking=not waiting)
        if values.dtype == torch.int16:
            values = values.to(torch.float32).mul_(1 / FULL_SCALE["int16"])
        return replace(self, input_values=values)


def collate(items: Sequence[Crop], draw_mask: DrawMask | None = None) -> AudioBatch:
    """Pad the crops of one step to the longest.

    Args:
        items: crops of the same step.
        draw_mask: draws the hidden patches; None leaves that to the model.
    """
    lengths = torch.tensor([len(item.waveform) for item in items], dtype=torch.int64)
    places = torch.tensor([item.key.place for item in items], dtype=torch.int64)
    longest = int(lengths.max())
    rows = _shared_rows([item.waveform for item in items])
    if rows is None:
        rows = new_rows((len(items), longest), np.result_type(*(_kept_type(item.waveform) for item in items)))
        for row, item in zip(rows, items, strict=True):
            put_samples(item.waveform, row[: len(item.waveform)])
    input_values = np.ascontiguousarray(rows[:, :longest])
    for row, length in zip(input_values, lengths.tolist(), strict=True):
        row[length:] = 0
    step = items[0].key.step
    mask = None if draw_mask is None else draw_mask(lengths, step, places)
    rejected = [entry for item in items for entry in item.rejected]
    recordings = [item.recording for item in items]
    return AudioBatch(torch.from_numpy(input_values), lengths, step, places, rejected, mask, recordings)


def _shared_rows(waveforms: Sequence[np.ndarray]) -> np.ndarray | None:
    """The array whose rows begin with these waveforms, as `CropDataset` makes a batch; None if there is none."""
    rows = waveforms[0].base
    if rows is None or rows.dtype not in (np.float32, np.int16) or rows.ndim != 2 or len(rows) != len(waveforms):
        return None
    begin, stride = rows.ctypes.data, rows.strides[0]
    places = (waveform.ctypes.data - begin for waveform in waveforms)
    return rows if all(place == number * stride for number, place in enumerate(places)) else None


# How long a worker outlives SIGTERM: the step in hand may still want its batches.
_GRACE_SECONDS = 20.0


def _leave_later(number: int, frame: object) -> None:
    leaving = threading.Timer(_GRACE_SECONDS, os._exit, (0,))
    leaving.daemon = True
    leaving.start()


def _start_worker(worker: int, memory: BatchMemory | None) -> None:
    """One thread a worker, and signals are left to the main process, which ends the workers.

    Schedulers signal all processes of a job at once; a worker that died of it would take the last step away.
    """
    torch.set_num_threads(1)
    if memory is not None:
        memory.use_here(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def end_workers(loader: Any) -> None:
    """End the worker processes of a loader now; the traceback of an error would keep them to the end of the program."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def worker_settings(num_workers: int, prefetch_factor: int = 4, batch_samples: int = 0) -> dict[str, Any]:
    """What a `DataLoader` is told about its workers.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        prefetch_factor: batches each worker prepares ahead.
        batch_samples: samples of the largest `AudioBatch`; 0 where the loader makes something else.

    Raises:
        ConfigError: a negative number of workers.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more.")
    # Forked workers share arrays in memory and need no import guard in the user's script; they run no torch threads.
    method, memory = "fork" if sys.platform == "linux" else "spawn", None
    if num_workers and batch_samples and method == "fork":
        memory = memory_for(num_workers, prefetch_factor, batch_samples * np.dtype(np.float32).itemsize)
    return {
        "num_workers": num_workers,
        "worker_init_fn": partial(_start_worker, memory=memory),
        "multiprocessing_context": multiprocessing.get_context(method) if num_workers else None,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": prefetch_factor if num_workers else None,
    }


def make_loader(
    dataset: CropDataset,
    schedule: BatchSchedule,
    num_workers: int,
    draw_mask: DrawMask | None = None,
    pin_memory: bool | None = None,
    prefetch_factor: int = 4,
) -> DataLoader[Crop]:
    """Loader of `AudioBatch`es in the order of a schedule.

    Args:
        dataset: makes the items.
        schedule: names them.
        num_workers: processes that decode; 0 decodes in this one. Any number gives the same batches.
        draw_mask: draws the hidden patches in the worker; picklable where workers are spawned (macOS).
        pin_memory: page-locked memory; None for where CUDA is there.
        prefetch_factor: batches each worker prepares ahead.

    Raises:
        ConfigError: a negative number of workers.
    """
    clips = schedule.batch_size // schedule.world_size
    return DataLoader(
        dataset,
        batch_sampler=schedule,
        collate_fn=partial(collate, draw_mask=draw_mask),
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        **worker_settings(num_workers, prefetch_factor, clips * dataset.longest),
    )


def check_length(waveform: np.ndarray, min_samples: int, sampling_rate: int) -> None:
    """Pass if a crop is long enough.

    Args:
        waveform: [samples].
        min_samples: least length.
        sampling_rate: Hz.

    Raises:
        AudioError: it is shorter.
    """
    if len(waveform) < min_samples:
        raise AudioError(
            f"is too short: {len(waveform) / sampling_rate:.2f} s, the model needs {min_samples / sampling_rate:.2f} s."
        )


def rejection(source: Source, index: int, error: AudioError) -> str:
    """Why a recording cannot be used, without its name."""
    return str(error).removeprefix(f"{source.describe(index)}: ")
