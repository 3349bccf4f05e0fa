"""Which recording comes when: an endless row that is a pure function of the seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from bestrq2.seeding import generator

# First word of the seed sequence, so that the order shares no random numbers with others.
ORDER = 0x04DE4


class Order(Protocol):
    """An endless row of recordings."""

    def __call__(self, number: int) -> tuple[int, int]:
        """What stands at place `number` (from 0) of the row: (epoch, recording)."""

    def replacements(self, epoch: int, recording: int) -> Iterator[int]:
        """Recordings that may take the place of one that cannot be used, the nearest first; each once."""


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the recordings in one epoch: int64 [length], a permutation that is a function of (seed, epoch)."""
    return generator(ORDER, seed, epoch).permutation(length)


class EpochOrder:
    """Every recording once an epoch, each epoch in an order of its own.

    Args:
        length: number of recordings.
        seed: of the orders.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._drawn(epoch)
        return self._order

    def _drawn(self, epoch: int) -> np.ndarray:
        return epoch_order(self.length, self.seed, epoch)

    def __call__(self, number: int) -> tuple[int, int]:
        """(epoch, recording) at place `number` of the row."""
        epoch, position = divmod(number, self.length)
        return epoch, int(self._of(epoch)[position])

    def replacements(self, epoch: int, recording: int) -> Iterator[int]:
        """The recordings that follow in the order of the epoch, around its end."""
        order = self._of(epoch)
        place = int(np.flatnonzero(order == recording)[0])
        for offset in range(1, len(order)):
            yield int(order[(place + offset) % len(order)])
