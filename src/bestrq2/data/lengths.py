"""Lengths of all recordings of a source: known beforehand, or measured once, in parallel, and kept in a table.

The table is a Parquet file for each source, in the folder `lengths` of the cache: path, size and time of change of each
file, and its samples and rate, or why it cannot be used. A file that has changed is measured again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bestrq2.child_processes import available_cpus
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.sources import Source, Stamp
from bestrq2.data.spans import Span, Task, WorkerPool, reason_of
from bestrq2.errors import AudioError, ConfigError
from bestrq2.files import cache_folder, folder_lock, whole_file
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    {
        "path": pa.large_binary(),
        "size": pa.int64(),
        "changed_ns": pa.int64(),
        "samples": pa.int64(),
        "rate": pa.int64(),
        "problem": pa.large_string(),
    }
)
_FACTS = ("samples", "rate", "problem")
# Fewer recordings are measured before worker processes would have started.
_FEW = 64
# A measurement that is interrupted loses no more than this.
_SAVE_SECONDS = 60.0
# Time between two looks whether another process has finished measuring.
_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Lengths:
    """Lengths of the recordings of a source.

    Attributes:
        samples: int64 [recordings], at the wanted rate; 0 where a recording cannot be used.
        problems: reasons why recordings cannot be used, by their numbers.
    """

    samples: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)


def recording_lengths(source: Source, sampling_rate: int) -> Lengths | None:
    """Lengths of all recordings; None if some are in remote tars whose index does not tell them.

    Args:
        source: the recordings.
        sampling_rate: rate in Hz at which samples are counted.
    """
    frames, rates = source.lengths()
    unknown = np.flatnonzero(frames < 0)
    if source.is_remote() and any(source.remote_shard(int(index)) for index in unknown):
        return None
    problems: dict[int, str] = {}
    if len(unknown):
        frames, rates = frames.copy(), rates.copy()
        for index, found in zip(unknown.tolist(), _measured(source, unknown), strict=True):
            frames[index], rates[index] = found.samples, found.rate
            if found.problem:
                problems[index] = found.problem
    for index in np.flatnonzero(frames == 0).tolist():
        if index not in problems:
            problems[index] = _measure(source, index).problem or "holds no samples."
    # As `usable_span` counts them.
    return Lengths(frames * sampling_rate // np.maximum(rates, 1), problems)


class _Found(NamedTuple):
    """Length of a recording, or why it cannot be used, and whether that will be so the next time."""

    samples: int
    rate: int
    problem: str = ""
    lasts: bool = True


def _measure(source: Source, index: int) -> _Found:
    try:
        with source.opened(index) as decoder:
            return _Found(decoder.measure(), decoder.rate)
    except AudioError as error:
        problem = reason_of(error, source.describe(index))
        return _Found(0, 0, problem, isinstance(error, UnreadableAudioError))


def _measured(source: Source, indices: np.ndarray) -> list[_Found]:
    """Lengths from the table, or measured and added to it."""
    with Progress("lengths", len(indices), "files looked up", leave=False) as progress:
        stamps = []
        for index in indices.tolist():
            stamps.append(source.stamp(index))
            progress.advance()
    if None in stamps:
        return list(_measure_all(source, indices))
    table = _Table(source.name, [stamp for stamp in stamps if stamp is not None])
    if len(table.missing()):
        with table.held():
            missing = table.missing()  # another process may have measured them meanwhile
            saved = time.monotonic()
            try:
                for place, found in zip(missing.tolist(), _measure_all(source, indices[missing]), strict=True):
                    table.found[place] = found
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        table.save()
                        saved = time.monotonic()
            finally:
                table.save()
    return [found for found in table.found if found is not None]


def _measure_all(source: Source, indices: np.ndarray) -> Iterator[_Found]:
    with Progress("lengths", len(indices), "recordings", leave=False) as progress, ExitStack() as stack:
        found: Iterator[_Found] = (_measure(source, int(index)) for index in indices)
        if len(indices) >= _FEW:
            pool = WorkerPool(partial(_measure_span, source), available_cpus(), source.describe)
            in_order = stack.enter_context(pool).in_order
            found = (span.content for span in in_order(Task(int(index)) for index in indices))
        for one in found:
            yield one
            progress.advance()


def _measure_span(source: Source, task: Task) -> Span:
    return Span(task.recording, 0, "", content=_measure(source, task.recording))


class _Table:
    """Lengths of recordings of one source, as measured in this and earlier runs.

    Args:
        name: name of the source.
        stamps: stamps of the recordings.

    Attributes:
        found: length of each recording, None where it is not known yet.
    """

    def __init__(self, name: str, stamps: Sequence[Stamp]) -> None:
        digest = hashlib.blake2b(os.fsencode(name), digest_size=12).hexdigest()
        self.path = cache_folder() / "lengths" / digest / "lengths.parquet"
        paths = [path.encode("utf-8", "surrogateescape") for path, _, _ in stamps]
        self._paths = pa.array(paths, pa.large_binary())
        self._sizes = np.array([size for _, size, _ in stamps], np.int64)
        self._changed = np.array([changed for _, _, changed in stamps], np.int64)
        self.found: list[_Found | None] = [None] * len(stamps)

    def missing(self) -> np.ndarray:
        """Places of the recordings that neither `found` nor the stored table has, int64."""
        stored = self._stored()
        rows = pc.fill_null(pc.index_in(self._paths, value_set=stored["path"]), -1).to_numpy()
        places = np.flatnonzero(rows >= 0)
        rows = rows[places]
        same = (stored["size"].to_numpy()[rows] == self._sizes[places]) & (
            stored["changed_ns"].to_numpy()[rows] == self._changed[places]
        )
        columns = [stored[name].take(pa.array(rows[same])).to_pylist() for name in _FACTS]
        for place, *facts in zip(places[same].tolist(), *columns, strict=True):
            self.found[place] = _Found(*facts)
        return np.array([place for place, found in enumerate(self.found) if found is None], np.int64)

    def _stored(self) -> pa.Table:
        try:
            return pq.read_table(self.path, schema=_SCHEMA)
        except (OSError, pa.ArrowException):  # none yet, or damaged: measured anew
            return _SCHEMA.empty_table()

    def save(self) -> None:
        """Write what was found, and what the stored table has on other recordings."""
        facts = {place: found for place, found in enumerate(self.found) if found is not None and found.lasts}
        known = np.array(list(facts), np.int64)
        paths = self._paths.take(pa.array(known))
        columns = {name: [getattr(found, name) for found in facts.values()] for name in _FACTS}
        new = pa.table(
            {"path": paths, "size": self._sizes[known], "changed_ns": self._changed[known], **columns}, schema=_SCHEMA
        )
        stored = self._stored()
        others = stored.filter(pc.invert(pc.is_in(stored["path"], value_set=paths)))
        try:
            with whole_file(self.path) as temporary:
                pq.write_table(pa.concat_tables([others, new]), temporary)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); the next run measures again", self.path, error.strerror)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes waiting while recordings are measured, so that each is measured once."""
        with ExitStack() as stack:
            with suppress(OSError):  # a folder that cannot be written; `save` warns of it
                self.path.parent.mkdir(parents=True, exist_ok=True)
            while self.path.parent.is_dir():
                try:
                    stack.enter_context(folder_lock(self.path.parent))
                    break
                except ConfigError:
                    time.sleep(_WAIT_SECONDS)
                except OSError:
                    break
            yield
