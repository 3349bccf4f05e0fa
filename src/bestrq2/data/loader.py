"""Batches for training: rows of clips made by worker processes, as a pure function of (seed, step, place).

Workers, processes and resumption change nothing: the schedule says which rows belong into each batch, and each row is
made from its key alone.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bestrq2.child_processes import end_with_parent
from bestrq2.data.audio import errors_named, shorter_files
from bestrq2.data.batch import AudioBatch, DrawMask, row_writer
from bestrq2.data.batch_memory import BatchMemory, memory_for
from bestrq2.data.lengths import recording_lengths
from bestrq2.data.mixture import MixtureRows, MixtureSource
from bestrq2.data.order import BatchSchedule, Order, RowKey, sample_order
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.rejections import Shorter
from bestrq2.data.rows import BalancedRows, Crops, Rows, Segment, SegmentRows, Segments, SortedOrder
from bestrq2.data.shards.remote import FetchAhead
from bestrq2.data.sources import LoaderError, RemoteShard, Source
from bestrq2.data.splits import BalancedSource
from bestrq2.data.waveforms import to_float32
from bestrq2.errors import AudioError, DataError
from bestrq2.model.fields import ModelFields
from bestrq2.progress import Progress, is_first_process
from bestrq2.seeding import generator

logger = logging.getLogger(__name__)

MAX_TRIES = 1000
# First words of seed sequences, so that these share no random numbers with others.
CROP, FIXED = 0xC409, 0xF18ED


class AllRejectedError(LoaderError):
    """No recording of a source is usable."""


def training_rows(source: Source, fields: ModelFields, seed: int) -> Rows:
    """Rows of clips in which all of a source is heard once an epoch, and the facts about them.

    Lengths of recordings that are not known beforehand are measured, which takes a while the first time.

    Args:
        source: audio to draw from.
        fields: fields of the model, which say how long clips may be.
        seed: random seed of order, cuts and places, 0 or more.

    Raises:
        DataError: there are no recordings, or not one of them can be used.
    """
    if len(source) == 0:
        raise DataError(f"{source.name} holds no recordings.")
    if isinstance(source, MixtureSource):
        own = source.seeds(seed)
        rows = [training_rows(*each) for each in zip(source.components, [fields] * len(own), own, strict=True)]
        return MixtureRows(rows, source.starts, source.weights, seed)
    lengths = recording_lengths(source, fields.sampling_rate)
    segments: Segments
    rejected: list[tuple[int, str]] = []
    if lengths is None:
        if is_first_process():
            logger.info("%s: lengths are not known before its tars are fetched: one crop per recording", source.name)
        segments = Crops(len(source), fields.max_samples)
    else:
        segments = Segments(lengths.samples, fields.max_samples, fields.min_training_samples, seed)
        for index in np.flatnonzero(np.diff(segments.firsts) == 0).tolist():
            problem = lengths.problems.get(index) or _too_short(int(lengths.samples[index]), fields)
            rejected.append((index, problem))
        if not len(segments):
            raise _all_rejected(source, _every(source), *rejected[0])
    named = [(source.describe(index), problem) for index, problem in rejected]
    if isinstance(source, BalancedSource):
        return BalancedRows(source.probabilities, segments, fields, seed, rejected=named)
    return SegmentRows(segments, fields, seed, source.parts(), named)


def training_batches(
    source: Source,
    rows: Rows,
    fields: ModelFields,
    *,
    seed: int,
    batch_rows: int,
    start_step: int = 0,
    num_workers: int = 0,
    draw_mask: DrawMask | None = None,
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
    """
    make_order: Callable[[], Order] = rows.order
    if rows.by_length:
        make_order = partial(SortedOrder, rows, batch_rows * batches_per_step, seed)
    schedule = _RowSchedule(source, rows, make_order, batch_rows, start_step, max_steps, rank, world_size)
    return DataLoader(
        RowDataset(source, rows, fields, seed, draw_mask),
        batch_sampler=schedule,
        collate_fn=as_it_is,
        pin_memory=torch.cuda.is_available(),
        **worker_settings(num_workers, batch_rows // world_size * rows.samples),
    )


def as_it_is(batch: Any) -> Any:
    """The batch: `RowDataset` has made all of it."""
    return batch


class _RowSchedule(BatchSchedule):
    """A schedule of rows that has remote shards fetched before they are due.

    Args:
        source: audio to draw from.
        rows: its rows.
        make_order: makes the order of the rows.
        *share: see `BatchSchedule`.
    """

    def __init__(self, source: Source, rows: Rows, make_order: Callable[[], Order], *share: Any) -> None:
        self.source, self.rows, self.make_order = source, rows, make_order
        super().__init__(make_order(), *share)

    def _shards(self, epoch: int, row: int) -> Iterator[RemoteShard]:
        for segment in self.rows.segments(epoch, row):
            if (shard := self.source.remote_shard(segment.recording)) is not None:
                yield shard

    def __iter__(self) -> Iterator[list[RowKey]]:
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
        self, source: Source, rows: Rows, fields: ModelFields, seed: int, draw_mask: DrawMask | None = None
    ) -> None:
        self.source, self.rows, self.fields, self.seed, self.draw_mask = source, rows, fields, seed, draw_mask
        # Recordings of which nothing is usable: known ones are not opened again. The outcome is the same either way.
        self._unreadable: dict[int, str] = {}
        # Rows of sources of which something is usable.
        self._usable: set[range] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: RowKey) -> AudioBatch:
        """A batch of one row; see `__getitems__`."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[RowKey]) -> AudioBatch:
        """The batch of some rows of one step; each clip is put into its row while it is in the processor's caches.

        Raises:
            AllRejectedError: every recording, or 1000 clips in a row, are unusable.
        """
        keys = [RowKey(*key) for key in keys]
        writer = row_writer(self.rows, self.fields, [key.row for key in keys])
        recordings: list[str] = []
        rejected: list[tuple[str, str]] = []
        with shorter_files() as shorter:
            for number, key in enumerate(keys):
                for segment in self.rows.segments(key.epoch, key.row):
                    clip = self._read(key.epoch, segment)
                    name = self.source.describe(segment.recording)
                    if isinstance(clip, str):
                        rejected.append((name, clip))
                        continue
                    writer.add(number, clip)
                    recordings.append(name)
                if not writer.counts[number]:
                    self._check_others(key)
        batch = writer.batch(keys[0].step, [key.place for key in keys], recordings)
        batch.rejected, batch.shorter = rejected, list(shorter)
        if self.draw_mask is not None:
            batch.hidden_mask = self.draw_mask(batch.packing.segments, batch.step, batch.places)
        return batch

    def _check_others(self, key: RowKey) -> None:
        """Check that a row without a usable clip is not one of many.

        Raises:
            AllRejectedError: no clip of the same source is usable, or not one of the next 1000.
        """
        own = self.rows.of_source(key.row)
        if own in self._usable:
            return
        tried: list[tuple[int, str]] = []
        for row in itertools.chain(range(key.row, own.stop), range(own.start, key.row)):
            for segment in self.rows.segments(key.epoch, row):
                found = self._read(key.epoch, segment)
                if not isinstance(found, str):
                    self._usable.add(own)
                    return
                tried.append((segment.recording, found))
                if len(tried) == MAX_TRIES:
                    raise _all_rejected(self.source, f"{MAX_TRIES:,} clips in a row were", *tried[0])
        raise _all_rejected(self.source, _every({recording for recording, _ in tried}), *tried[0])

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
            check_length(len(clip), self.fields)
            return clip
        except AudioError as error:
            reason = rejection(self.source, index, error)
            if isinstance(error, UnreadableAudioError):
                self._unreadable[index] = reason
                return reason
            return f"from {start / rate:g} s on: {reason}" if start else reason


def check_length(samples: int, fields: ModelFields) -> None:
    """Check that a clip of so many samples is long enough for a model.

    Raises:
        AudioError: it is too short.
    """
    if samples < fields.min_training_samples:
        raise AudioError(_too_short(samples, fields))


def _too_short(samples: int, fields: ModelFields) -> str:
    rate = fields.sampling_rate
    return f"is too short: {samples / rate:.2f} s, the model needs {fields.min_training_samples / rate:.2f} s."


def _every(recordings: Sized) -> str:
    return "its only recording was" if len(recordings) == 1 else f"all {len(recordings):,} recordings were"


def _all_rejected(source: Source, which: str, first: int, reason: str) -> AllRejectedError:
    """The error for a source of which nothing is usable: what was rejected, first of all which recording, and why."""
    return AllRejectedError(f"{source.name}: {which} rejected; first: {source.describe(first)}: {reason}")


def rejection(source: Source, index: int, error: AudioError) -> str:
    """Reason why a recording cannot be used, without its name."""
    return str(error).removeprefix(f"{source.describe(index)}: ")


def numbered_crops(
    source: Source,
    count: int,
    fields: ModelFields,
    *,
    seed: int,
    rejected: list[tuple[str, str]] | None = None,
    shorter: list[Shorter] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Crops for a validation loss or a report, always the same ones, with the numbers of their recordings.

    Args:
        source: audio to draw from.
        count: number of crops, each from another recording.
        fields: fields of the model, which say how long crops may be.
        seed: random seed for choice and position.
        rejected: recordings that cannot be used are added to it, each with the reason.
        shorter: recordings that end before their header promised are added to it.

    Yields:
        Number of the recording, and a waveform float32 [samples]; fewer than `count`, even none, where the source holds
        fewer usable recordings.
    """
    rate, longest, usable = fields.sampling_rate, fields.max_seconds, 0
    for index in map(int, sample_order(FIXED, len(source), seed, source.parts())):
        if usable == count:
            break
        try:
            with errors_named(source.describe(index)), shorter_files() as found:
                crop = source.read(index, rate, generator(FIXED, seed, index), longest)
                check_length(len(crop), fields)
        except AudioError as error:
            if rejected is not None:
                rejected.append((source.describe(index), rejection(source, index, error)))
        else:
            if shorter is not None:
                shorter += found
            usable += 1
            yield index, to_float32(crop)


def fixed_crops(source: Source, count: int, fields: ModelFields, **options: Any) -> list[np.ndarray]:
    """Waveforms of `numbered_crops`."""
    crops: list[np.ndarray] = []
    with Progress("validation clips", min(count, len(source)), "clips", leave=False) as progress:
        for _, crop in numbered_crops(source, count, fields, **options):
            crops.append(crop)
            progress.advance()
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


def worker_settings(num_workers: int, batch_samples: int) -> dict[str, Any]:
    """Keyword arguments of a `DataLoader` that concern its workers.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        batch_samples: samples of the largest `AudioBatch`.
    """
    # Forked workers share arrays in memory and need no import guard in the user's script; they run no torch threads.
    method, memory = "fork" if sys.platform == "linux" else "spawn", None
    if num_workers and method == "fork":
        memory = memory_for(num_workers, _AHEAD, batch_samples * np.dtype(np.float32).itemsize)
    return {
        "num_workers": num_workers,
        "worker_init_fn": partial(_start_worker, memory=memory, parent=os.getpid()),
        "multiprocessing_context": multiprocessing.get_context(method) if num_workers else None,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": _AHEAD if num_workers else None,
    }
