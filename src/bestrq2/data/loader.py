"""Batches for training: crops of a source in worker processes, as a pure function of (seed, step, place).

Workers, processes and resumption change nothing: the schedule says which recordings belong into each batch, and each
item is made from its key alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bestrq2.child_processes import end_with_parent
from bestrq2.data.audio import errors_named, shorter_files
from bestrq2.data.batch import AudioBatch, Crop, DrawMask, collate, fixed_batches, sample_type
from bestrq2.data.batch_memory import BatchMemory, memory_for, new_rows
from bestrq2.data.order import BatchSchedule, CropKey, sample_order
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.rejections import Shorter
from bestrq2.data.shards.remote import FetchAhead
from bestrq2.data.sources import LoaderError, Source, split_source
from bestrq2.data.waveforms import put_samples, to_float32
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.seeding import generator

__all__ = ["AudioBatch", "end_workers", "fixed_batches", "fixed_crops", "split_source", "training_batches"]

MAX_TRIES = 1000
# First words of seed sequences, so that these share no random numbers with others.
CROP, FIXED = 0xC409, 0xF18ED


class AllRejectedError(LoaderError):
    """No recording of a source is usable."""


def training_batches(
    source: Source,
    *,
    sampling_rate: int,
    max_seconds: float,
    min_samples: int = 1,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    num_workers: int = 0,
    draw_mask: DrawMask | None = None,
    max_steps: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """Batches of random crops in the order of training; any number of workers and processes gives the same ones.

    Args:
        source: audio to draw from.
        sampling_rate: sampling rate in Hz.
        max_seconds: longest crop in seconds.
        min_samples: shorter recordings are rejected.
        seed: random seed for order and crops, 0 or more.
        batch_size: size of the global batch, over all processes.
        start_step: first step; a resumed run gives the number of steps done.
        num_workers: processes that decode; 0 decodes in this one.
        draw_mask: function that draws the hidden patches; None leaves that to the model. Picklable where workers are
            spawned (macOS).
        max_steps: step before which to stop; None for never.
        rank: number of this process; it gets the places that leave this remainder when divided by `world_size`.
        world_size: number of processes.

    Returns:
        A loader of `AudioBatch`; see `end_workers`.

    Raises:
        ConfigError: sizes or numbers that are impossible together.
        DataError: there are no recordings.
    """
    dataset = CropDataset(source, sampling_rate, max_seconds, seed, min_samples)
    schedule = _FetchingSchedule(source, seed, batch_size, start_step, max_steps, rank, world_size)
    clips = batch_size // world_size
    return DataLoader(
        dataset,
        batch_sampler=schedule,
        collate_fn=partial(collate, draw_mask=draw_mask),
        pin_memory=torch.cuda.is_available(),
        **worker_settings(num_workers, clips * dataset.longest),
    )


class _FetchingSchedule(BatchSchedule):
    """A schedule that has remote shards fetched before their recordings are due.

    Args:
        source: audio to draw from.
        seed: random seed of the order.
        *share: see `BatchSchedule`.
    """

    def __init__(self, source: Source, seed: int, *share: Any) -> None:
        super().__init__(source.order(seed), *share)
        self.source, self.seed = source, seed

    def __iter__(self) -> Iterator[list[CropKey]]:
        if not self.source.is_remote():
            yield from super().__iter__()
            return
        # Runs in the main process, from the first batch on: after the workers were forked.
        start = self.start_step * self.batch_size
        ahead = FetchAhead(self.source.order(self.seed), self.source.remote_shard, start)
        try:
            for keys in super().__iter__():
                ahead.advance(keys[-1].step * self.batch_size)
                yield keys
        finally:
            ahead.end()


class CropDataset(Dataset[Crop]):
    """Random crops of a source, looked up by key.

    A recording that cannot be used is replaced by the next one in the order of its epoch; what was passed over is
    listed in the item. Everything is a function of (seed, epoch, index).

    Args:
        source: audio to draw from.
        sampling_rate: sampling rate in Hz.
        max_seconds: longest crop in seconds.
        seed: random seed for order and crops; the same as the schedule's.
        min_samples: shorter recordings are rejected.

    Raises:
        ConfigError: a crop of no length, or a negative seed.
        DataError: there are no recordings.
    """

    def __init__(self, source: Source, sampling_rate: int, max_seconds: float, seed: int, min_samples: int = 1) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}; it must be 0 or more.")
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
        key = CropKey(*key)
        tries = min(len(self.source), MAX_TRIES)
        rejected: list[tuple[str, str]] = []
        for attempt, index in zip(range(tries), self._candidates(key), strict=False):
            with shorter_files() as shorter:
                result = self._read(key.epoch, index, attempt)
            if isinstance(result, np.ndarray):
                return Crop(key, result, tuple(rejected), self.source.describe(index), tuple(shorter))
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
            crop = self[key]
            length, kind = len(crop.waveform), sample_type(crop.waveform)
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


def check_length(waveform: np.ndarray, min_samples: int, sampling_rate: int) -> None:
    """Check that a crop is long enough.

    Args:
        waveform: [samples].
        min_samples: least length in samples.
        sampling_rate: sampling rate in Hz.

    Raises:
        AudioError: it is shorter.
    """
    if len(waveform) < min_samples:
        raise AudioError(
            f"is too short: {len(waveform) / sampling_rate:.2f} s, the model needs {min_samples / sampling_rate:.2f} s."
        )


def rejection(source: Source, index: int, error: AudioError) -> str:
    """Reason why a recording cannot be used, without its name."""
    return str(error).removeprefix(f"{source.describe(index)}: ")


def fixed_crops(
    source: Source,
    count: int,
    *,
    seed: int,
    sampling_rate: int,
    max_seconds: float,
    min_samples: int = 1,
    rejected: list[tuple[str, str]] | None = None,
    shorter: list[Shorter] | None = None,
) -> list[np.ndarray]:
    """Crops for a validation loss, always the same ones.

    Args:
        source: audio to draw from.
        count: number of crops, each from another recording.
        seed: random seed for choice and position.
        sampling_rate: sampling rate in Hz.
        max_seconds: longest crop in seconds.
        min_samples: shorter recordings are rejected.
        rejected: recordings that cannot be used are added to it, each with the reason.
        shorter: recordings that end before their header promised are added to it.

    Returns:
        Waveforms float32 [samples]; fewer than `count`, even none, where the source holds fewer usable recordings.
    """
    crops: list[np.ndarray] = []
    for index in map(int, sample_order(FIXED, len(source), seed, source.parts())):
        if len(crops) == count:
            break
        try:
            with errors_named(source.describe(index)), shorter_files() as found:
                crop = source.read(index, sampling_rate, generator(FIXED, seed, index), max_seconds)
                check_length(crop, min_samples, sampling_rate)
                crops.append(to_float32(crop))
            if shorter is not None:
                shorter += found
        except AudioError as error:
            if rejected is not None:
                rejected.append((source.describe(index), rejection(source, index, error)))
    return crops


# How long a worker outlives SIGTERM: the step in hand may still need its batches.
_GRACE_SECONDS = 20.0
# Batches that each worker prepares ahead.
_AHEAD = 4


def _leave_later(number: int, frame: object) -> None:
    leaving = threading.Timer(_GRACE_SECONDS, os._exit, (0,))
    leaving.daemon = True
    leaving.start()


def _start_worker(worker: int, memory: BatchMemory | None, parent: int) -> None:
    """Set up a worker: one thread, signals left to the main process, which ends the workers.

    Schedulers signal all processes of a job at once; a worker that died of it would take the last step away.
    """
    end_with_parent(parent)
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


def worker_settings(num_workers: int, batch_samples: int = 0) -> dict[str, Any]:
    """Keyword arguments of a `DataLoader` that concern its workers.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        batch_samples: samples of the largest `AudioBatch`; 0 where the loader makes something else.

    Raises:
        ConfigError: a negative number of workers.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more.")
    # Forked workers share arrays in memory and need no import guard in the user's script; they run no torch threads.
    method, memory = "fork" if sys.platform == "linux" else "spawn", None
    if num_workers and batch_samples and method == "fork":
        memory = memory_for(num_workers, _AHEAD, batch_samples * np.dtype(np.float32).itemsize)
    return {
        "num_workers": num_workers,
        "worker_init_fn": partial(_start_worker, memory=memory, parent=os.getpid()),
        "multiprocessing_context": multiprocessing.get_context(method) if num_workers else None,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": _AHEAD if num_workers else None,
    }
