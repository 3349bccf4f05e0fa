"""Is a file all there? How many bytes its container says it has, read from a few header bytes.

Decoders do not tell: libsndfile and FFmpeg read a file whose end is missing as a shorter one. What is not covered here
(FLAC, WAV and its kin, ADTS) is checked where it is decoded, see `decoding`.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from bestrq2.data.decoder import AudioPlace

# Writers miscount by a header or a padding byte; that much missing is no lost audio.
SLACK_BYTES = 64
# MP3 editors rewrite tags without the length in the Xing header.
MP3_SLACK = 0.01
OGG_PAGE_LIMIT = 65_307
HEADER_LIMIT = 1 << 16


def declared_bytes(audio: AudioPlace) -> int | None:
    """Number of bytes that the container's own headers promise.

    Args:
        audio: an existing, readable file, or one in memory.

    Returns:
        The least file size in bytes at which nothing is missing, or None where the container does not say.
    """
    with audio.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(16)
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_bytes(file)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
            return _mp4_bytes(file, size)
        if head[:4] == b"caff":
            return _caf_bytes(file, size)
        if head[:4] == b"OggS":
            return _ogg_bytes(file, size)
        return _mp3_bytes(file)


def is_mpeg_audio(audio: AudioPlace) -> bool:
    """Whether a file begins like an MP3: with an ID3 tag or an MPEG audio frame."""
    with audio.open("rb") as file:
        head = file.read(4)
    # The two layer bits tell MPEG audio from ADTS, which has zeros there.
    return head[:3] == b"ID3" or (len(head) == 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 != 0)


def _vint(file: BinaryIO) -> int | None:
    """EBML variable-length integer at the file's position; None for "unknown"."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value


def _matroska_bytes(file: BinaryIO) -> int | None:
    file.seek(4)
    header = _vint(file)
    if header is None or header > HEADER_LIMIT:
        return None
    file.seek(header, 1)
    if file.read(4) != b"\x18S\x80g":
        return None
    segment = _vint(file)
    return None if segment is None else file.tell() + segment - SLACK_BYTES


def _mp4_bytes(file: BinaryIO, size: int) -> int:
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        box, kind = struct.unpack(">I4s", file.read(8))
        if not kind.isalnum():
            break
        if box == 1:
            box = int.from_bytes(file.read(8), "big")
        if box < 8:
            break
        offset += box
    return offset - SLACK_BYTES


def _caf_bytes(file: BinaryIO, size: int) -> int:
    offset = 8
    while offset + 12 <= size:
        file.seek(offset)
        _, chunk = struct.unpack(">4sq", file.read(12))
        if chunk < 0:
            return offset
        offset += 12 + chunk
    return offset - SLACK_BYTES


def _ogg_bytes(file: BinaryIO, size: int) -> int | None:
    """End of the last page that begins in the file."""
    tail_start = max(0, size - OGG_PAGE_LIMIT)
    file.seek(tail_start)
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return None
    header = tail[page : page + 27]
    lengths = tail[page + 27 : page + 27 + header[26]] if len(header) == 27 else b""
    if len(header) < 27 or len(lengths) < header[26]:
        return size + 1
    return tail_start + page + 27 + len(lengths) + sum(lengths)


def _mp3_bytes(file: BinaryIO) -> int | None:
    """Bytes promised by the Xing, Info or VBRI header of an MP3 file, less 1 %; None without such a header."""
    file.seek(0)
    tag = file.read(10)
    start = 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(64)
    if len(frame) < 64 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return None
    mpeg1, mono = frame[1] & 0x18 == 0x18, frame[3] & 0xC0 == 0xC0
    xing = 4 + {(True, True): 17, (True, False): 32, (False, True): 9, (False, False): 17}[mpeg1, mono]
    if frame[xing : xing + 4] in (b"Xing", b"Info"):
        flags = frame[xing + 7]
        if not flags & 2:
            return None
        at = xing + (12 if flags & 1 else 8)
    elif frame[36:40] == b"VBRI":
        at = 46
    else:
        return None
    return start + int((1 - MP3_SLACK) * int.from_bytes(frame[at : at + 4], "big"))
