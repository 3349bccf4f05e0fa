"""What a probe reports: a score with its uncertainty and chance level, and means over tasks and domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from bestrq2.errors import DataError

ACCURACY = "accuracy"
BALANCED_ACCURACY = "balanced accuracy"
Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class ProbeScore:
    """One method on one task with one kind of features; scores are shares in [0, 1].

    Attributes:
        features: name of the features probed.
        task: name of the task, e.g. "music/instrument".
        domain: domain of the task, "" where unknown.
        method: "linear" or "knn".
        metric: "accuracy" for clip tasks, "balanced accuracy" (mean recall of the classes) for frame tasks.
        score: the metric on the test clips.
        low: lower end of the 95 % interval: Wilson for accuracy, bootstrap over clips for balanced accuracy.
        high: upper end of the interval. It covers the choice of test clips, not that of training clips or seeds.
        chance: what needs no audio: always answering the most frequent training class (accuracy on the test clips), or
            one over the number of classes (balanced accuracy).
        n_test: test clips scored; for frame tasks too, since frames of one clip are dependent.
        skipped: clips left out because their audio was rejected, each with split, place and reason.
    """

    features: str
    task: str
    domain: str
    method: str
    metric: str
    score: float
    low: float
    high: float
    chance: float
    n_test: int
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The score as plain JSON types, the inverse of `from_dict`."""
        return {**asdict(self), "skipped": list(self.skipped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbeScore:
        """Rebuild a score from `to_dict`'s result; a DataError names missing, unknown or unreadable fields."""
        known = {field.name for field in fields(cls)}
        missing, unknown = sorted(known - {"skipped"} - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise DataError(f"Not a probe score: missing fields {missing}, unknown fields {unknown}.")
        read: dict[str, Any] = {name: str(values[name]) for name in known & set(values)}
        try:
            read |= {name: float(values[name]) for name in ("score", "low", "high", "chance")}
            read |= {"n_test": int(values["n_test"]), "skipped": tuple(map(str, values.get("skipped", ())))}
        except (TypeError, ValueError) as error:
            raise DataError(f"Not a probe score: a field has the wrong type ({error}).") from error
        return cls(**read)


def wilson_interval(correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of the share `correct`/`n` of independent trials, both ends in [0, 1].

    Raises:
        DataError: for n < 1 or `correct` outside [0, n].
    """
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"A share needs 0 <= correct <= n and n >= 1, but got {correct} of {n}.")
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
        truth: int [frames], true classes.
        predicted: int [frames], predicted classes.
        clip: int [frames], which clip each frame belongs to.
        seed: of the resampling.
        resamples: number of bootstrap draws.

    Returns:
        (score, low, high). Where resampling cannot move the score (0 or 1), the interval is Wilson's over clips.

    Raises:
        DataError: if `truth` holds fewer than two classes, for then guessing that class scores 1.
    """
    classes = np.unique(truth)
    if len(classes) < 2:
        raise DataError(
            f"Balanced accuracy needs at least two classes among the test frames, but found {len(classes)}: "
            "use more test clips."
        )
    clips, row = np.unique(clip, return_inverse=True)
    total = np.zeros((len(clips), len(classes)))
    correct = np.zeros_like(total)
    column = np.searchsorted(classes, truth)
    np.add.at(total, (row, column), 1.0)
    np.add.at(correct, (row, column), (truth == predicted).astype(float))
    score = float((correct.sum(0) / total.sum(0)).mean())

    draws = np.random.default_rng(seed).multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=resamples)
    drawn_total, drawn_correct = draws @ total, draws @ correct
    # a draw without any frame of one class says nothing of its recall and is left out
    whole = (drawn_total > 0).all(axis=1)
    drawn = (drawn_correct[whole] / drawn_total[whole]).mean(axis=1)
    if len(drawn) == 0 or np.ptp(drawn) == 0:
        return score, *wilson_interval(score * len(clips), len(clips))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return score, min(float(low), score), max(float(high), score)


def chance_accuracy(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on the test labels of always answering the most frequent training class (the lowest index of a tie)."""
    classes, counts = np.unique(train_labels, return_counts=True)
    return float((test_labels == classes[counts.argmax()]).mean())


def require_same_tasks(scores: Sequence[ProbeScore]) -> None:
    """Raise a DataError unless every kind of features in `scores` was probed on the same tasks, once each."""
    tasks: dict[str, list[tuple[str, str]]] = {}
    for score in scores:
        tasks.setdefault(score.features, []).append((score.domain, score.task))
    every = {key for keys in tasks.values() for key in keys}
    for features, keys in tasks.items():
        missing = sorted(task for _, task in every - set(keys))
        if missing:
            raise DataError(f"{features} has no score on {', '.join(missing)}: means would compare different tasks.")
        if len(keys) != len(set(keys)):
            raise DataError(f"{features} has several scores on one task: give each kind of features its own name.")


def domain_means(scores: Sequence[ProbeScore], method: str, features: str | None = None) -> dict[str, float]:
    """Mean score of every domain and, under "mean", the mean over domains.

    Args:
        scores: all scores that are compared with each other; those of other methods are ignored.
        method: "linear" or "knn".
        features: whose means; may be left out where `scores` holds one kind of features only.

    Returns:
        {domain: mean over its tasks, ..., "mean": mean over the domains}, domains in order of appearance.

    Raises:
        DataError: if the kinds of features compared were not all probed on the same tasks, or `features` is not there.
    """
    chosen = [score for score in scores if score.method == method]
    require_same_tasks(chosen)
    names = list(dict.fromkeys(score.features for score in chosen))
    if features is None and len(names) == 1:
        features = names[0]
    if features not in names:
        raise DataError(f"Means need one of the features {names} scored by {method!r}, but got {features!r}.")
    by_domain: dict[str, list[float]] = {}
    for score in chosen:
        if score.features == features:
            by_domain.setdefault(score.domain, []).append(score.score)
    means = {domain: float(np.mean(values)) for domain, values in by_domain.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}
