"""Jobs on a corpus and the ledger of their finished parts: what a killed job leaves, and what processes share."""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from bestrq2.data.rejections import Shorter
from bestrq2.data.spans import Position, Span, Stretch, Task
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import folder_lock, whole_file

BLOCK = 64
"""Neighbouring recordings that are handed out together; no part extends over the end of a block."""

PART_SECONDS = 1800.0
"""Audio in a part (s): a kill loses at most one part."""

_ROW_GROUP_BYTES = 32_000_000
_PART_NAME = re.compile(r"part-(\d+)\.(\d+)-(\d+)\.(\d+)\.parquet")

Result = TypeVar("Result")


class Process(NamedTuple):
    """One of several processes that share a corpus, as numbered by torchrun.

    Attributes:
        rank: number of the process.
        world_size: number of processes.
        local_rank: number of the process on its machine.
        local_world_size: number of processes on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


ALONE = Process()


@dataclass(frozen=True)
class Part:
    """Results for neighbouring recordings.

    Attributes:
        start: position of the first span.
        stop: position after the last span.
        rows: results in the order of the recordings.
        rejected: (path, reason) of recordings without results.
        seconds: duration of the audio.
        recordings: number of recordings, in which a span counts as its share.
        shorter: recordings that end before their header promised.
    """

    start: Position
    stop: Position
    rows: pa.Table
    rejected: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    recordings: float = 0.0
    shorter: list[Shorter] = field(default_factory=list)


def part_of(spans: list[Span], rows: pa.Table, rejected: list[tuple[str, str]]) -> Part:
    """Part of complete spans with their results."""
    seconds, recordings = sum(span.seconds for span in spans), sum(1 / span.spans for span in spans)
    shorter = [span.shorter for span in spans if span.shorter]
    return Part(spans[0].start, spans[-1].stop, rows, rejected, seconds, recordings, shorter)


class CorpusJob(ABC):
    """Work on every recording of a corpus, defined span by span.

    Attributes:
        identity: everything that the results depend on, as text: source, options, model, version.
        read: reads a task in worker processes; picklable.
        block: recordings that are handed out together.
        streams_long: whether `long_part` processes recordings of several spans, instead of `part`.
    """

    identity: dict[str, str]
    read: Callable[[Task], Span]
    block: int | None = None
    streams_long = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of recordings."""

    @abstractmethod
    def describe(self, recording: int) -> str:
        """Description of a recording for messages."""

    @abstractmethod
    def part(self, spans: list[Span]) -> Part:
        """Part of neighbouring spans."""

    def long_part(self, first: Span, following: Iterator[Span]) -> Part:
        """Part of one long recording; takes exactly the rest of its spans from `following`."""
        raise NotImplementedError

    def parts(self, spans: Iterable[Span]) -> Iterator[Part]:
        """Parts of a stream of spans: each ends at the end of a block or after half an hour of audio."""
        coming, waiting = iter(spans), list[Span]()
        for span in coming:
            if self.streams_long and not span.is_last:
                if waiting:
                    yield self.part(waiting)
                    waiting = []
                yield self.long_part(span, coming)
                continue
            waiting.append(span)
            block_ends = span.is_last and (span.recording + 1) % (self.block or BLOCK) == 0
            if block_ends or sum(one.seconds for one in waiting) >= PART_SECONDS:
                yield self.part(waiting)
                waiting = []
        if waiting:
            yield self.part(waiting)

    def blocks(self, process: Process) -> Iterator[range]:
        """Blocks of recordings that belong to a process, dealt out in turn."""
        size = self.block or BLOCK
        for start in range(process.rank * size, len(self), process.world_size * size):
            yield range(start, min(start + size, len(self)))


class PartsFolder:
    """Ledger of finished parts: a folder of Parquet files, each named by the positions it covers.

    A part is written whole or not at all, so the names alone record what is finished.

    Args:
        path: the folder; it exists only while there are parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self, rank: int) -> Iterator[None]:
        """Create the folder and keep other processes of the same rank away until the block ends.

        Raises:
            ConfigError: the folder cannot be created, or another process of this rank uses it.
        """
        # Hidden, so that an output inside its own source does not add to that.
        own = self.path / f".process-{rank}"
        try:
            own.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError) as error:
            raise ConfigError(f"{own}: cannot be created ({error.strerror}); name another --output") from error
        try:
            with folder_lock(own):
                yield
        finally:
            with suppress(OSError):  # still used by another process, or parts remain
                own.rmdir()
                self.path.rmdir()

    def finished(self) -> dict[Position, Position]:
        """Start and stop of every finished part; of parts with the same start the longest."""
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        found: dict[Position, Position] = {}
        for match in filter(None, map(_PART_NAME.fullmatch, names)):
            first, span, last, end = map(int, match.groups())
            found[first, span] = (last, end)  # sorted by name, so the longest of one start is the last
        return found

    def missing(self, blocks: Iterable[range]) -> list[Stretch]:
        """Stretches of some blocks of recordings that still have to be done; what follows a gap is done again."""
        finished = self.finished()
        stretches = []
        for block in blocks:
            *_, (_, position) = [((0, 0), (block.start, 0)), *chained(finished, (block.start, 0), block.stop)]
            if position[0] < block.stop:
                stretches.append(Stretch(position, block.stop))
        return stretches

    def check(self, identity: Mapping[str, str]) -> None:
        """Check that the parts have this identity.

        Raises:
            ConfigError: they were made with something else, which is named.
        """
        # All parts were checked when they were written, so one is enough.
        for start, stop in list(self.finished().items())[:1]:
            found = read_identity(self._file(start, stop)) or {}
            if different := [name for name, value in identity.items() if found.get(name) != value]:
                raise ConfigError(
                    f"{self.path}: holds parts of another model, source or other options (different: "
                    f"{', '.join(different)}); delete it or name another --output"
                )

    def write(self, part: Part, identity: Mapping[str, str]) -> None:
        """Add a part; identity and lists of recordings are kept in its metadata."""
        lists = {"rejected": json.dumps(part.rejected), "shorter": json.dumps(part.shorter)}
        schema = part.rows.schema.with_metadata({**identity, **lists})
        # A reader holds one row group at a time.
        group = max(1, _ROW_GROUP_BYTES * max(1, len(part.rows)) // max(1, part.rows.nbytes))
        with whole_file(self._file(part.start, part.stop)) as temporary:
            pq.write_table(part.rows.cast(schema), temporary, row_group_size=group)

    def read(self, start: Position, stop: Position) -> Part:
        """A finished part.

        Raises:
            DataError: it is damaged.
        """
        path = self._file(start, stop)
        try:
            table = pq.read_table(path)
            rejected = [(name, reason) for name, reason in json.loads(table.schema.metadata[b"rejected"])]
            shorter = [Shorter(*one) for one in json.loads(table.schema.metadata.get(b"shorter", b"[]"))]
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: is damaged; delete it and run the same command again") from error
        return Part(start, stop, table.replace_schema_metadata(None), rejected, shorter=shorter)

    def read_all(self, blocks: Iterable[range]) -> Iterator[Part]:
        """All parts in the order of the source, one in memory at a time; `missing` must be empty."""
        finished = self.finished()
        for block in blocks:
            for start, stop in chained(finished, (block.start, 0), block.stop):
                yield self.read(start, stop)

    def join_once(
        self, blocks: Iterable[range], is_joined: Callable[[], bool], join: Callable[[], Result]
    ) -> Result | None:
        """Join all parts of some blocks, unless one is missing or another process joins or joined them (None)."""
        with ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(self.path))
            except (ConfigError, FileNotFoundError):
                return None
            return None if is_joined() or self.missing(blocks) else join()

    def delete(self) -> None:
        """Delete the folder with all parts."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, start: Position, stop: Position) -> Path:
        return self.path / f"part-{start[0]:012d}.{start[1]:06d}-{stop[0]:012d}.{stop[1]:06d}.parquet"


def chained(finished: Mapping[Position, Position], start: Position, stop: int) -> Iterator[tuple[Position, Position]]:
    """Finished parts that follow each other without a gap, from a position to before the recording `stop`."""
    while start in finished and start[0] < stop:
        yield start, finished[start]
        start = finished[start]


def read_identity(path: Path) -> dict[str, str] | None:
    """Identity in the metadata of a Parquet file; None for a file of another kind."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    return {key.decode(): value.decode("utf-8", "replace") for key, value in metadata.items()}
