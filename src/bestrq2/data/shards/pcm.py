"""Plain 16-bit mono WAV, the one format whose samples can be used as they lie in the file."""

from __future__ import annotations

import struct
from typing import NamedTuple

# Enough for the chunks that recorders put before the samples; what has more of them goes through a decoder.
HEAD_BYTES = 4096
PCM, EXTENSIBLE = 1, 0xFFFE
# What follows the two bytes of the format in an extensible header's identifier.
IDENTIFIER_END = bytes.fromhex("000000001000800000aa00389b71")


class PcmLayout(NamedTuple):
    """Where the samples of a WAV file lie.

    Attributes:
        rate: Hz.
        frames: number of samples.
        offset: of the first sample, in bytes from the file's beginning; even.
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
        None for any other format, and for a file whose header contradicts its length: a decoder judges those.
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
    """Hz of a format chunk; 0 where it does not stand for 16-bit mono PCM."""
    if len(form) < 16:
        return 0
    tag, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", form)
    if tag == EXTENSIBLE and len(form) >= 40 and form[26:40] == IDENTIFIER_END:
        valid_bits, tag = struct.unpack_from("<H", form, 18)[0], struct.unpack_from("<H", form, 24)[0]
        bits = bits if valid_bits == bits else 0
    plain = (tag, channels, frame_bytes, bits) == (PCM, 1, 2, 16)
    return int(rate) if plain and rate < 1 << 31 else 0
