"""Index of a shard: where each clip is in the tar, as a table made from its headers and kept beside it as Parquet.

An index belongs to a tar if both are equal in size and time of change, or if indexing the tar again gives the same
columns; which of the two is newer does not matter, so wrong clocks change nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bestrq2.data.audio import AUDIO_SUFFIXES
from bestrq2.data.shards.members import HEAD_BYTES, BadShardError, BrokenOffError, PcmLayout, members, pcm_layout
from bestrq2.errors import DataError
from bestrq2.files import cache_folder, whole_file
from bestrq2.text import counted

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


logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.parquet"
BAD_NAME = "its name in the tar is not a plain one (absolute, with '..', or with control characters); rename it"
SECOND = "an earlier clip in the tar has the same key; give each a key of its own"


def has_plain_name(key: str) -> bool:
    """Whether a key is a relative path that stays in its folder; nothing here uses it as one, but other tools do."""
    parts = key.replace("\\", "/").split("/")
    return (
        bool(parts[-1])
        and ".." not in parts
        and bool(parts[0])
        and not parts[0].endswith(":")
        and all(ord(letter) >= 32 and ord(letter) != 127 for letter in key)
    )


@contextmanager
def opened_tar(tar: Path) -> Iterator[int]:
    """Descriptor of a tar, closed at the end of the block.

    Raises:
        BadShardError: it is no regular file.
        DataError: the tar is missing or cannot be opened.
    """
    try:
        handle = os.open(tar, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    except FileNotFoundError:
        raise DataError(f"{tar}: the shard does not exist; check the list or pattern that names it.") from None
    except OSError as error:
        raise DataError(f"{tar}: the shard cannot be opened ({error.strerror}).") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadShardError(f"{tar}: is not a tar but a folder, pipe or device.")
        yield handle
    finally:
        os.close(handle)


def stamp_of(handle: int) -> Stamp:
    """Size and time of change of an open file."""
    status = os.fstat(handle)
    return Stamp(status.st_size, status.st_mtime_ns)


def build_index(tar: Path) -> ShardIndex:
    """Build the index of a tar from its headers and those of its WAVs.

    A clip is a member with an audio suffix; its key is its name without that suffix, and its JSON the member of that
    key or, as WebDataset has it, of the key up to its first dot. Hidden members are left out. A second clip of the same
    key, links, sparse members, and names that lead out of the tar are in the index with their problems.

    Raises:
        BadShardError: empty, truncated, damaged, without audio, or not a tar.
        DataError: the tar is missing or cannot be opened.
    """
    index, damage = scan(tar)
    if damage is not None:
        raise damage
    return index


def scan(tar: Path) -> tuple[ShardIndex, BrokenOffError | None]:
    """Index a tar as far as it is whole; also returns the damage after that, if any. See `build_index`.

    If a tar breaks off, the index has the clips before the damage, and then an entry without name and place whose
    problem is the damage.

    Raises:
        BadShardError: empty, without any whole clip, or not a tar.
        DataError: the tar is missing or cannot be opened.
    """
    with opened_tar(tar) as handle:
        stamp = stamp_of(handle)
        found, metadata, damage = _found(tar, handle)
        rows = IndexRows()
        seen: set[str] = set()
        for key, suffix, offset, size, problem in found:
            if not problem:
                problem = SECOND if key in seen else ""
                seen.add(key)
            if not has_plain_name(key):
                key, problem = "", BAD_NAME
            layout = None
            if not problem and suffix.lower() in ("wav", "wave"):
                layout = pcm_layout(os.pread(handle, min(HEAD_BYTES, size), offset), size)
            folder, slash, base = key.rpartition("/")
            general = folder + slash + base.partition(".")[0]
            rows.add(key, suffix, (offset, size), metadata.get(key, metadata.get(general, Span())), layout, problem)
        if damage is not None:
            rows.add_damage(
                f"{problem_of(damage, tar)}; only its {counted(len(found), 'clip')} before that can be used"
            )
        if stamp_of(handle) != stamp:
            raise BadShardError(f"{tar}: the tar changes while it is read; wait until it is whole.")
    return rows.index(stamp), damage


def problem_of(error: BadShardError, tar: str | Path) -> str:
    """The sentence of an error without the tar's name and the full stop."""
    return str(error).removeprefix(f"{tar}: ").removesuffix(".")


def _found(
    tar: Path, handle: int
) -> tuple[list[tuple[str, str, int, int, str]], dict[str, Span], BrokenOffError | None]:
    """Clips of a tar as (key, suffix, offset, size, problem), place of the JSON of each key, and damage."""
    clips: list[tuple[str, str, int, int, str]] = []
    metadata: dict[str, Span] = {}
    others, damage = 0, None
    try:
        for name, offset, size, problem in members(tar, handle):
            key, dot, suffix = name.removeprefix("./").rpartition(".")
            base = key.rpartition("/")[2]
            if not dot or "/" in suffix or not base or (base[0] == "." and not base.startswith("..")):
                others += 1
            elif suffix.lower() == "json":
                metadata.setdefault(key, Span(offset, size))
            elif f".{suffix.lower()}" in AUDIO_SUFFIXES:
                clips.append((key, suffix, offset, size, problem))
            else:
                others += 1
    except BrokenOffError as error:
        if not clips:
            raise
        damage = error
    if not clips:
        count = others + len(metadata)
        what = f"{counted(count, 'member')} and none with an audio suffix" if count else "no members"
        raise BadShardError(f"{tar}: the tar holds {what}; expected .wav, .flac, .mp3 and the like.")
    return clips, metadata, damage


def load_index(tar: Path) -> ShardIndex:
    """Load the index of a tar: the stored one if it belongs to the tar, else a new one, which is stored.

    A stored index belongs to the tar if size and time of change are the same, or if a new index is equal. It is beside
    the tar, or in the cache ($BESTRQ2_CACHE, ~/.cache/bestrq2) if that folder cannot be written. A tar that breaks off
    is indexed as far as it is whole, see `scan`.

    Raises:
        BadShardError: empty, without any whole clip, or not a tar.
        DataError: the tar is missing or cannot be opened.
    """
    with opened_tar(tar) as handle:
        stamp = stamp_of(handle)
    places = _places(tar)
    stored = [index for place in places if (index := stored_index(place)) is not None]
    for index in stored:
        if index.stamp == stamp:
            return index
    index, _ = scan(tar)
    equal = next((old for old in stored if old.checksum() == index.checksum()), None)
    if equal is not None:
        index = ShardIndex(index.table, index.stamp, equal.extra)
    elif stored:
        logger.warning("%s changed since it was indexed: indexed anew", tar)
    _store(index, places)
    return index


def index_path(tar: Path) -> Path:
    """Path of the index beside a tar."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def _places(tar: Path) -> list[Path]:
    digest = hashlib.blake2b(os.fsencode(tar.absolute()), digest_size=16).hexdigest()
    try:
        return [index_path(tar), cache_folder() / "shards" / f"{digest}{INDEX_SUFFIX}"]
    except RuntimeError:  # a user without a home
        return [index_path(tar)]


def stored_index(place: Path) -> ShardIndex | None:
    """Read a stored index; None if it is missing, unreadable or implausible."""
    try:
        index = read_index(place)
    except DataError:
        return None
    spans = (
        (index.audio_offset, index.audio_length),
        (index.json_offset, index.json_length),
        (index.pcm_offset, 2 * index.frames),
    )
    inside = all(
        bool(((offset >= 0) & (length >= 0) & (offset <= index.stamp.size - length)).all()) for offset, length in spans
    )
    return index if inside else None


def _store(index: ShardIndex, places: list[Path]) -> None:
    for place in places:
        try:
            if place is not places[0]:
                place.parent.mkdir(parents=True, exist_ok=True)
            write_index(index, place)
        except OSError as error:
            logger.info("%s: the index cannot be kept there (%s)", place, error.strerror)
        else:
            return
