"""From the word or path that a user gives to the source it stands for."""

from __future__ import annotations

import os
from pathlib import Path

from bestrq2.data.audio import AUDIO_SUFFIXES, audio_info
from bestrq2.data.sources import ArraySource, FileSource, PathList, Source
from bestrq2.data.tables import LIST_SUFFIXES, read_rows, resolved
from bestrq2.errors import AudioError, DataError

SOUNDWORLD_CLIPS = 3000


def open_source(spec: str | Path) -> Source:
    """The source that a word or path stands for.

    Args:
        spec: a folder (searched recursively for files with an audio suffix), an audio file, a list (.txt with one path
            a line, .csv or .tsv with a column "path", .jsonl with a key "path", "audio" or "audio_filepath"; relative
            paths start at the list's folder), or "soundworld" or "soundworld:N" for N generated clips (3000).

    Returns:
        The source; its files are not opened yet.

    Raises:
        DataError: missing, an empty folder or list, or neither list nor audio.
    """
    if isinstance(spec, str) and (spec == "soundworld" or spec.startswith("soundworld:")):
        return _soundworld(spec)
    path = Path(spec).expanduser()
    name = str(path.absolute())
    try:
        if path.is_dir():
            return FileSource(name, audio_files(path))
        if not path.exists():
            raise DataError(f"{path} does not exist; give a folder, an audio file, a list of paths, or 'soundworld'.")
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}).") from error
    if path.suffix.lower() in LIST_SUFFIXES:
        columns = ("path", "audio", "audio_filepath") if path.suffix.lower() == ".jsonl" else ("path",)
        rows = read_rows(path, [columns], optional=("label",))
        labels = [row["label"] for row in rows] if any(row["label"] for row in rows) else None
        return FileSource(name, PathList(str(resolved(path, row["path"])) for row in rows), labels)
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        try:
            audio_info(path)
        except AudioError as error:
            lists = ", ".join(sorted(LIST_SUFFIXES))
            raise DataError(f"{path} is neither audio nor a list of paths ({lists}).") from error
    return FileSource(name, [path])


def soundworld_count(spec: str, default: int) -> int:
    """N of "soundworld:N".

    Raises:
        DataError: N is not a positive whole number.
    """
    number = spec.partition(":")[2] if ":" in spec else str(default)
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise DataError(f"{spec!r} is no source; expected 'soundworld:N' with a positive whole number N of clips.")
    return int(number)


def _soundworld(spec: str) -> Source:
    count = soundworld_count(spec, SOUNDWORLD_CLIPS)
    from bestrq2.data.soundworld import SAMPLE_RATE, unlabelled

    return ArraySource(unlabelled(count, seed=0), SAMPLE_RATE, name="soundworld")


def audio_files(folder: Path) -> PathList:
    """All files below a folder with an audio suffix, sorted; hidden ones (leading dot) are left out.

    Folders that are links are entered, each real folder once.

    Raises:
        DataError: there are none, or a folder cannot be listed.
    """
    found: list[str] = []
    others: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{current} cannot be listed ({error.strerror}); check its permissions.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append(entry.path)
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in AUDIO_SUFFIXES:
                found.append(entry.path)
            else:
                others[suffix or "none"] = others.get(suffix or "none", 0) + 1
    if found:
        return PathList(sorted(found))
    if others:
        kinds = ", ".join(sorted(others, key=lambda suffix: (-others[suffix], suffix))[:5])
        raise DataError(
            f"{folder} holds {sum(others.values())} files and none with an audio suffix (found: {kinds}; "
            "expected .wav, .flac, .mp3, .ogg, .m4a and the like)."
        )
    raise DataError(f"{folder} is empty: no files in it or below; put audio files there.")
