"""Audio of X-ARES tasks: tars on disk, checked before hours of work depend on them, and downloads from Zenodo."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq2.convert.weights import first_line
from bestrq2.data.shards.members import BadShardError, members
from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import BestRQ2Error, DataError
from bestrq2.files import folder_lock

# Bytes at both ends of a tar that go into its fingerprint.
_ENDS = 1 << 18


@dataclass(frozen=True)
class AudioTars:
    """The audio of one task on disk.

    Attributes:
        paths: tars of all splits, sorted.
        clips: number of members with a label.
        digest: digest of the names, sizes, beginnings and ends of the tars.
    """

    paths: tuple[Path, ...]
    clips: int
    digest: str


def find_audio_tars(folder: Path, patterns: Mapping[Any, str], downloaded: bool) -> AudioTars:
    """Find the tars of a task by the harness's patterns, and check that each is whole.

    Args:
        folder: folder of the task, such as `env/esc50`.
        patterns: split → the harness's pattern of its tars.
        downloaded: whether the tars were downloaded here, so that deleting them downloads them again.

    Raises:
        DataError: the folder is missing, a split has no tar, or a tar is truncated or damaged.
    """
    remedy = f"delete {folder} and run the command again" if downloaded else "copy them there"
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
        raise DataError(
            f"{folder}: its tars hold no .json with a label; X-ARES reads pairs of key.wav and key.json; {remedy}"
        )
    return AudioTars(tuple(paths), clips, _fingerprint(paths))


def link_tars(paths: Sequence[Path], folder: Path) -> None:
    """Link the tars into a folder, with the marker that tells the harness not to download them."""
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


def download(config: Any, data: Path) -> None:
    """Download and unpack the audio of a task, unless it is there; runs in a worker process.

    Args:
        config: the harness's `TaskConfig`.
        data: folder with one folder per task.

    Raises:
        DataError: the task has no public data, or they cannot be downloaded.
        ConfigError: another process is downloading them.
    """
    folder = data / config.name
    if (folder / MARKER).exists():
        return
    if config.private or not config.zenodo_id:
        raise DataError(f"its data are not public; put their tars into {folder} and name {data} in --data")
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{config.zenodo_id}.zip"
    with folder_lock(folder), _temporary_files(folder / ".partial"):
        try:
            config.env_root = data
            harness_task(config).download_audio_tar()
        except zipfile.BadZipFile as error:
            archive.unlink(missing_ok=True)
            raise DataError(
                f"{archive}: the download is not a whole archive and was deleted; run the command again later"
            ) from error
        except BestRQ2Error:
            raise
        except Exception as error:  # of requests, of the disk, of unpacking
            raise DataError(
                f"record {config.zenodo_id} of Zenodo cannot be downloaded ({_reason(error)}); run the command again "
                f"later, or put its tars into {folder} and name {data} in --data"
            ) from error


def harness_task(config: Any) -> Any:
    """The harness's `XaresTask` of a configuration; some fetch a tokenizer or a language model.

    Raises:
        DataError: the tokenizer or model cannot be fetched.
    """
    from xares.task import XaresTask

    needed = ", ".join(config.pretrained_dependencies or ())
    try:
        return XaresTask(config)
    except Exception as error:
        if not needed:
            raise
        raise DataError(
            f"the task needs {needed}, which cannot be fetched from the Hugging Face hub ({first_line(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Short reason of a failed download; messages of connection errors repeat the address and more."""
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in ("ConnectionError", "Timeout"):
        return "zenodo.org cannot be reached"
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _temporary_files(folder: Path) -> Iterator[None]:
    """Keep temporary files of this process in a new folder.

    The harness downloads to the machine's temporary folder under the number of the record, which two tasks may share,
    and continues what it finds there, although Zenodo packs a new archive each time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
