"""Folder of the benchmark: its marker, the note of where it is, and the places of its recordings."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bestrq2.errors import DataError
from bestrq2.files import cache_folder, write_text
from bestrq2.realworld.manifest import NAME, Manifest

MARKER = f"{NAME}.json"
"""File that makes a folder one of the benchmark: where its packages are, and which recordings are missing."""


def write_marker(folder: Path, packages: Path, manifest: Manifest, missing: Sequence[int]) -> None:
    """Mark a folder as that of the benchmark, and note its place in the cache for `find_folder`."""
    content = {"manifest": manifest.checksum, "packages": str(packages.absolute()), "missing": list(missing)}
    write_text(folder / MARKER, json.dumps(content) + "\n")
    note = cache_folder() / f"{NAME}.txt"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_text(note, f"{folder.absolute()}\n")


def find_folder() -> Path:
    """The folder that `bestrq2 realworld` wrote last.

    Raises:
        DataError: there is none, or it is gone.
    """
    note = cache_folder() / f"{NAME}.txt"
    if not note.is_file():
        raise DataError(f"{NAME} needs recordings that have not been fetched; `bestrq2 realworld FOLDER` fetches them")
    folder = Path(note.read_text(encoding="utf-8").strip())
    if not (folder / MARKER).is_file():
        raise DataError(f"{folder} has no recordings of {NAME} any more; `bestrq2 realworld FOLDER` fetches them again")
    return folder


def places(folder: Path, manifest: Manifest) -> dict[int, Path]:
    """Files of the recordings that tasks test, by their numbers.

    Raises:
        DataError: the folder belongs to another version of the benchmark, or recordings are missing or have changed.
    """
    again = f"`bestrq2 realworld {folder}`"
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        checksum, packages, lost = marker["manifest"], Path(marker["packages"]), set(marker["missing"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MARKER} cannot be read ({error}); {again} writes it again") from error
    if packages != (folder / "packages").absolute():
        again = f"`bestrq2 realworld {folder} --packages {packages}`"
    if checksum != manifest.checksum:
        raise DataError(f"{folder} was written for other contents of {NAME} than this release has; {again} updates it")
    files = {number: place(folder, packages, manifest, number) for number in sorted(manifest.tested)}
    for number, file in files.items():
        if number not in lost and not _has_size(file, manifest, number):
            lost.add(number)
    if absent := [number for number in files if number in lost]:
        counts = Counter(manifest.recordings[number].package for number in absent)
        tasks = [name for name, rows in manifest.tasks.items() if not set(absent).isdisjoint(rows.recordings.tolist())]
        listed = ", ".join(f"{count} of {package}" for package, count in counts.items())
        raise DataError(
            f"{NAME} lacks {len(absent)} of {len(files)} recordings ({listed}), on which {', '.join(tasks)} depend; "
            f"{again} says why"
        )
    return files


def place(folder: Path, packages: Path, manifest: Manifest, number: int) -> Path:
    """File of a recording: inside an unpacked package, or written by `bestrq2 realworld`."""
    first, _, rest = manifest.recordings[number].place.partition("/")
    return packages / rest if first == "packages" else folder / first / rest


def _has_size(file: Path, manifest: Manifest, number: int) -> bool:
    recording = manifest.recordings[number]
    header = 44 if recording.rate else 0  # of the WAV file around PCM samples
    try:
        return os.stat(file).st_size == recording.size + header
    except OSError:
        return False
