"""Batches for training: crops of a source in worker processes, as a pure function of (seed, step, place).

Workers, processes and resumption change nothing: the schedule says which recordings belong into each batch, and each
item is made from its key alone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bestrq2.child_processes import end_with_parent
from bestrq2.data.audio import errors_named, shorter_files
from bestrq2.data.batch import (
    AudioBatch,
    Crop,
    DrawMask,
    DrawPackedMask,
    collate,
    fixed_batches,
    fixed_rows,
    row_writer,
    sample_type,
)
from bestrq2.data.batch_memory import BatchMemory, memory_for, new_rows
from bestrq2.data.lengths import recording_lengths
from bestrq2.data.mixture import MixtureRows, MixtureSource
from bestrq2.data.order import BatchSchedule, CropKey, sample_order
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.rejections import Shorter
from bestrq2.data.rows import BalancedRows, Rows, SegmentRows, SortedOrder
from bestrq2.data.segments import Crops, Segment, Segments
from bestrq2.data.shards.remote import FetchAhead
from bestrq2.data.sources import LoaderError, RemoteShard, Source, split_source
from bestrq2.data.splits import BalancedSource
from bestrq2.data.waveforms import put_samples, to_float32
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.model.fields import ModelFields
from bestrq2.seeding import generator

__all__ = [
    "AudioBatch",
    "end_workers",
    "fixed_batches",
    "fixed_crops",
    "fixed_rows",
    "packed_batches",
    "split_source",
    "training_batches",
    "training_rows",
]

logger = logging.getLogger(__name__)

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

    def _shards(self, _epoch: int, recording: int) -> Iterator[RemoteShard]:
        shard = self.source.remote_shard(recording)
        if shard is not None:
            yield shard

    def __iter__(self) -> Iterator[list[CropKey]]:
        if not self.source.is_remote():
            yield from super().__iter__()
            return
        # Runs in the main process, from the first batch on: after the workers were forked.
        start = self.start_step * self.batch_size
        ahead = FetchAhead(self.source.order(self.seed), self._shards, start)
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


def training_rows(source: Source, fields: ModelFields, seed: int) -> Rows:
    """Rows of clips in which all of a source is heard once an epoch, and the facts about them.

    Lengths of recordings that are not known beforehand are measured, which takes a while the first time.

    Args:
        source: audio to draw from.
        fields: fields of the model, which say how long clips may be.
        seed: random seed of order, cuts and places, 0 or more.

    Raises:
        ConfigError: a negative seed.
        DataError: there are no recordings, or not one of them can be used.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or more.")
    if len(source) == 0:
        raise DataError(f"{source.name} holds no recordings.")
    if isinstance(source, MixtureSource):
        own = source.seeds(seed)
        rows = [training_rows(*each) for each in zip(source.components, [fields] * len(own), own, strict=True)]
        return MixtureRows(rows, source.starts, source.weights, seed)
    lengths = recording_lengths(source, fields.sampling_rate)
    segments: Segments
    rejected: list[tuple[str, str]] = []
    if lengths is None:
        if os.environ.get("RANK", "0") == "0":
            logger.info("%s: lengths are not known before its tars are fetched: one crop per recording", source.name)
        segments = Crops(len(source), fields.max_samples)
    else:
        segments = Segments(lengths.samples, fields.max_samples, fields.min_training_samples, seed)
        for index in np.flatnonzero(np.diff(segments.firsts) == 0).tolist():
            problem = lengths.problems.get(index) or too_short(int(lengths.samples[index]), fields)
            rejected.append((source.describe(index), problem))
        if not len(segments):
            raise _all_rejected(source, len(source), rejected[0])
    if isinstance(source, BalancedSource):
        return BalancedRows(source.probabilities, segments, fields, seed, rejected=rejected)
    return SegmentRows(segments, fields, seed, source.parts(), rejected)


def packed_batches(
    source: Source,
    rows: Rows,
    fields: ModelFields,
    *,
    seed: int,
    batch_rows: int,
    start_step: int = 0,
    num_workers: int = 0,
    draw_mask: DrawPackedMask | None = None,
    max_steps: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    batches_per_step: int = 1,
) -> DataLoader[Any]:
    """Batches of rows in the order of training; any number of workers and processes gives the same ones.

    Args:
        source: audio to draw from.
        rows: its rows, as by `training_rows`.
        fields: fields of the model.
        seed: random seed, the same as that of the rows.
        batch_rows: rows of the global batch, over all processes.
        start_step: first step; a resumed run gives the number of steps done.
        num_workers: processes that decode; 0 decodes in this one.
        draw_mask: function that draws the hidden patches; None leaves that to the model. Picklable where workers are
            spawned (macOS).
        max_steps: step before which to stop; None for never.
        rank: number of this process; it gets the places that leave this remainder when divided by `world_size`.
        world_size: number of processes.
        batches_per_step: batches whose gradients are accumulated; where batches are made by length, all of these have
            about the same.

    Returns:
        A loader of `AudioBatch`; see `end_workers`.

    Raises:
        ConfigError: sizes or numbers that are impossible together.
    """
    make_order: Callable[[], Any] = rows.order
    if rows.by_length:
        make_order = partial(SortedOrder, rows, batch_rows * batches_per_step, seed)
    schedule = _RowSchedule(source, rows, make_order, batch_rows, start_step, max_steps, rank, world_size)
    return DataLoader(
        RowDataset(source, rows, fields, seed, draw_mask),
        batch_sampler=schedule,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        **worker_settings(num_workers, batch_rows // world_size * rows.samples),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class _RowSchedule(BatchSchedule):
    """A schedule of rows that has remote shards fetched before they are due.

    Args:
        source: audio to draw from.
        rows: its rows.
        make_order: makes the order of the rows.
        *share: see `BatchSchedule`.
    """

    def __init__(self, source: Source, rows: Rows, make_order: Callable[[], Any], *share: Any) -> None:
        self.source, self.rows, self.make_order = source, rows, make_order
        super().__init__(make_order(), *share)

    def _shards(self, epoch: int, row: int) -> Iterator[RemoteShard]:
        for segment in self.rows.segments(epoch, row):
            if (shard := self.source.remote_shard(segment.recording)) is not None:
                yield shard

    def __iter__(self) -> Iterator[list[CropKey]]:
        if not self.source.is_remote():
            yield from super().__iter__()
            return
        # Runs in the main process, from the first batch on: after the workers were forked.
        ahead = FetchAhead(self.make_order(), self._shards, self.start_step * self.batch_size)
        try:
            for keys in super().__iter__():
                ahead.advance(keys[-1].step * self.batch_size)
                yield keys
        finally:
            ahead.end()


class RowDataset(Dataset[AudioBatch]):
    """Batches of rows of a source, looked up by the keys of their rows.

    A segment that cannot be used leaves its place in the row empty, and is listed in the batch. Everything is a
    function of (seed, epoch, row).

    Args:
        source: audio to draw from.
        rows: its rows.
        fields: fields of the model.
        seed: random seed of the crops of recordings of unknown length.
        draw_mask: function that draws the hidden patches; None leaves that to the model.
    """

    def __init__(
        self, source: Source, rows: Rows, fields: ModelFields, seed: int, draw_mask: DrawPackedMask | None = None
    ) -> None:
        self.source, self.rows, self.fields, self.seed, self.draw_mask = source, rows, fields, seed, draw_mask
        # Recordings of which nothing is usable: known ones are not opened again. The outcome is the same either way.
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: CropKey) -> AudioBatch:
        """A batch of one row; see `__getitems__`."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[CropKey]) -> AudioBatch:
        """The batch of some rows of one step; each clip is put into its row while it is in the processor's caches.

        Raises:
            AllRejectedError: every recording, or 1000 clips in a row, are unusable.
        """
        keys = [CropKey(*key) for key in keys]
        writer = row_writer(self.rows, self.fields, [key.recording for key in keys])
        recordings: list[str] = []
        rejected: list[tuple[str, str]] = []
        with shorter_files() as shorter:
            for number, key in enumerate(keys):
                for segment in self.rows.segments(key.epoch, key.recording):
                    clip = self._read(key.epoch, segment)
                    name = self.source.describe(segment.recording)
                    if isinstance(clip, str):
                        rejected.append((name, clip))
                        continue
                    writer.add(number, clip)
                    recordings.append(name)
        if not recordings:
            self._check_others(keys[-1], rejected)
        batch = writer.batch(keys[0].step, [key.place for key in keys], recordings)
        batch.rejected, batch.shorter = rejected, list(shorter)
        if self.draw_mask is not None:
            assert batch.packing is not None
            batch.hidden_mask = self.draw_mask(batch.packing.segments, batch.step, batch.places)
        return batch

    def _check_others(self, key: CropKey, rejected: list[tuple[str, str]]) -> None:
        """Check that one of the rows that follow a row has a usable clip.

        Raises:
            AllRejectedError: none has, or not one in 1000 clips.
        """
        tried = len(rejected)
        for row in range(key.recording + 1, key.recording + len(self.rows)):
            for segment in self.rows.segments(key.epoch, row % len(self.rows)):
                if tried >= MAX_TRIES:
                    raise _all_rejected(self.source, tried, rejected[0])
                if not isinstance(self._read(key.epoch, segment), str):
                    return
                tried += 1
        raise _all_rejected(self.source, len(self.source), rejected[0])

    def _read(self, epoch: int, segment: Segment) -> np.ndarray | str:
        """A clip, or the reason why there is none."""
        index, start, rate = segment.recording, segment.start, self.fields.sampling_rate
        if index in self._unreadable:
            return self._unreadable[index]
        try:
            if start is None:
                rng = generator(CROP, self.seed, epoch, index)
                clip = self.source.read(index, rate, rng, self.fields.max_seconds)
            else:
                clip = self.source.segment(index, start, segment.samples, rate)
            if len(clip) < self.fields.min_training_samples:
                raise AudioError(too_short(len(clip), self.fields))
            return clip
        except AudioError as error:
            reason = rejection(self.source, index, error)
            if isinstance(error, UnreadableAudioError):
                self._unreadable[index] = reason
                return reason
            return f"from {start / rate:g} s on: {reason}" if start else reason


def too_short(samples: int, fields: ModelFields) -> str:
    """Reason for rejecting a clip of too few samples."""
    rate = fields.sampling_rate
    return f"is too short: {samples / rate:.2f} s, the model needs {fields.min_training_samples / rate:.2f} s."


def _all_rejected(source: Source, tried: int, first: tuple[str, str]) -> AllRejectedError:
    """The error for a source of which nothing is usable."""
    which = "its only recording was" if len(source) == 1 else f"all {tried} recordings were"
    if tried == MAX_TRIES:
        which = f"{tried:,} clips in a row were"
    name, reason = first
    return AllRejectedError(f"{source.name}: {which} rejected; first: {name}: {reason}")


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
