"""Members of a tar and layout of plain WAV files, found by their headers alone.

`tarfile` interprets single headers; its own loop would take damage in the middle for the end of the tar.
"""

from __future__ import annotations

import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bestrq2.errors import DataError
from bestrq2.text import counted

# Long names and pax records take less; a header that claims more is damaged, and would be read into memory.
HEADER_LIMIT = 1 << 20
REST_BLOCK = 1 << 22
# Enough for the chunks that recorders put before the samples; files with more go through a decoder.
HEAD_BYTES = 4096
PCM, EXTENSIBLE = 1, 0xFFFE
# What follows the two bytes of the format in an extensible header's identifier.
IDENTIFIER_END = bytes.fromhex("000000001000800000aa00389b71")
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}


class BadShardError(DataError):
    """A tar that cannot be used as it is: empty, truncated, damaged, or not a tar."""


class BrokenOffError(BadShardError):
    """A tar that is truncated or damaged from some byte on."""


class Member(NamedTuple):
    """One file in a tar.

    Attributes:
        name: its path in the tar; bytes that are not UTF-8 as lone surrogates.
        offset: start of its content, in bytes from the tar's beginning.
        size: length of its content in bytes, all within the tar.
        problem: why its content cannot be read in place; "" if it can.
    """

    name: str
    offset: int
    size: int
    problem: str


def members(tar: Path, handle: int) -> Iterator[Member]:
    """All members of a tar except folders and devices, in their order. Only headers are read.

    Args:
        tar: path of the tar, for messages.
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
    """Interface of an open file for `tarfile`'s parser of headers."""

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
    """State of `tarfile.TarInfo` between successive headers."""

    offset: int
    fileobj: Any

    def next(self) -> tarfile.TarInfo | None:
        return None


def _next(tar: Path, headers: _Headers, size: int, count: int) -> tarfile.TarInfo | None:
    """Parse the next header; None at the end mark."""
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
    except Exception as error:  # tarfile raises many kinds of errors for damage
        if start == 0:
            _check_plain(tar, headers.fileobj.handle)
            raise BadShardError(f"{tar}: is not a tar; give tars as `tar -cf` writes them.") from error
        if headers.fileobj.position >= size:
            raise BrokenOffError(
                f"{tar}: the tar is truncated: it ends at byte {size:,} in a header; copy or download it again."
            ) from error
        raise _damaged(tar, start) from error


def begins_tar(head: bytes) -> bool:
    """Whether the first block of a file is that of a tar, plain or compressed."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return any(map(head.startswith, COMPRESSED))
    return True


def _check_plain(tar: Path, handle: int) -> None:
    first = os.pread(handle, 8, 0)
    for magic, name in COMPRESSED.items():
        if first.startswith(magic):
            raise BadShardError(f"{tar}: is compressed by {name}; unpack it to a plain tar.")


def _damaged(tar: Path, start: int) -> BrokenOffError:
    return BrokenOffError(f"{tar}: the tar is damaged at byte {start:,}: no header there; copy or download it again.")


def _check_rest(tar: Path, handle: int, end: int, size: int) -> None:
    """Check that nothing follows the end mark: a second tar appended by `cat` would be lost unnoticed."""
    for place in range(end, size, REST_BLOCK):
        block = os.pread(handle, REST_BLOCK, place)
        if block.count(0) != len(block):
            raise BadShardError(
                f"{tar}: goes on behind the end mark at byte {end:,}, like tars joined by cat; give them one by one."
            )


class PcmLayout(NamedTuple):
    """Position of the samples in a WAV file.

    Attributes:
        rate: Hz.
        frames: number of samples.
        offset: start of the first sample, in bytes from the file's beginning; even.
    """

    rate: int
    frames: int
    offset: int


def pcm_layout(head: bytes, length: int) -> PcmLayout | None:
    """Layout of a 16-bit mono PCM WAV file.

    Args:
        head: its first `HEAD_BYTES` bytes, or all of it.
        length: bytes of the whole file.

    Returns:
        None for any other format, and for a file whose header contradicts its length; these need a decoder.
    """
    if len(head) < 44 or head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    if struct.unpack_from("<I", head, 4)[0] + 8 != length:
        return None
    rate = 0
    place = 12
    while place + 8 <= len(head):
        kind, size = struct.unpack_from("<4sI", head, place)
        place += 8
        if kind == b"fmt ":
            rate = _rate(head[place : place + size])
        elif kind == b"data":
            fits = rate > 0 and size >= 2 and place + size <= length and place % 2 == 0
            return PcmLayout(rate, size // 2, place) if fits else None
        place += size + size % 2
    return None


def _rate(form: bytes) -> int:
    """Sampling rate in Hz of a format chunk; 0 unless it is 16-bit mono PCM."""
    if len(form) < 16:
        return 0
    tag, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", form)
    if tag == EXTENSIBLE and len(form) >= 40 and form[26:40] == IDENTIFIER_END:
        valid_bits, tag = struct.unpack_from("<H", form, 18)[0], struct.unpack_from("<H", form, 24)[0]
        bits = bits if valid_bits == bits else 0
    plain = (tag, channels, frame_bytes, bits) == (PCM, 1, 2, 16)
    return int(rate) if plain and rate < 1 << 31 else 0
