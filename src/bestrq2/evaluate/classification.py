"""Metrics of classifiers: of one class a clip accuracy, balanced accuracy and macro F1, of several mAP and ROC-AUC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bestrq2.errors import DataError
from bestrq2.evaluate.scores import wilson_interval

RESAMPLES = 500
BEST_BY = {False: "balanced accuracy", True: "macro mAP"}
"""The metric that picks the best epoch, for one class a clip (False) and for several (True)."""

_Weights: TypeAlias = NDArray[np.float64]
_Statistic: TypeAlias = Callable[[_Weights], float]


@dataclass(frozen=True)
class Metric:
    """A share in [0, 1] and its 95 % interval over the choice of clips.

    Attributes:
        name: such as "macro F1".
        score: on all clips.
        low: lower end: Wilson for accuracy, else the bootstrap over clips.
        high: upper end.
        chance: what needs no audio: the most frequent class for accuracy; 1/classes for balanced accuracy; the share of
            positives for mAP (mean over the classes); 0.5 for ROC-AUC; NaN for F1.
    """

    name: str
    score: float
    low: float
    high: float
    chance: float


def point_metrics(targets: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> dict[str, float]:
    """The metrics without intervals.

    Args:
        targets: [clips, classes], 1 for the classes of each clip, else 0; one 1 a clip where not `multi_label`.
        probabilities: float [clips, classes].
        multi_label: whether a clip may have any number of classes.

    Returns:
        "accuracy", "balanced accuracy" and "macro F1", or "macro mAP", "micro mAP" and "macro ROC-AUC". Means are over
        the classes that have clips (for ROC-AUC: some, and not all).

    Raises:
        DataError: no clips, or not one class that can be scored.
    """
    whole = np.ones(len(targets))
    return {name: statistic(whole) for name, statistic in _statistics(targets, probabilities, multi_label).items()}


def log_loss(targets: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> float:
    """Cross-entropy in nats, mean over the clips (and over the classes where a clip may have several)."""
    certain = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    if multi_label:
        return float(-(targets * np.log(certain) + (1 - targets) * np.log1p(-certain)).mean())
    return float(-(targets * np.log(certain)).sum(axis=1).mean())


def metrics_with_intervals(
    targets: np.ndarray, probabilities: np.ndarray, multi_label: bool, seed: int = 0, resamples: int = RESAMPLES
) -> list[Metric]:
    """The metrics of `point_metrics` with 95 % intervals; the arguments are its, and seed and number of draws."""
    count = len(targets)
    statistics = _statistics(targets, probabilities, multi_label)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    found = []
    for name, statistic in statistics.items():
        score = statistic(np.ones(count))
        if name == "accuracy":
            low, high = wilson_interval(round(score * count), count)
        else:
            low, high = _percentiles(score, [statistic(draw) for draw in draws])
        found.append(Metric(name, score, low, high, _chance(name, targets)))
    return found


def _statistics(targets: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> dict[str, _Statistic]:
    if not len(targets):
        raise DataError("There are no clips to score.")
    present = targets.any(axis=0)
    if not multi_label:
        predicted = np.eye(targets.shape[1])[probabilities.argmax(axis=1)]
        right = targets * predicted

        def recalls(weights: _Weights) -> NDArray[np.float64]:
            return _share(weights @ right, weights @ targets)

        def f1(weights: _Weights) -> NDArray[np.float64]:
            return _share(2 * weights @ right, weights @ targets + weights @ predicted)[present]

        return {
            "accuracy": lambda weights: float(weights @ right.sum(axis=1) / weights.sum()),
            "balanced accuracy": lambda weights: _mean(recalls(weights)),
            "macro F1": lambda weights: _mean(f1(weights)),
        }
    if not present.any():
        raise DataError("Not one of the clips to score has a label; give labelled ones.")
    rankings = [Ranking(targets[:, column], probabilities[:, column]) for column in np.flatnonzero(present)]
    everything, classes = Ranking(targets.ravel(), probabilities.ravel()), targets.shape[1]
    return {
        "macro mAP": lambda weights: _mean([one.average_precision(weights) for one in rankings]),
        "micro mAP": lambda weights: everything.average_precision(np.repeat(weights, classes)),
        "macro ROC-AUC": lambda weights: _mean([one.roc_auc(weights) for one in rankings]),
    }


class Ranking:
    """Clips by falling score, sorted once for any weights that clips are given; equal scores count as one.

    Args:
        truth: [clips], 1 for positives, 0 for negatives.
        scores: float [clips].
    """

    def __init__(self, truth: np.ndarray, scores: np.ndarray) -> None:
        self._order = np.argsort(-scores, kind="stable")
        self._truth = truth[self._order].astype(np.float64)
        ranked = scores[self._order]
        self._last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))

    def _counts(self, weights: _Weights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weight of the positives and of all clips at or above each different score."""
        ordered = weights[self._order]
        return np.cumsum(ordered * self._truth)[self._last], np.cumsum(ordered)[self._last]

    def average_precision(self, weights: _Weights) -> float:
        """Precision averaged over the positives, weighted float [clips]; NaN without positives."""
        positives, everything = self._counts(weights)
        if positives[-1] == 0:
            return np.nan
        return float(np.diff(positives, prepend=0) @ _share(positives, everything, 0.0) / positives[-1])

    def roc_auc(self, weights: _Weights) -> float:
        """Share of pairs of a positive and a negative in the right order, equal ones half; NaN without such pairs."""
        positives, everything = self._counts(weights)
        negatives = everything - positives
        if positives[-1] == 0 or negatives[-1] == 0:
            return np.nan
        before = negatives - np.diff(negatives, prepend=0) / 2
        return float(1 - np.diff(positives, prepend=0) @ before / (positives[-1] * negatives[-1]))


def class_table(
    classes: Sequence[str], targets: np.ndarray, probabilities: np.ndarray, multi_label: bool
) -> list[dict[str, str | int | float]]:
    """One row a class: its clips, and precision, recall and F1, or average precision and ROC-AUC; NaN without clips."""
    whole, rows = np.ones(len(targets)), []
    predicted = np.eye(len(classes))[probabilities.argmax(axis=1)]
    for column, name in enumerate(classes):
        truth = targets[:, column].astype(np.float64)
        row: dict[str, str | int | float] = {"class": name, "clips": int(truth.sum())}
        if multi_label:
            ranking = Ranking(truth, probabilities[:, column])
            row |= {"average precision": ranking.average_precision(whole), "ROC-AUC": ranking.roc_auc(whole)}
        else:
            right, guessed, true = (
                float(one.sum()) for one in (truth * predicted[:, column], predicted[:, column], truth)
            )
            row["precision"] = right / guessed if guessed else np.nan
            row["recall"] = right / true if true else np.nan
            row["F1"] = 2 * right / (guessed + true) if true else np.nan
        rows.append(row)
    return rows


def _chance(name: str, targets: np.ndarray) -> float:
    shares = targets.mean(axis=0)
    chances = {
        "accuracy": shares.max(), "balanced accuracy": 1 / np.count_nonzero(shares),
        "macro mAP": shares[shares > 0].mean(), "micro mAP": shares.mean(), "macro ROC-AUC": 0.5,
    }  # fmt: skip
    return float(chances.get(name, np.nan))


def _share(part: np.ndarray, whole: np.ndarray, otherwise: float = np.nan) -> NDArray[np.float64]:
    """The quotient, `otherwise` where there is no whole."""
    return np.divide(part, whole, out=np.full(np.shape(whole), otherwise), where=whole > 0)


def _mean(values: np.ndarray | Sequence[float]) -> float:
    """Mean over what is no NaN; NaN if nothing is."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _percentiles(score: float, drawn: list[float]) -> tuple[float, float]:
    known = np.array(drawn)[~np.isnan(drawn)]
    if not len(known):
        return score, score
    low, high = np.quantile(known, [0.025, 0.975])
    return min(float(low), score), max(float(high), score)
