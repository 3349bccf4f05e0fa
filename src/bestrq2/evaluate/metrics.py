"""Metrics of classifiers with 95 % intervals: accuracy, balanced accuracy, F1, average precision and ROC-AUC."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bestrq2.errors import DataError

ACCURACY = "accuracy"
BALANCED_ACCURACY = "balanced accuracy"
RANKS = 10
RECALL = f"recall at {RANKS}"
"""Share of queries whose counterpart is among the most similar candidates."""
BEST_BY = {False: BALANCED_ACCURACY, True: "macro mAP"}
"""Metric that picks the best epoch, for one class per clip (False) and for several (True)."""

RESAMPLES = 500
Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""

_Weights: TypeAlias = NDArray[np.float64]
_Statistic: TypeAlias = Callable[[_Weights], float]


@dataclass(frozen=True)
class Metric:
    """Share in [0, 1] and its 95 % interval over the choice of clips.

    Attributes:
        name: name of the metric, such as "macro F1".
        score: value on all clips.
        low: lower end of the interval: Wilson for accuracy, else the bootstrap over clips.
        high: upper end of the interval.
        chance: score that needs no audio: the share of the most frequent class for accuracy; 1/classes for balanced
            accuracy; the share of positives for mAP (mean over the classes); 0.5 for ROC-AUC; NaN for F1.
    """

    name: str
    score: float
    low: float
    high: float
    chance: float


def wilson_interval(correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of the share `correct`/`n` of independent trials, both ends in [0, 1]."""
    share, z2 = correct / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # at 0 and n the formula gives exactly 0 and 1, up to rounding
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


def accuracy_with_interval(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Share of equal entries of two int arrays [clips], with its 95 % Wilson interval: (score, low, high)."""
    correct = int((truth == predicted).sum())
    low, high = wilson_interval(correct, len(truth))
    return correct / len(truth), low, high


def balanced_accuracy_with_interval(
    truth: np.ndarray, predicted: np.ndarray, clip: np.ndarray, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean recall over the classes present in `truth`, with the 95 % percentile interval of a bootstrap over clips.

    Whole clips are drawn, because the frames of one clip are dependent. The draws depend on the seed and the number of
    clips only, so features compared on the same clips see the same resamples.

    Args:
        truth: true classes, int [rows]; a row is a clip, or a frame of one.
        predicted: predicted classes, int [rows].
        clip: clip that each row belongs to, int [rows].
        seed: random seed of the resampling.
        resamples: number of bootstrap draws.

    Returns:
        (score, low, high). Where resampling cannot move the score (0 or 1), the interval is Wilson's over clips.

    Raises:
        DataError: `truth` holds fewer than two classes, since guessing that class would score 1.
    """
    classes = np.unique(truth)
    if len(classes) < 2:
        raise DataError(
            f"Balanced accuracy needs at least two classes among the test labels, but found {len(classes)}: "
            "use more test clips."
        )
    clips, row = np.unique(clip, return_inverse=True)
    total = np.zeros((len(clips), len(classes)))
    correct = np.zeros_like(total)
    column = np.searchsorted(classes, truth)
    np.add.at(total, (row, column), 1.0)
    np.add.at(correct, (row, column), (truth == predicted).astype(float))
    score = float((correct.sum(0) / total.sum(0)).mean())

    # how often each clip is drawn, [resamples, clips]: the sums below then need no loop over resamples
    draws = np.random.default_rng(seed).multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=resamples)
    drawn_total, drawn_correct = draws @ total, draws @ correct
    # a draw without any row of one class says nothing about its recall and is left out
    whole = (drawn_total > 0).all(axis=1)
    drawn = (drawn_correct[whole] / drawn_total[whole]).mean(axis=1)
    if len(drawn) == 0 or np.ptp(drawn) == 0:
        return score, *wilson_interval(score * len(clips), len(clips))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return score, min(float(low), score), max(float(high), score)


def clip_outcomes(truth: np.ndarray, predicted: np.ndarray, clip: np.ndarray, *, balanced: bool) -> np.ndarray:
    """What each test clip contributes to accuracy or balanced accuracy, float64 [clips]; the score is their mean.

    To balanced accuracy it is the score, plus by how much the clip does better than its class, over the class's share
    (its influence function): how many clips a class has is no chance of the draw, and must not widen intervals.
    """
    _, column, counts = np.unique(truth, return_inverse=True, return_counts=True)
    _, row = np.unique(clip, return_inverse=True)
    clips = int(row.max()) + 1
    correct = (truth == predicted).astype(float)
    if not balanced:
        return np.bincount(row, correct, clips) * clips / len(truth)
    recalls = np.bincount(column, correct) / counts
    better = (correct - recalls[column]) / (len(counts) * counts[column])
    return recalls.mean() + np.bincount(row, better, clips) * clips


def chance_accuracy(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on the test labels of always predicting the most frequent training class (the lowest of a tie)."""
    classes, counts = np.unique(train_labels, return_counts=True)
    return float((test_labels == classes[counts.argmax()]).mean())


def is_uneven(labels: np.ndarray) -> bool:
    """Whether classes differ in frequency: the entropy of int [N] labels is below 95 % of its maximum."""
    counts = np.unique(labels, return_counts=True)[1]
    shares = counts / counts.sum()
    return len(counts) > 1 and float(-(shares * np.log(shares)).sum()) < 0.95 * math.log(len(counts))


def point_metrics(targets: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> dict[str, float]:
    """Metrics of predictions without intervals.

    Args:
        targets: 1 for the classes of each clip, else 0, [clips, classes]; exactly one 1 per clip if not `multi_label`.
        probabilities: predictions, float [clips, classes].
        multi_label: whether a clip may have any number of classes.

    Returns:
        "accuracy", "balanced accuracy" and "macro F1", or "macro mAP", "micro mAP" and "macro ROC-AUC". Means are over
        the classes that have clips (for ROC-AUC: some, and not all).

    Raises:
        DataError: there are no clips, or no class can be scored.
    """
    whole = np.ones(len(targets))
    return {name: statistic(whole) for name, statistic in _statistics(targets, probabilities, multi_label).items()}


def log_loss(targets: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> float:
    """Cross-entropy in nats, averaged over the clips (and over the classes where a clip may have several)."""
    certain = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    if multi_label:
        return float(-(targets * np.log(certain) + (1 - targets) * np.log1p(-certain)).mean())
    return float(-(targets * np.log(certain)).sum(axis=1).mean())


def metrics_with_intervals(
    targets: np.ndarray, probabilities: np.ndarray, multi_label: bool, seed: int = 0, resamples: int = RESAMPLES
) -> list[Metric]:
    """Metrics of `point_metrics` with 95 % intervals.

    Args:
        targets: 1 for the classes of each clip, else 0, [clips, classes].
        probabilities: predictions, float [clips, classes].
        multi_label: whether a clip may have any number of classes.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap draws.
    """
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
        raise DataError("None of the clips to score has a label; give labelled ones.")
    rankings = [Ranking(targets[:, column], probabilities[:, column]) for column in np.flatnonzero(present)]
    everything, classes = Ranking(targets.ravel(), probabilities.ravel()), targets.shape[1]
    return {
        "macro mAP": lambda weights: _mean([one.average_precision(weights) for one in rankings]),
        "micro mAP": lambda weights: everything.average_precision(np.repeat(weights, classes)),
        "macro ROC-AUC": lambda weights: _mean([one.roc_auc(weights) for one in rankings]),
    }


class Ranking:
    """Clips sorted once by descending score, for metrics under any weights of the clips; equal scores count as one.

    Args:
        truth: 1 for positives, 0 for negatives, [clips].
        scores: scores of the clips, float [clips].
    """

    def __init__(self, truth: np.ndarray, scores: np.ndarray) -> None:
        self._order = np.argsort(-scores, kind="stable")
        self._truth = truth[self._order].astype(np.float64)
        ranked = scores[self._order]
        self._last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))

    def _counts(self, weights: _Weights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weight of the positives and of all clips at or above each distinct score."""
        ordered = weights[self._order]
        return np.cumsum(ordered * self._truth)[self._last], np.cumsum(ordered)[self._last]

    def average_precision(self, weights: _Weights) -> float:
        """Average precision under weights float [clips]; NaN without positives."""
        positives, everything = self._counts(weights)
        if positives[-1] == 0:
            return np.nan
        return float(np.diff(positives, prepend=0) @ _share(positives, everything, 0.0) / positives[-1])

    def roc_auc(self, weights: _Weights) -> float:
        """Area under the ROC curve under weights float [clips]; NaN without positives or negatives."""
        positives, everything = self._counts(weights)
        negatives = everything - positives
        if positives[-1] == 0 or negatives[-1] == 0:
            return np.nan
        # negatives ranked above each positive, ties counting half (Mann-Whitney)
        before = negatives - np.diff(negatives, prepend=0) / 2
        return float(1 - np.diff(positives, prepend=0) @ before / (positives[-1] * negatives[-1]))


def class_table(
    classes: Sequence[str], targets: np.ndarray, probabilities: np.ndarray, multi_label: bool
) -> list[dict[str, str | int | float]]:
    """One row per class: clips, and precision, recall and F1, or average precision and ROC-AUC; NaN without clips."""
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
    """Quotient `part` / `whole`, `otherwise` where `whole` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), otherwise), where=whole > 0)


def _mean(values: np.ndarray | Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if all are."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _percentiles(score: float, drawn: list[float]) -> tuple[float, float]:
    known = np.array(drawn)[~np.isnan(drawn)]
    if not len(known):
        return score, score
    low, high = np.quantile(known, [0.025, 0.975])
    return min(float(low), score), max(float(high), score)
