"""Indexing of tars by their headers, and storage of the indexes."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from bestrq2.data.audio import AUDIO_SUFFIXES
from bestrq2.data.shards.index import IndexRows, ShardIndex, Span, Stamp, read_index, write_index
from bestrq2.data.shards.members import HEAD_BYTES, BadShardError, BrokenOffError, members, pcm_layout
from bestrq2.errors import DataError
from bestrq2.files import cache_folder
from bestrq2.text import counted

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
    digest = blake2b(os.fsencode(tar.absolute()), digest_size=16).hexdigest()
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
