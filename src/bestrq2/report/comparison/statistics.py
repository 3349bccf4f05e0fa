"""Means over seeds and differences between arms, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds.

    Attributes:
        mean: mean of `values`.
        half_width: half of the 95 % interval by Student's t with n - 1 degrees of freedom; None for a single value.
        values: one value per seed.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Mean of one arm minus that of another, with half of its 95 % interval by Welch's t."""

    difference: float
    half_width: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.difference) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values, at least one."""
    numbers = np.asarray(values, dtype=np.float64)
    half = None
    if len(numbers) > 1:
        half = _quantile(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Estimate(float(numbers.mean()), half, tuple(map(float, numbers)))


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Difference of the means of two independent samples of at least two values each, variances not assumed equal."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    difference = float(one.mean() - two.mean())
    a, b = float(one.var(ddof=1)) / len(one), float(two.var(ddof=1)) / len(two)
    if a + b == 0:
        return Difference(difference, 0.0)
    # Welch-Satterthwaite in relative variances, since the squares of tiny ones would underflow
    share = a / (a + b)
    degrees = 1 / (share**2 / (len(one) - 1) + (1 - share) ** 2 / (len(two) - 1))
    return Difference(difference, _quantile(degrees) * math.sqrt(a + b))


@dataclass(frozen=True)
class Spread:
    """Spread between seeds, assumed to be the same in all arms.

    Attributes:
        deviation: standard deviation between seeds of one arm, pooled over arms.
        degrees: degrees of freedom of the deviation.
    """

    deviation: float
    degrees: int

    def least_difference(self, first: int, second: int) -> float:
        """Fisher's least significant difference at 95 % between means of that many seeds each."""
        return _quantile(self.degrees) * self.deviation * math.sqrt(1 / first + 1 / second)


def pooled_spread(samples: Sequence[Sequence[float]]) -> Spread | None:
    """Spread within samples of at least two values each; None where there is no such sample."""
    several = [np.asarray(one, dtype=np.float64) for one in samples if len(one) > 1]
    degrees = sum(len(one) - 1 for one in several)
    if not degrees:
        return None
    squares = sum(float(((one - one.mean()) ** 2).sum()) for one in several)
    return Spread(math.sqrt(squares / degrees), degrees)


def _quantile(degrees: float) -> float:
    """Two-sided 95 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, degrees))
