"""Atomic writes, locks on folders, and errors of disks in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
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

# Errors of an output that cannot be written, and of a machine that fails.
_REFUSALS = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EINVAL),
)
_FAILURES = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE)


def cache_folder(cache: Path | None = None) -> Path:
    """The cache folder: the given one, else $BESTRQ2_CACHE, else ~/.cache/bestrq2."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("BESTRQ2_CACHE") or Path.home() / ".cache" / "bestrq2")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it, synchronised to disk, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        with _system_errors():
            yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable by their owner only
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Raise the error of the system, such as a full disk, that libraries in Rust (safetensors) hide in their own."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; characters without a UTF-8 form, as in odd file names, become "?"."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a folder of files; an existing folder is replaced file by file, and its other files are removed.

    A kill at any instant leaves every file in its old or its new state.

    Args:
        path: the folder.
        fill: function that creates a folder with the content at the path it is given.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _system_errors():
            fill(fresh)
        files = sorted(file for file in fresh.iterdir())
        mode = fresh.stat().st_mode & 0o666  # what the umask leaves; safetensors makes its files private
        for file in files:
            file.chmod(mode)
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


def regular_file(path: Path) -> Path:
    """The path itself, of a file whose reading comes to an end.

    Raises:
        OSError: it is a device, a pipe or a socket, or does not exist.
    """
    if not _is_file_or_folder(path):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket", str(path))
    return path


def _is_file_or_folder(path: Path) -> bool:
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def is_full(error: OSError) -> bool:
    """Whether an error reports a full disk or an exhausted quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_writable(path: Path) -> None:
    """Check, before the work, that its output can be written.

    Raises:
        ConfigError: if the folder of `path` is missing or not writable, or `path` is a folder.
    """
    with disk_errors(path):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist; create it or name another output")
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        os.unlink(name)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn errors of the disk in this block into one sentence.

    Args:
        place: file or folder that is written.

    Raises:
        BestRQ2Error: if the disk is full or fails.
        ConfigError: if `place` cannot be written, or is a device, a pipe or a socket, which a file would replace.
    """
    try:
        _check_place(place)
        yield
    except OSError as error:
        if is_full(error):
            raise BestRQ2Error(
                f"{place}: the disk is full; finished files are whole: free space and run the command again"
            ) from error
        if error.errno in _FAILURES:
            raise BestRQ2Error(
                f"{error.filename or place}: the disk fails ({error.strerror}); run the command again when it works"
            ) from error
        # A missing file may also be one that is read.
        missing = error.errno == errno.ENOENT and place.name in str(error.filename)
        if error.errno in _REFUSALS or missing:
            raise ConfigError(
                f"{error.filename or place}: cannot be written ({error.strerror}); name another output"
            ) from error
        raise


def _check_place(place: Path) -> None:
    name = str(place)
    try:
        name.encode()
    except UnicodeEncodeError:
        valid = False  # a name in another encoding, which the writers of Parquet and safetensors cannot take
    else:
        valid = "\0" not in name
    if not valid:
        raise ConfigError(f"{name!r}: is not valid in UTF-8; name another output")
    with contextlib.suppress(FileNotFoundError):
        if not _is_file_or_folder(place):
            raise ConfigError(f"{place}: is a device, a pipe or a socket; name a file or a folder")


@contextlib.contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Lock a folder against other processes that use this function, until the block ends.

    The lock is on `path/.lock`. Forked processes do not inherit it, and the kernel releases it however this process
    ends. On Windows nothing is locked.

    Args:
        path: an existing folder.

    Raises:
        ConfigError: if another process, which is named, has the lock.
    """
    if fcntl is None:
        yield
        return
    name = path.resolve() / ".lock"
    # The kernel would grant a process its own lock again, and release it when either file is closed.
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
    """The file of that name, created if missing, locked for this process."""
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
        # The previous holder may have deleted the file after we opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), name.stat()):
                return file
        file.close()
