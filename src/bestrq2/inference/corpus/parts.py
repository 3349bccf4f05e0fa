"""The parts of a result that is being made, each a range of recordings: what a kill leaves, and how they are joined."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bestrq2.data.rejections import HEADER, rejection_line
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import folder_lock, whole_file
from bestrq2.inference.corpus.work import Part

_NAME = re.compile(r"part-(\d+)-(\d+)-(\d+)\.parquet")
# Bytes of embeddings in a row group: what a reader holds at once.
_GROUP_BYTES = 32_000_000


class Counts(NamedTuple):
    """What a result holds: recordings embedded and rejected, remote shards that are damaged, and rows."""

    embedded: int
    rejected: int
    damaged_shards: int
    rows: int


def part_name(lane: int, start: int, stop: int) -> str:
    """The file of a part."""
    return f"part-{lane:06d}-{start:012d}-{stop:012d}.parquet"


def read_identity(path: Path) -> dict[str, str] | None:
    """What a Parquet file says it is made from; None for a file of another kind."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    return {key.decode(): value.decode() for key, value in metadata.items() if key != b"rejected"}


class PartsFolder:
    """The folder OUTPUT.parts.

    Every part is named by its range and written whole or not at all, so the names alone say what is done.

    Args:
        output: the result to be.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.parts")
        self.listing = output.with_name(f"{output.name}.rejected.csv")

    @contextmanager
    def held(self, rank: int) -> Iterator[Path]:
        """The folder is there in this block, and this process the only one of its rank that writes to it.

        Yields:
            An empty folder for this process's temporary files.

        Raises:
            ConfigError: the folder cannot be made, or another process of this rank is at work there.
        """
        # Hidden, so that an output within its own source does not add to that.
        own = self.path / f".process-{rank}"
        try:
            own.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError) as error:
            raise ConfigError(f"{own}: cannot be made ({error.strerror}); name another --output") from error
        try:
            with folder_lock(own):
                for stale in own.glob("*.au"):
                    stale.unlink()
                try:
                    yield own
                finally:
                    for stale in own.glob("*.au"):
                        stale.unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # of another process, or of parts that wait
                own.rmdir()
                self.path.rmdir()

    def ranges(self) -> dict[int, list[tuple[int, int]]]:
        """What is done, by lane; see `Ranges`."""
        found: dict[int, list[tuple[int, int]]] = {}
        for lane, start, stop in self._keys():
            found.setdefault(lane, []).append((start, stop))
        return found

    def _keys(self) -> list[tuple[int, int, int]]:
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        matches = filter(None, map(_NAME.fullmatch, names))
        return sorted((int(match[1]), int(match[2]), int(match[3])) for match in matches)

    def check(self, made_by: Mapping[str, str]) -> None:
        """Refuse to go on with parts that are made from something else.

        Raises:
            ConfigError: says what is different.
        """
        for key in self._keys()[:1]:
            found = read_identity(self.path / part_name(*key)) or {}
            if different := [name for name, value in made_by.items() if found.get(name) != value]:
                raise ConfigError(
                    f"{self.path}: holds parts of another model, source or other options (different: "
                    f"{', '.join(different)}); delete it or name another --output"
                )

    def write(self, part: Part, made_by: Mapping[str, str]) -> None:
        """Add a part: its rows and, in the metadata, what it is made from and its rejected recordings."""
        schema = part.rows.schema.with_metadata({**made_by, "rejected": json.dumps(part.rejected)})
        path = self.path / part_name(part.lane, part.start, part.stop)
        with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, use_dictionary=["path"]) as writer:
            writer.write_table(part.rows.cast(schema), row_group_size=_group_rows(schema))

    def delete(self) -> None:
        """Delete the parts."""
        shutil.rmtree(self.path, ignore_errors=True)

    def join(self, schema: pa.Schema, made_by: Mapping[str, str]) -> Counts:
        """Put all parts into the result, in the order of the source, write the list of rejected ones, delete the parts.

        Raises:
            DataError: a part is damaged, or there is not one row; the list is written then too.
        """
        keys = self._keys()
        counts = self._list_rejected(keys)
        if counts.rows:
            numbers = {"embedded": str(counts.embedded), "rejected_count": str(counts.rejected)}
            self._write_joined(keys, schema.with_metadata({**made_by, **numbers}))
        self.delete()
        return counts

    def _list_rejected(self, keys: list[tuple[int, int, int]]) -> Counts:
        recordings = rejected = damaged = rows = 0
        fresh = self.path / "rejected.csv"
        with whole_file(fresh) as temporary, temporary.open("wb") as file:
            file.write(HEADER)
            for lane, start, stop in keys:
                found, count = self._rejected_in((lane, start, stop))
                file.writelines(rejection_line(*one) for one in found)
                recordings, rows = recordings + stop - start, rows + count
                if start == stop:
                    damaged += len(found)
                else:
                    rejected += len(found)
        if rejected or damaged:
            fresh.replace(self.listing)
        else:
            self.listing.unlink(missing_ok=True)  # of an earlier output that was deleted
        return Counts(recordings - rejected, rejected, damaged, rows)

    def _rejected_in(self, key: tuple[int, int, int]) -> tuple[list[tuple[str, str]], int]:
        """Rejected recordings of a part, and the number of its rows."""
        with self._opened(key) as file:
            return json.loads(file.schema_arrow.metadata[b"rejected"]), file.metadata.num_rows

    @contextmanager
    def _opened(self, key: tuple[int, int, int]) -> Iterator[Any]:
        path = self.path / part_name(*key)
        try:
            with pq.ParquetFile(path) as file:
                yield file
        except (pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path}: is damaged; delete it and run the same command again") from error

    def _write_joined(self, keys: list[tuple[int, int, int]], schema: pa.Schema) -> None:
        joined, size = self.path / "joined.parquet", _group_rows(schema)
        with whole_file(joined) as temporary, pq.ParquetWriter(temporary, schema, use_dictionary=["path"]) as writer:
            waiting = schema.empty_table()
            for key in keys:
                with self._opened(key) as file:
                    for batch in file.iter_batches(batch_size=size):
                        rows = pa.Table.from_batches([batch]).cast(schema)
                        waiting = pa.concat_tables([waiting, rows])
                        if len(waiting) >= size:
                            writer.write_table(waiting.slice(0, size).combine_chunks())
                            waiting = waiting.slice(size)
            if len(waiting):
                writer.write_table(waiting.combine_chunks())
        joined.replace(self.output)


def _group_rows(schema: pa.Schema) -> int:
    return max(1, _GROUP_BYTES // (4 * schema.field("embedding").type.list_size))
