"""Order of rows and schedule of batches: pure functions of (seed, epoch) and of (seed, step, place).

A corpus stored as shards is shuffled in two stages: the shards, then the recordings inside a window of neighbouring
shards. So only the shards of one window need to be at hand, whether they are on a local disk or in the cache of remote
ones. A corpus that fits into one window is shuffled as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from bestrq2.seeding import generator

# First word of the seed sequence, so that the order shares no random numbers with others.
ORDER = 0x04DE4
# Changing it changes the order of every corpus that is larger: a resumed run would not continue where it stopped.
WINDOW_BYTES = 4_000_000_000


class Parts(NamedTuple):
    """Runs of neighbouring recordings that are stored together, such as the clips of one tar.

    Attributes:
        starts: int64 [parts + 1], number of the first recording of each part, then the number of all recordings.
        sizes: int64 [parts], bytes of each part; 0 where the recordings of a part are files of their own.
    """

    starts: np.ndarray
    sizes: np.ndarray


class Order(Protocol):
    """An endless sequence of rows."""

    def __call__(self, number: int) -> tuple[int, int]:
        """(epoch, row) at place `number` (from 0) of the sequence."""


def epoch_order(length: int, seed: int, epoch: int, parts: Parts | None = None) -> np.ndarray:
    """Order of the recordings in one epoch.

    Args:
        length: number of recordings.
        seed: random seed.
        epoch: number of the epoch.
        parts: shards of the recordings; None where any order is equally fast to read.

    Returns:
        int64 [length], a permutation that is a function of the arguments.
    """
    rng = generator(ORDER, seed, epoch)
    if parts is None or fits_window(parts):
        return rng.permutation(length)
    windows = []
    for window in _windows(parts, rng.permutation(len(parts.sizes))):
        recordings = [np.arange(parts.starts[part], parts.starts[part + 1]) for part in window]
        windows.append(rng.permutation(np.concatenate(recordings)))
    return np.concatenate(windows)


def fits_window(parts: Parts) -> bool:
    """Whether all parts together fit into one window, so that the corpus is shuffled as a whole."""
    return int(parts.sizes.sum()) <= WINDOW_BYTES


def _windows(parts: Parts, order: np.ndarray) -> Iterator[list[int]]:
    """Consecutive parts of an order that together have at most `WINDOW_BYTES`; a larger part is a window by itself."""
    window: list[int] = []
    total = 0
    for part in map(int, order):
        size = int(parts.sizes[part])
        if window and total + size > WINDOW_BYTES:
            yield window
            window, total = [], 0
        window.append(part)
        total += size
    yield window


def sample_order(word: int, length: int, seed: int, parts: Parts | None = None) -> np.ndarray:
    """Order from which a few recordings are taken, for validation for instance.

    Of a corpus larger than a window it begins with the recordings that training begins with, so that no further shards
    are needed.

    Args:
        word: first word of the seed sequence for a corpus that fits into one window.
        length: number of recordings.
        seed: random seed.
        parts: shards of the recordings; None where there are none.

    Returns:
        int64 [length], a permutation.
    """
    if parts is None or fits_window(parts):
        return generator(word, seed).permutation(length)
    return epoch_order(length, seed, 0, parts)


class EpochOrder:
    """Every recording once an epoch, each epoch in an order of its own; see `epoch_order`.

    Args:
        length: number of recordings.
        seed: random seed of the orders.
        parts: shards of the recordings; None where there are none.
    """

    def __init__(self, length: int, seed: int, parts: Parts | None = None) -> None:
        self.length, self.seed, self.parts = length, seed, parts
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __call__(self, number: int) -> tuple[int, int]:
        """(epoch, recording) at place `number` of the sequence."""
        epoch, position = divmod(number, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.length, self.seed, epoch, self.parts)
        return epoch, int(self._order[position])


class RowKey(NamedTuple):
    """Key of one row of one batch.

    Attributes:
        epoch: passes over the source before this one.
        row: its number.
        step: number of the batch.
        place: position in the global batch.
    """

    epoch: int
    row: int
    step: int
    place: int


class BatchSchedule(Sampler[list[RowKey]]):
    """Keys of the rows of every batch, for one of several processes.

    Place q of step s is row number s * batch_size + q of the order; a batch may reach over the end of an epoch.

    Args:
        order: order of the rows.
        batch_size: rows of the global batch, over all processes.
        start_step: first step; a resumed run gives the number of steps done.
        max_steps: step before which to stop; None for never.
        rank: number of this process; it gets the places that leave this remainder when divided by `world_size`.
        world_size: number of processes, which divides the batch size.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        start_step: int = 0,
        max_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order, self.batch_size, self.start_step, self.max_steps = order, batch_size, start_step, max_steps
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Steps left.

        Raises:
            TypeError: the schedule is endless.
        """
        if self.max_steps is None:
            raise TypeError("an endless schedule has no length")
        return max(0, self.max_steps - self.start_step)

    def __iter__(self) -> Iterator[list[RowKey]]:
        step = self.start_step
        while self.max_steps is None or step < self.max_steps:
            places = range(self.rank, self.batch_size, self.world_size)
            yield [RowKey(*self.order(step * self.batch_size + place), step, place) for place in places]
            step += 1
