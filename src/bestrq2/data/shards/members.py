"""The members of a tar, found by its headers alone.

`tarfile` interprets the headers, but its own loop takes damage in the middle for the end; this one does not.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bestrq2.errors import DataError
from bestrq2.text import counted

# Long names and pax records take less; a header that claims more is damaged, and would be read into memory.
HEADER_LIMIT = 1 << 20
REST_BLOCK = 1 << 22
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}


class BadShardError(DataError):
    """A tar that cannot be used as it is: empty, truncated, damaged, or no tar."""


class BrokenOffError(BadShardError):
    """A tar that is truncated or damaged, but only from some byte on."""


class Member(NamedTuple):
    """One file in a tar.

    Attributes:
        name: its path in the tar; bytes that are not UTF-8 as lone surrogates.
        offset: of its content, in bytes from the tar's beginning.
        size: bytes of its content, which all lie in the tar.
        problem: why its content cannot be read in place; "" where it can.
    """

    name: str
    offset: int
    size: int
    problem: str


def members(tar: Path, handle: int) -> Iterator[Member]:
    """All members of a tar but folders and devices, in their order.

    Only headers are read, by system calls and not through a map, so that a file which shrinks meanwhile ends in an
    error and not in a signal.

    Args:
        tar: what messages call it.
        handle: descriptor of the open file.

    Raises:
        BrokenOffError: truncated or damaged behind the members that were found before.
        BadShardError: empty, compressed, or not a tar.
    """
    size = os.fstat(handle).st_size
    if size == 0:
        raise BadShardError(f"{tar}: the tar is empty (0 bytes); copy or download it again.")
    file: Any = _HeaderFile(handle)
    headers = _Headers(fileobj=file, encoding="utf-8", errors="surrogateescape")
    count, start = 0, 0
    while (info := _next(tar, headers, size, count)) is not None:
        end = info.offset_data + info.size if info.isreg() and not info.issparse() else headers.offset
        if info.size < 0 or headers.offset <= start:
            raise _damaged(tar, start)
        if end > size:
            detail = f"its member {info.name!r} reaches to byte {end:,}, the file ends at {size:,}"
            raise BrokenOffError(f"{tar}: the tar is truncated: {detail}; copy or download it again.")
        count, start = count + 1, headers.offset
        if info.issparse():
            yield Member(info.name, info.offset_data, 0, "is stored as a sparse file; pack it without holes")
        elif info.isreg():
            yield Member(info.name, info.offset_data, info.size, "")
        elif info.islnk() or info.issym():
            yield Member(info.name, info.offset_data, 0, "is a link; pack the file itself")
    _check_rest(tar, handle, start, size)


class _HeaderFile:
    """An open file as `tarfile` reads headers from it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.position = 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_LIMIT:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        content = os.pread(self.handle, size, self.position)
        self.position += len(content)
        return content

    def seek(self, position: int) -> None:
        self.position = position

    def tell(self) -> int:
        return self.position


class _Headers(tarfile.TarFile):
    """What `tarfile.TarInfo` needs to know while it interprets headers one after the other."""

    offset: int
    fileobj: Any

    def next(self) -> tarfile.TarInfo | None:
        return None


def _next(tar: Path, headers: _Headers, size: int, count: int) -> tarfile.TarInfo | None:
    """The next member; None at the end mark."""
    start = headers.offset
    try:
        headers.fileobj.seek(start)
        return tarfile.TarInfo.fromtarfile(headers)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
        if start == 0:
            _check_plain(tar, headers.fileobj.handle)
            raise BadShardError(f"{tar}: is not a tar ({size:,} bytes); copy or download it again.") from error
        raise BrokenOffError(
            f"{tar}: the tar is truncated: after {counted(count, 'member')} it ends at byte {size:,} without an end "
            "mark; copy or download it again."
        ) from error
    except OSError as error:
        raise BadShardError(f"{tar}: cannot be read at byte {start:,} ({error.strerror}).") from error
    except Exception as error:  # tarfile meets damage with errors of many kinds
        if start == 0:
            _check_plain(tar, headers.fileobj.handle)
            raise BadShardError(f"{tar}: is not a tar; give tars as `tar -cf` writes them.") from error
        if headers.fileobj.position >= size:
            raise BrokenOffError(
                f"{tar}: the tar is truncated: it ends at byte {size:,} in a header; copy or download it again."
            ) from error
        raise _damaged(tar, start) from error


def _check_plain(tar: Path, handle: int) -> None:
    first = os.pread(handle, 8, 0)
    for magic, name in COMPRESSED.items():
        if first.startswith(magic):
            raise BadShardError(f"{tar}: is compressed by {name}; unpack it to a plain tar.")


def _damaged(tar: Path, start: int) -> BrokenOffError:
    return BrokenOffError(f"{tar}: the tar is damaged at byte {start:,}: no header there; copy or download it again.")


def _check_rest(tar: Path, handle: int, end: int, size: int) -> None:
    """Behind the end mark there is nothing; a second tar put there by `cat` would be lost unnoticed."""
    for place in range(end, size, REST_BLOCK):
        block = os.pread(handle, REST_BLOCK, place)
        if block.count(0) != len(block):
            raise BadShardError(
                f"{tar}: goes on behind the end mark at byte {end:,}, like tars joined by cat; give them one by one."
            )
