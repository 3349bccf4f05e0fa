"""Writing files so that a kill leaves the old one or the new one, never a half."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from bestrq2.errors import BestRQ2Error, ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_locked: set[Path] = set()


def cache_folder(cache: Path | None = None) -> Path:
    """Return the cache folder: the given one, else $BESTRQ2_CACHE, else ~/.cache/bestrq2."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("BESTRQ2_CACHE") or Path.home() / ".cache" / "bestrq2")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes its place, synchronised to disk, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; what has no UTF-8 form, as in odd file names, becomes a question mark."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder of files; one that exists already is renewed file by file.

    Every file is whole at every instant: a kill leaves each as it was or as it is now, and never no folder at all.

    Args:
        path: the folder.
        fill: makes a folder of that content at the path it is given.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fill(fresh)
        files = sorted(file for file in fresh.iterdir())
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if not path.exists():
            fresh.replace(path)
            return
        for file in files:
            file.replace(path / file.name)
        for stale in {file.name for file in path.iterdir()} - {file.name for file in files}:
            (path / stale).unlink()
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def is_full(error: OSError) -> bool:
    """Whether the disk, or what a user may write to it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_writable(path: Path) -> None:
    """Say before the work that its output could not be written.

    Raises:
        ConfigError: if the folder of `path` is missing or may not be written to.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist; make it or name another output")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file")
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        os.unlink(name)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk or a refused write in this block into one sentence.

    Raises:
        BestRQ2Error: if the disk is full.
        ConfigError: if `place` may not be written to.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise BestRQ2Error(
                f"{place}: the disk is full; what was written before is whole: free space and run the command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
            raise ConfigError(
                f"{error.filename or place}: cannot be written ({error.strerror}); name another output"
            ) from error
        raise


@contextlib.contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Keep other processes that ask for the same lock away from a folder until the block ends.

    The lock is on `path/.lock`. It belongs to this process alone, not to processes forked from it, and the kernel lets
    go of it however this process ends. Where there are no such locks (Windows) nothing is locked.

    Args:
        path: an existing folder.

    Raises:
        ConfigError: another process has the lock; it is named.
    """
    if fcntl is None:
        yield
        return
    name = path.resolve() / ".lock"
    # A process may take its own lock again, and would lose it by closing the file once.
    if name in _locked:
        raise ConfigError(f"{path}: another process is writing to it (pid {os.getpid()}); wait or name another folder")
    file = _locked_file(name)
    _locked.add(name)
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        _locked.discard(name)
        name.unlink(missing_ok=True)
        file.close()


def _locked_file(name: Path) -> TextIO:
    """A file of that name, made where there is none, locked for this process."""
    while True:
        file = name.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"{name.parent}: another process is writing to it (pid {holder}); wait or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return file  # a file system without locks
        # The holder before may have deleted the file after we opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), name.stat()):
                return file
        file.close()
