"""The index of a shard: where each clip lies in the tar, as columns, kept beside the tar as Parquet.

Trust is by equality only, never by which is newer: a clock that was wrong, or times in the future, change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bestrq2.errors import DataError
from bestrq2.files import whole_file

VERSION = "1"
# By default the metadata may have 100 MB, and Arrow keeps it twice.
_ANY_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class Stamp:
    """By what a tar is recognised: its size in bytes and time of change in ns."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ShardIndex:
    """Clips of one tar, or of several in a row, as columns [clips]; no object a clip, so millions are cheap.

    Attributes:
        keys: the names of all clips without suffix, one behind the other.
        key_ends: int64 [clips + 1], where each ends in `keys`, behind a 0.
        suffix: int32, which of `suffixes` the name ends in.
        audio_offset: int64, of the audio member's content, in bytes from the tar's beginning.
        audio_length: int64, its bytes.
        json_offset: int64, likewise of the clip's JSON; 0 where it has none.
        json_length: int64.
        sampling_rate: int32, Hz, of plain 16-bit mono PCM; 0 for other audio, of which a decoder tells.
        frames: int64, its samples; 0 for other audio.
        pcm_offset: int64, of the first sample, in bytes from the tar's beginning; 0 for other audio.
        problem: int32, which of `problems` keeps the clip from being used.
        suffixes: such as "wav".
        problems: reasons; the first is "", for none.
        stamp: size and time of the tar it was made from.
        extra: what the writer of the tar adds.
    """

    keys: bytes
    key_ends: np.ndarray
    suffix: np.ndarray
    audio_offset: np.ndarray
    audio_length: np.ndarray
    json_offset: np.ndarray
    json_length: np.ndarray
    sampling_rate: np.ndarray
    frames: np.ndarray
    pcm_offset: np.ndarray
    problem: np.ndarray
    suffixes: tuple[str, ...]
    problems: tuple[str, ...] = ("",)
    stamp: Stamp = Stamp(0, 0)
    extra: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of clips, usable or not."""
        return len(self.audio_offset)

    def key(self, clip: int) -> str:
        """Name of a clip without its suffix; bytes that are not UTF-8 as lone surrogates."""
        return self.keys[self.key_ends[clip] : self.key_ends[clip + 1]].decode("utf-8", "surrogateescape")

    def member(self, clip: int) -> str:
        """Name of a clip's audio in the tar; its place where the name itself is what is wrong."""
        key = self.key(clip)
        return f"{key}.{self.suffixes[self.suffix[clip]]}" if key else f"member at byte {self.audio_offset[clip]}"

    def damages(self) -> np.ndarray:
        """int64: the entries that stand for a tar, or its rest, that cannot be used; their problem says why."""
        return np.flatnonzero((self.audio_offset == 0) & (self.problem > 0))

    def checksum(self) -> str:
        """Digest of all columns: of all that reading relies on in the headers of the tar and of its WAVs."""
        digest = hashlib.blake2b(self.keys, digest_size=16)
        for name, dtype in COLUMNS.items():
            digest.update(np.ascontiguousarray(getattr(self, name), dtype).tobytes())
        digest.update(repr((self.suffixes, self.problems)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


COLUMNS: dict[str, str] = {
    "key_ends": "<i8",
    "suffix": "<i4",
    "audio_offset": "<i8",
    "audio_length": "<i8",
    "json_offset": "<i8",
    "json_length": "<i8",
    "sampling_rate": "<i4",
    "frames": "<i8",
    "pcm_offset": "<i8",
    "problem": "<i4",
}
"""Columns of an index and their types."""
WORDS = {"suffix": "suffixes", "problem": "problems"}
NUMBERS = [name for name in COLUMNS if name not in (*WORDS, "key_ends")]


def joined(indices: Sequence[ShardIndex]) -> ShardIndex:
    """One index over several tars in a row; it has no stamp and no extra."""
    words: dict[str, dict[str, int]] = {"suffixes": {}, "problems": {"": 0}}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in WORDS}
    for index in indices:
        for name, own in WORDS.items():
            places = [words[own].setdefault(word, len(words[own])) for word in getattr(index, own)]
            codes[name].append(np.array(places, np.int32)[getattr(index, name)])
    columns: dict[str, Any] = {name: np.concatenate([getattr(index, name) for index in indices]) for name in NUMBERS}
    columns |= {name: np.concatenate(parts) for name, parts in codes.items()}
    starts = np.cumsum([0, *(len(index.keys) for index in indices)])
    ends = [index.key_ends[1:] + start for index, start in zip(indices, starts, strict=False)]
    return ShardIndex(
        keys=b"".join(index.keys for index in indices),
        key_ends=np.concatenate([np.zeros(1, np.int64), *ends]),
        suffixes=tuple(words["suffixes"]),
        problems=tuple(words["problems"]),
        **columns,
    )


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index as Parquet, atomically: a row a clip, and what concerns the whole tar in the schema's metadata.

    Raises:
        OSError: the file cannot be written.
    """
    ends, keys = pa.py_buffer(np.ascontiguousarray(index.key_ends, "<i8")), pa.py_buffer(index.keys)
    columns = {"key": pa.Array.from_buffers(pa.large_binary(), len(index), [None, ends, keys])}
    for name, words in WORDS.items():
        dictionary = pa.array([word.encode("utf-8", "surrogateescape") for word in getattr(index, words)], pa.binary())
        columns[name] = pa.DictionaryArray.from_arrays(pa.array(getattr(index, name), pa.int32()), dictionary)
    columns |= {name: pa.array(getattr(index, name)) for name in NUMBERS}
    metadata = {
        "bestrq2.shard_index": VERSION,
        "tar_bytes": str(index.stamp.size),
        "tar_mtime_ns": str(index.stamp.mtime_ns),
        "checksum": index.checksum(),
        "words": json.dumps({words: getattr(index, words) for words in WORDS.values()}),
        "extra": json.dumps(index.extra),
    }
    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), temporary)


def read_index(path: Path) -> ShardIndex:
    """Read an index.

    Raises:
        DataError: missing, damaged, or written by another version.
    """
    try:
        table = pq.read_table(path, thrift_string_size_limit=_ANY_LENGTH, thrift_container_size_limit=_ANY_LENGTH)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if metadata.get("bestrq2.shard_index") != VERSION:
            raise DataError(f"{path}: is no shard index of version {VERSION}; remove it, and it is made anew.")
        words: dict[str, Any] = {name: tuple(map(str, of)) for name, of in json.loads(metadata["words"]).items()}
        keys, ends = _letters(table["key"])
        columns = {name: table[name].to_numpy().astype(COLUMNS[name], copy=False) for name in NUMBERS}
        for name, own in WORDS.items():
            place = {word.encode("utf-8", "surrogateescape"): code for code, word in enumerate(words[own])}
            column = table[name].combine_chunks()
            codes = np.array([place[word] for word in column.dictionary.to_pylist()], np.int32)
            columns[name] = codes[column.indices.to_numpy()] if len(codes) else np.zeros(0, np.int32)
        stamp = Stamp(int(metadata["tar_bytes"]), int(metadata["tar_mtime_ns"]))
        extra = {str(key): str(value) for key, value in json.loads(metadata["extra"]).items()}
        index = ShardIndex(keys, ends, stamp=stamp, extra=extra, **columns, **words)
        if index.checksum() != metadata["checksum"]:
            raise ValueError("checksum")
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a shard index; remove it, and it is made anew.") from error
    return index


def _letters(column: pa.ChunkedArray) -> tuple[bytes, np.ndarray]:
    """All values of a binary column one behind the other, and where each ends, behind a 0."""
    array = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in column.chunks]) if column.num_chunks else None
    if array is None or not len(array):
        return b"", np.zeros(1, np.int64)
    _, ends, letters = array.buffers()
    ends = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1]
    return (letters.to_pybytes() if letters is not None else b"")[ends[0] : ends[-1]], ends - ends[0]
