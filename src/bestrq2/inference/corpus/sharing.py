"""Which process embeds what: blocks of neighbouring recordings, or whole remote shards, dealt out in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from bestrq2.data.remote import StreamSource
from bestrq2.errors import ConfigError
from bestrq2.inference.corpus.tasks import AnySource, Stretch

BLOCK = 64
"""Neighbouring recordings that one process takes; no part reaches over the end of a block."""

Ranges: TypeAlias = Mapping[int, list[tuple[int, int]]]
"""Of each lane what is done, as (start, stop) in rising order; (n, n) says that a remote shard ends after n."""


class Process(NamedTuple):
    """One of several processes that embed a corpus together, as `torchrun` numbers them.

    Attributes:
        rank: its number.
        world_size: how many there are.
        local_rank: its number on its machine.
        local_world_size: how many there are on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def this_process() -> Process:
    """Which process this is, by RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; the only one where they are not set.

    Raises:
        ConfigError: they are no numbers, or impossible together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Process()
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not all(value.isascii() and value.isdigit() for value in found.values()) or not (
        int(found["RANK"]) < int(found["WORLD_SIZE"])
    ):
        raise ConfigError(f"{' '.join('='.join(pair) for pair in found.items())}: expected numbers, RANK < WORLD_SIZE")
    return Process(**{name.lower(): int(value) for name, value in found.items()})


def own_count(source: AnySource, process: Process) -> int | None:
    """Recordings in the share of a process, done or not; None where only reading all of it would tell."""
    if isinstance(source, StreamSource):
        return None
    return sum(stop - start for start, stop in _blocks(len(source), process))


def _blocks(count: int, process: Process) -> Iterator[tuple[int, int]]:
    for start in range(process.rank * BLOCK, count, process.world_size * BLOCK):
        yield start, min(start + BLOCK, count)


def own_stretches(source: AnySource, done: Ranges, process: Process = Process()) -> list[Stretch]:  # noqa: B008
    """What is left to do of a process's share, in the order of the source.

    Args:
        source: the corpus.
        done: what the parts hold, whoever made them.
        process: whose share; by default all belongs to it.
    """
    if isinstance(source, StreamSource):
        lanes = range(process.rank, len(source.urls), process.world_size)
        return [Stretch(lane, _prefix(done.get(lane, [])), None) for lane in lanes if not _has_end(done.get(lane, []))]
    ranges, place = done.get(0, []), 0
    stretches: list[Stretch] = []
    for start, stop in _blocks(len(source), process):
        while place < len(ranges) and ranges[place][1] <= start:
            place += 1
        position = start
        for first, last in _from(ranges, place):
            if first >= stop:
                break
            if first > position:
                stretches.append(Stretch(0, position, first))
            position = max(position, last)
        if position < stop:
            stretches.append(Stretch(0, position, stop))
    return stretches


def _from(ranges: list[tuple[int, int]], place: int) -> Iterator[tuple[int, int]]:
    while place < len(ranges):
        yield ranges[place]
        place += 1


def _prefix(ranges: list[tuple[int, int]]) -> int:
    """How many recordings from the first on are done without a gap."""
    position = 0
    for start, stop in ranges:
        if start == position:
            position = stop
    return position


def _has_end(ranges: list[tuple[int, int]]) -> bool:
    return any(start == stop == _prefix(ranges) for start, stop in ranges)
