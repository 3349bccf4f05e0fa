"""Index of a shard: where each clip is in the tar, as a pyarrow table kept beside the tar as Parquet.

An index belongs to a tar if both are equal in size and time of change, or if indexing the tar again gives the same
columns; which of the two is newer does not matter, so wrong clocks change nothing.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bestrq2.data.shards.members import PcmLayout
from bestrq2.errors import DataError
from bestrq2.files import whole_file

# Version 1 has the same columns and another checksum, which is not verified.
VERSION, READABLE = "2", ("1", "2")
# By default the metadata may have 100 MB, and Arrow keeps it twice.
_ANY_LENGTH = 2**31 - 1

_WORDS = pa.dictionary(pa.int32(), pa.binary())
SCHEMA = pa.schema(
    {
        "key": pa.large_binary(),
        "suffix": _WORDS,
        "audio_offset": pa.int64(),
        "audio_length": pa.int64(),
        "json_offset": pa.int64(),
        "json_length": pa.int64(),
        "sampling_rate": pa.int32(),
        "frames": pa.int64(),
        "pcm_offset": pa.int64(),
        "problem": _WORDS,
    }
)
NUMBERS = [field.name for field in SCHEMA if pa.types.is_integer(field.type)]


@dataclass(frozen=True)
class Stamp:
    """Size in bytes and time of change in ns, by which a tar is recognised."""

    size: int
    mtime_ns: int


class ShardIndex:
    """Clips of one tar, or of several in a row, as columns [clips]; no object per clip, so millions are cheap.

    Args:
        table: columns of `SCHEMA`. Names and words are bytes, since names in a tar need not be UTF-8.
        stamp: size and time of the tar it was made from.
        extra: further texts of the writer of the tar.

    Attributes:
        audio_offset: int64, start of the audio member's content, in bytes from the tar's beginning.
        audio_length: int64, its length in bytes.
        json_offset: int64, likewise of the clip's JSON; 0 where it has none.
        json_length: int64.
        sampling_rate: int32, Hz, of plain 16-bit mono PCM; 0 for other audio.
        frames: int64, number of its samples; 0 for other audio.
        pcm_offset: int64, start of the first sample, in bytes from the tar's beginning; 0 for other audio.
        suffix: int32, suffix of the name, as a place in `suffixes`.
        suffixes: such as "wav".
        problem: int32, why the clip cannot be used, as a place in `problems`; 0 for clips that can.
        problems: reasons; the first is "".
    """

    audio_offset: np.ndarray
    audio_length: np.ndarray
    json_offset: np.ndarray
    json_length: np.ndarray
    sampling_rate: np.ndarray
    frames: np.ndarray
    pcm_offset: np.ndarray

    def __init__(self, table: pa.Table, stamp: Stamp = Stamp(0, 0), extra: dict[str, str] | None = None) -> None:
        self.table = table.select(SCHEMA.names).cast(SCHEMA).unify_dictionaries().combine_chunks()
        self.stamp, self.extra = stamp, extra or {}
        for name in NUMBERS:
            setattr(self, name, _array(self.table, name).to_numpy())
        self._keys = _array(self.table, "key")
        self.suffix, self.suffixes = _coded(_array(self.table, "suffix"))
        self.problem, self.problems = _coded(_array(self.table, "problem"))
        self._checksum: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.table, self.stamp, self.extra)

    def __len__(self) -> int:
        """Number of clips, usable or not."""
        return len(self._keys)

    def key(self, clip: int) -> str:
        """Name of a clip without its suffix; bytes that are not UTF-8 as lone surrogates."""
        return str(self._keys[clip].as_py().decode("utf-8", "surrogateescape"))

    def member(self, clip: int) -> str:
        """Name of a clip's audio in the tar; its place where the name itself is what is wrong."""
        key = self.key(clip)
        return f"{key}.{self.suffixes[self.suffix[clip]]}" if key else f"member at byte {self.audio_offset[clip]}"

    def damages(self) -> np.ndarray:
        """int64: the entries that stand for a tar, or its rest, that cannot be used; their problem says why."""
        return np.flatnonzero((self.audio_offset == 0) & (self.problem > 0))

    def checksum(self) -> str:
        """Digest of all columns: of everything in the headers of the tar and of its WAVs that reading relies on."""
        if self._checksum is None:
            digest = hashlib.blake2b(digest_size=16)
            for name in SCHEMA.names:
                numeric = name in NUMBERS
                column = _array(self.table, name)
                digest.update(column.to_numpy().tobytes() if numeric else repr(column.to_pylist()).encode())
            self._checksum = digest.hexdigest()
        return self._checksum


def _array(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _coded(column: pa.DictionaryArray) -> tuple[np.ndarray, tuple[str, ...]]:
    words = column.dictionary.to_pylist()
    return column.indices.to_numpy(), tuple(word.decode("utf-8", "surrogateescape") for word in words)


def joined(indices: Sequence[ShardIndex]) -> ShardIndex:
    """One index over several tars in a row; it has no stamp and no extra."""
    return ShardIndex(pa.concat_tables([index.table for index in indices]))


class Span(NamedTuple):
    """A run of bytes in a tar: offset and length; (0, 0) for none."""

    offset: int = 0
    length: int = 0


class IndexRows:
    """An index under construction, clip by clip."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._suffixes: list[bytes] = []
        # The first stands for "no problem" and gets the code 0; it is no row.
        self._problems = [b""]
        self._numbers = array("q")

    def __len__(self) -> int:
        """Clips so far."""
        return len(self._keys)

    def add(
        self,
        key: str,
        suffix: str,
        audio: tuple[int, int],
        metadata: tuple[int, int] = Span(),
        layout: PcmLayout | None = None,
        problem: str = "",
    ) -> None:
        """Add one clip.

        Args:
            key: its name without suffix.
            suffix: suffix without dot.
            audio: offset and length in bytes of its audio in the tar.
            metadata: likewise of its JSON.
            layout: layout of plain 16-bit mono PCM.
            problem: why it cannot be used.
        """
        rate, frames, start = layout or (0, 0, -audio[0])
        self._keys.append(_bytes(key))
        self._suffixes.append(_bytes(suffix))
        self._problems.append(_bytes(problem))
        self._numbers.extend((*audio, *metadata, rate, frames, audio[0] + start))

    def add_damage(self, problem: str) -> None:
        """Add an entry for a tar that cannot be used, or no further: like a clip, at a place where none can be."""
        self.add("", "", Span(), problem=problem)

    def index(self, stamp: Stamp = Stamp(0, 0), extra: dict[str, str] | None = None) -> ShardIndex:
        """The index of all clips so far."""
        numbers = np.array(self._numbers, np.int64).reshape(-1, len(NUMBERS)).T
        columns: dict[str, Any] = dict(zip(NUMBERS, map(np.ascontiguousarray, numbers), strict=True))
        columns["key"] = pa.array(self._keys, pa.large_binary())
        columns["suffix"] = pa.array(self._suffixes, pa.binary()).dictionary_encode()
        columns["problem"] = pa.array(self._problems, pa.binary()).dictionary_encode()[1:]
        return ShardIndex(pa.table(columns), stamp, extra)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index as Parquet, atomically: one row per clip; what concerns the whole tar is in the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {
        "bestrq2.shard_index": VERSION,
        "tar_bytes": str(index.stamp.size),
        "tar_mtime_ns": str(index.stamp.mtime_ns),
        "checksum": index.checksum(),
        "extra": json.dumps(index.extra),
    }
    with whole_file(path) as temporary:
        pq.write_table(index.table.replace_schema_metadata(metadata), temporary)


def read_index(path: Path) -> ShardIndex:
    """Read an index.

    Raises:
        DataError: missing, damaged, or written by a later version.
    """
    try:
        table = pq.read_table(path, thrift_string_size_limit=_ANY_LENGTH, thrift_container_size_limit=_ANY_LENGTH)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        version = metadata.get("bestrq2.shard_index")
        if version not in READABLE:
            raise DataError(f"{path}: is not a shard index of version {VERSION}; remove it, and it is made anew.")
        stamp = Stamp(int(metadata["tar_bytes"]), int(metadata["tar_mtime_ns"]))
        extra = {str(key): str(value) for key, value in json.loads(metadata["extra"]).items()}
        if any(table[name].null_count for name in SCHEMA.names):
            raise ValueError("empty cells")
        index = ShardIndex(table, stamp, extra)
        if version == VERSION and index.checksum() != metadata["checksum"]:
            raise ValueError("checksum")
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a shard index; remove it, and it is made anew.") from error
    return index
