"""Classifiers of probes: a logistic regression regularised by validation, and k nearest neighbours.

Nothing here sees test labels, and each test row is predicted on its own: other test rows do not matter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

REGULARISATION_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths C of the logistic regression (as scikit-learn defines it), strongest regularisation first."""
FOLDS = 3
ROWS_FOR_ONE_FOLD = 1500
"""From this many training rows on, one validation fold is large enough to choose C by."""
# Far above what lbfgs needs on standardised features for every C of the grid (at most a few hundred).
MAX_ITERATIONS = 10_000
TOLERANCE = 1e-5
"""Largest entry of the gradient of the mean loss at which a fit has converged."""


@dataclass(frozen=True)
class Standardiser:
    """Scales every feature to mean 0 and standard deviation 1 on the training rows.

    Attributes:
        mean: mean of every feature, float64 [D].
        scale: standard deviation, float64 [D]; infinite for features that do not vary, so that they become 0.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray) -> Standardiser:
        """Measure mean and deviation of training rows, float [N, D]."""
        rows = np.asarray(rows, dtype=np.float64)
        mean, deviation = rows.mean(axis=0), rows.std(axis=0)
        # float32 noise around a constant is not information
        return cls(mean, np.where(deviation > 1e-6 * np.abs(mean), deviation, np.inf))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Standardise rows, float [N, D], to float64."""
        return (np.asarray(rows, dtype=np.float64) - self.mean) / self.scale


class LinearProbe:
    """Multinomial logistic regression on standardised features, with C chosen on validation folds of the training rows.

    C is the value of `REGULARISATION_GRID` with the best mean score over the folds, the strongest regularisation of a
    tie; the model is then fitted to all training rows.

    Where there are more features than rows, the rows are first rotated into the space that they span. The weights of an
    L2-regularised regression lie in that space, so the model is the same and the fit is faster.

    Args:
        rows: training features, float [N, D].
        labels: classes, int [N], at least two different ones.
        groups: group of each row, int [N], e.g. the clip of a frame or the speaker of a clip; folds keep groups whole.
            None for independent rows.
        balanced: weigh all classes equally in the loss and in the score that C is chosen by.
        seed: random seed of the folds.

    Attributes:
        regularisation: the chosen C.
        validation_score: mean score over the folds for that C; NaN where no fold could be held out.
    """

    def __init__(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        *,
        groups: np.ndarray | None = None,
        balanced: bool = False,
        seed: int = 0,
    ) -> None:
        self._standardise = Standardiser.fit(rows)
        standardised = self._standardise(rows)
        self._basis = row_space(standardised)
        projected = self._project(standardised)
        fold = validation_folds(labels, groups, seed)
        with _fitting():
            self.regularisation, self.validation_score = choose_regularisation(
                projected, labels, fold, balanced=balanced
            )
            self._model = _logistic_regression(balanced).set_params(C=self.regularisation).fit(projected, labels)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Predict the classes, int [M], of features float [M, D]."""
        return np.asarray(self._model.predict(self._project(self._standardise(rows))))

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Predict the probability of every class, float [M, classes], of features float [M, D]."""
        return np.asarray(self._model.predict_proba(self._project(self._standardise(rows))))

    def _project(self, standardised: np.ndarray) -> np.ndarray:
        return standardised if self._basis is None else standardised @ self._basis


def row_space(rows: np.ndarray) -> np.ndarray | None:
    """Orthonormal basis, float64 [D, N], of the space spanned by float [N, D] rows; None if N >= D."""
    if len(rows) >= rows.shape[1]:
        return None
    # the columns of Q span the space of the rows, so projecting on them keeps all inner products
    return np.asarray(np.linalg.qr(rows.T)[0])


def validation_folds(labels: np.ndarray, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """Assign rows to validation folds, stratified by class, with groups kept whole.

    Args:
        labels: classes, int [N]; a group counts for its most frequent class.
        groups: group of each row, int [N]; None for independent rows.
        seed: random seed.

    Returns:
        Fold of each row, int [N] in [0, FOLDS), or -1 (never held out) for the only group of a class.
    """
    names, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    classes, column = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (group, column), 1)
    main_class = counts.argmax(axis=1)
    generator, dealt = np.random.default_rng(seed), 0
    fold = np.full(len(names), -1)
    # dealing goes on where the previous class ended, so that folds are of about the same size
    for label in range(len(classes)):
        members = generator.permutation(np.flatnonzero(main_class == label))
        if len(members) > 1:
            fold[members] = (dealt + np.arange(len(members))) % FOLDS
            dealt += len(members)
    return fold[group]


def choose_regularisation(
    rows: np.ndarray, labels: np.ndarray, fold: np.ndarray, *, balanced: bool
) -> tuple[float, float]:
    """The C with the best validation score, and that score; the middle of the grid and NaN without a fold to hold out.

    Args:
        rows: standardised features, float64 [N, D].
        labels: classes, int [N].
        fold: fold in which each row is held out, int [N], or -1.
        balanced: weigh classes equally in the loss and in the score.
    """
    scores: list[list[float]] = []
    for held_out in range(1 if len(rows) >= ROWS_FOR_ONE_FOLD else FOLDS):
        fit, check = fold != held_out, fold == held_out
        if not check.any() or len(np.unique(labels[fit])) < 2:
            continue
        model = _logistic_regression(balanced)  # each C starts from the solution of the one before
        truth = labels[check]
        scores.append([])
        for strength in REGULARISATION_GRID:
            right = model.set_params(C=strength).fit(rows[fit], labels[fit]).predict(rows[check]) == truth
            share = np.mean([right[truth == label].mean() for label in np.unique(truth)]) if balanced else right.mean()
            scores[-1].append(float(share))
    if not scores:
        return REGULARISATION_GRID[len(REGULARISATION_GRID) // 2], math.nan
    means = np.mean(scores, axis=0)
    return REGULARISATION_GRID[int(means.argmax())], float(means.max())


def knn_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int = 10,
    temperature: float = 0.07,
    balanced: bool = False,
) -> np.ndarray:
    """Predict classes by the votes of the k most similar training rows.

    Similarity is the cosine of the rows as they are given; a vote weighs exp(similarity / temperature), as in X-ARES.

    Args:
        train: training features, float [N, D].
        labels: classes, int [N].
        test: features to classify, float [M, D].
        k: number of neighbours, at most N are used.
        temperature: temperature of the votes.
        balanced: divide every vote by the frequency of its class among `labels`, for balanced accuracy.

    Returns:
        Values of `labels`, int [M]; the lowest of a tie.
    """
    from sklearn.neighbors import KNeighborsClassifier

    classes, counts = np.unique(labels, return_counts=True)
    if len(test) == 0:
        return classes[:0]

    def weight(distance: np.ndarray) -> np.ndarray:
        # relative to the nearest neighbour: the ranking of the classes stays, and exp stays in range
        return np.asarray(np.exp((distance.min(axis=1, keepdims=True) - distance) / temperature))

    model = KNeighborsClassifier(min(k, len(train)), weights=weight, metric="cosine", algorithm="brute")
    with _fitting():
        votes = model.fit(train, labels).predict_proba(test)
    return np.asarray(classes[(votes / (counts if balanced else 1)).argmax(axis=1)])


@contextmanager
def _fitting() -> Iterator[None]:
    """One BLAS thread, and no suspicion of a regression where classes have few clips each."""
    # BLAS threads cost more than they gain on matrices of this size
    with threadpool_limits(limits=1, user_api="blas"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        yield


def _logistic_regression(balanced: bool) -> Any:
    from sklearn.linear_model import LogisticRegression

    weight = "balanced" if balanced else None
    return LogisticRegression(
        solver="lbfgs", max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True, class_weight=weight
    )
