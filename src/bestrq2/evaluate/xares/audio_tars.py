"""The tars of a task: found by the harness's patterns, checked before hours are spent on them, and lent by links."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq2.data.shards.members import BadShardError, members
from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import DataError

# What of a tar goes into its fingerprint, at its beginning and at its end.
_ENDS = 1 << 18


@dataclass(frozen=True)
class AudioTars:
    """The audio of one task on disk.

    Attributes:
        paths: of all splits, sorted.
        clips: members with a label.
        digest: changes with the names, sizes, beginnings and ends of the tars.
    """

    paths: tuple[Path, ...]
    clips: int
    digest: str


def find_audio_tars(folder: Path, patterns: Mapping[Any, str], downloaded: bool) -> AudioTars:
    """The tars of a task in its folder, each of which is whole.

    Args:
        folder: such as `env/esc50`.
        patterns: split → the harness's pattern of its tars.
        downloaded: whether they were downloaded here, and so can be again.

    Raises:
        DataError: the folder is missing, a split has no tar, or a tar is truncated or damaged.
    """
    remedy = f"delete {folder} and run the command again to download it anew" if downloaded else "copy them there"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; it should hold {_listed(patterns.values())}")
    found: set[Path] = set()
    for split, pattern in patterns.items():
        matching = _matching(folder, pattern)
        if not matching:
            there = _listed(sorted(path.name for path in folder.glob("*.tar"))) or "no tars at all"
            raise DataError(
                f"{folder}: no tar of the split {split!r}: it should be called {pattern}, there are {there}; {remedy}"
            )
        found.update(matching)
    paths = sorted(found)
    clips = sum(_labelled_clips(path) for path in paths)
    if clips == 0:
        raise DataError(f"{folder}: its tars hold no .json with a label; X-ARES wants key.wav and key.json; {remedy}")
    return AudioTars(tuple(paths), clips, _fingerprint(paths))


def lend(paths: Sequence[Path], folder: Path) -> None:
    """Make the tars appear in a folder, as links, with the mark that the harness need not download them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        link = folder / path.name
        if not link.is_symlink() or os.readlink(link) != str(path.absolute()):
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute())
    (folder / MARKER).touch()


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The harness expands a pattern with * by glob, any other by braces."""
    if "*" in pattern:
        return sorted(folder.glob(pattern))
    import braceexpand

    wanted = [folder / name for name in braceexpand.braceexpand(pattern)]
    return wanted if all(path.is_file() for path in wanted) else []


def _labelled_clips(tar: Path) -> int:
    try:
        handle = os.open(tar, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{tar}: cannot be opened ({error.strerror})") from error
    try:
        return sum(member.name.endswith(".json") for member in members(tar, handle))
    except BadShardError as error:
        raise DataError(str(error).rstrip(".")) from error
    finally:
        os.close(handle)


def _fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
