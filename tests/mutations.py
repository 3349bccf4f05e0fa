"""Damage to the bytes of a file, each kind a function of the bytes and of a seeded source of chance."""

from __future__ import annotations

import random
from collections.abc import Callable


def flip(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def flip_in_front(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice([1, 2, 4])):
        data[draw.randrange(min(len(data), draw.choice([8, 64, 2000])))] = draw.randrange(256)
    return data


def flip_behind(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice([1, 2, 4])):
        data[-1 - draw.randrange(min(len(data), 4000))] = draw.randrange(256)
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def remove(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice([1, 7, 64, 4096])]
    return data


def insert(data: bytearray, draw: random.Random) -> bytearray:
    place = draw.randrange(len(data))
    data[place:place] = draw.randbytes(draw.choice([1, 8, 300]))
    return data


def blank(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    size = len(data[start : start + draw.choice([4, 64, 2000])])
    data[start : start + size] = draw.choice([b"\x00", b"\xff", b"0", b"9"]) * size
    return data


def swap(data: bytearray, draw: random.Random) -> bytearray:
    size = draw.choice([4, 32, 500])
    first, second = draw.randrange(len(data)), draw.randrange(len(data))
    data[first : first + size] = data[second : second + size]
    return data


def rewrite_a_number(data: bytearray, draw: random.Random) -> bytearray:
    """Another number in the text of a header or a configuration."""
    digits = [place for place, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
    if digits:
        place = draw.choice(digits)
        data[place : place + draw.choice([1, 2, 4])] = str(draw.choice([0, 9, 77, 10**6, 10**12, 2**63])).encode()
    return data


BYTES: list[Callable[[bytearray, random.Random], bytearray]] = [
    *(flip, flip_in_front, flip_behind, cut, remove, insert, blank, swap, rewrite_a_number)
]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes after one to four mutations, at least one byte."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        data = draw.choice(BYTES)(data, draw) or bytearray(b"\x00")
    return bytes(data)
