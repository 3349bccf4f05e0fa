"""An order of recordings in which rare classes come as often as frequent ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bestrq2.data.order import EpochOrder
from bestrq2.data.sources import SubsetSource
from bestrq2.seeding import generator

# First word of the seed sequence, so that the order shares no random numbers with others.
BALANCED = 0xBA1A


class BalancedOrder(EpochOrder):
    """As many recordings an epoch as there are, drawn with replacement by their probabilities.

    Args:
        probabilities: float64 [recordings], summing to 1.
        seed: of the orders.
    """

    def __init__(self, probabilities: np.ndarray, seed: int) -> None:
        super().__init__(len(probabilities), seed)
        self.probabilities = probabilities

    def _drawn(self, epoch: int) -> np.ndarray:
        return generator(BALANCED, self.seed, epoch).choice(self.length, self.length, p=self.probabilities)


@dataclass(frozen=True)
class BalancedSource(SubsetSource):
    """Recordings that come as often as their probabilities say.

    Attributes:
        probabilities: float64 [recordings], summing to 1.
    """

    probabilities: np.ndarray

    def order(self, seed: int) -> BalancedOrder:
        """Which recording comes when in an endless run; see `BalancedOrder`."""
        return BalancedOrder(self.probabilities, seed)


def balanced(subset: SubsetSource, targets: np.ndarray) -> BalancedSource:
    """Recordings, each as probable as the sum over its classes of one over the recordings of the class.

    Args:
        subset: the recordings.
        targets: [recordings, classes], 1 for the classes of each; those without any are a class of their own.
    """
    columns = np.column_stack([targets, ~targets.any(axis=1)]).astype(np.float64)
    weights = columns @ (1 / np.maximum(1, columns.sum(axis=0)))
    return BalancedSource(subset.whole, subset.indices, subset.name, weights / weights.sum())
