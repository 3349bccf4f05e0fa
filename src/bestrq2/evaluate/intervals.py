"""Intervals of mean scores over test clips and seeds, differences of arms, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.errors import DataError
from bestrq2.evaluate.result import TaskScore

LEVEL = 0.95

Outcomes = Sequence[NDArray[np.float64]]
"""For each task, float64 [seeds, clips]: what each test clip adds to the score of a seed, which is its mean."""


@dataclass(frozen=True)
class Interval:
    """Estimate with half of its 95 % interval.

    Attributes:
        estimate: mean over the seeds, or difference of two such means.
        half_width: half of the interval.
        p_value: two-sided p-value of the hypothesis that the true value is 0.
    """

    estimate: float
    half_width: float
    p_value: float


def mean_interval(seeds: Sequence[Sequence[TaskScore]]) -> Interval:
    """Mean of domains, relative to chance, of one kind of features, with its interval.

    Args:
        seeds: for each seed, the scores on the same tasks by one method. A single seed has the interval over the
            choice of test clips alone.

    Raises:
        DataError: scores lack the outcomes of their clips, or seeds were scored on other tasks or clips.
    """
    return hierarchical_interval([_outcomes(seeds)], _weights(seeds[0]))


def difference_interval(later: Sequence[Sequence[TaskScore]], earlier: Sequence[Sequence[TaskScore]]) -> Interval:
    """Difference of the means of two arms, later minus earlier; see `mean_interval`.

    Test clips are paired, since both arms are scored on the same. Seeds are not: the same seed does not make two arms
    alike, and pairing a few seeds would cost half of the degrees of freedom.
    """
    ours, theirs = _outcomes(later), _outcomes(earlier)
    if [one.task for one in later[0]] != [one.task for one in earlier[0]] or any(
        one.shape[1] != other.shape[1] for one, other in zip(ours, theirs, strict=True)
    ):
        raise DataError("scores on different tasks or clips cannot be compared")
    return hierarchical_interval([ours, [-one for one in theirs]], _weights(later[0]))


def hierarchical_interval(arms: Sequence[Outcomes], weights: NDArray[np.float64]) -> Interval:
    """Interval of the sum over arms of their weighted means over tasks, for new clips and new seeds.

    It has the variance of a hierarchical bootstrap over seeds and test clips, in closed form because means are linear:
    that between clips, averaged over the seeds of all arms, which share them, and that between the seeds of each arm.
    Where seeds differ on single clips, both parts contain it, so it is subtracted once (the bootstrap counts it up to
    three times). Few seeds are accounted for by Student's t, with the degrees of freedom of Welch and Satterthwaite.

    Args:
        arms: outcomes of every arm, with the same tasks and clips; negated where an arm is subtracted.
        weights: weight of each task, float64 [tasks].
    """
    between_clips = estimate = 0.0
    for task, weight in enumerate(weights):
        clips = np.sum([arm[task].mean(axis=0) for arm in arms], axis=0)
        estimate += weight * float(clips.mean())
        between_clips += weight**2 * float(clips.var(ddof=1)) / len(clips)
    variance, spread = between_clips, 0.0
    for arm in arms:
        seeds = len(arm[0])
        if seeds > 1:
            of_seeds = np.sum([weight * one.mean(axis=1) for weight, one in zip(weights, arm, strict=True)], axis=0)
            between_seeds = float(of_seeds.var(ddof=1)) / seeds
            single = sum(weight**2 * _interaction(one) for weight, one in zip(weights, arm, strict=True))
            variance += max(0.0, between_seeds - single)
            spread += between_seeds**2 / (seeds - 1)
    if variance <= 1e-24:  # no clip and no seed differs, up to rounding
        return Interval(estimate, 0.0, 1.0 if abs(estimate) < 1e-12 else 0.0)
    from scipy.stats import t

    error, degrees = math.sqrt(variance), min(1e9, variance**2 / max(spread, 1e-300))
    half = float(t.ppf((1 + LEVEL) / 2, degrees)) * error
    return Interval(estimate, half, 2 * float(t.sf(abs(estimate) / error, degrees)))


def _interaction(outcomes: NDArray[np.float64]) -> float:
    """Variance of the mean of float64 [seeds, clips] by what is neither of a seed nor of a clip."""
    rest = outcomes - outcomes.mean(axis=0) - outcomes.mean(axis=1, keepdims=True) + outcomes.mean()
    seeds, clips = outcomes.shape
    return float((rest**2).sum()) / ((seeds - 1) * (clips - 1) * seeds * clips)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method, in the given order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[int(place)] = largest
    return corrected


def _outcomes(seeds: Sequence[Sequence[TaskScore]]) -> list[NDArray[np.float64]]:
    """Outcomes relative to chance, by task; the relative score is linear in them."""
    found = []
    for scores in zip(*seeds, strict=True):
        sizes = {len(one.clips) for one in scores}
        if sizes == {0} or len(sizes) > 1 or len({one.task for one in scores}) > 1:
            raise DataError(f"the scores on {scores[0].task} lack the same outcomes of test clips for every seed")
        chances = np.array([[one.chance] for one in scores])
        found.append((np.array([one.clips for one in scores]) - chances) / (1 - chances))
    return found


def _weights(scores: Sequence[TaskScore]) -> NDArray[np.float64]:
    """Weights of tasks in the mean of domains."""
    domains = [one.domain for one in scores]
    return np.array([1 / (len(set(domains)) * domains.count(domain)) for domain in domains])
