"""The two classifiers probes use: a logistic regression whose regularisation is chosen on training data, and k-NN.

Nothing here sees test labels, and each test row is answered on its own: the other test rows do not matter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

REGULARISATION_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths C of the logistic regression (as scikit-learn defines it), strongest regularisation first."""
FOLDS = 4
ROWS_FOR_ONE_FOLD = 1500
"""From this many training rows on, one validation fold is large enough to choose C by."""


@dataclass(frozen=True)
class Standardiser:
    """Brings every feature to mean 0 and standard deviation 1 on the training rows.

    Attributes:
        mean: float64 [D].
        scale: float64 [D]; infinite for features that do not vary, so that they become 0.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray) -> Standardiser:
        """Mean and deviation of float [N, D] training rows."""
        rows = np.asarray(rows, dtype=np.float64)
        mean, deviation = rows.mean(axis=0), rows.std(axis=0)
        # float32 noise around a constant is not information
        return cls(mean, np.where(deviation > 1e-6 * np.abs(mean), deviation, np.inf))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Standardise float [N, D] rows to float64."""
        return (np.asarray(rows, dtype=np.float64) - self.mean) / self.scale


def stratified_folds(labels: np.ndarray, seed: int, folds: int = FOLDS) -> np.ndarray:
    """Deal rows to folds class by class: int [N] in [0, folds), or -1 (never held out) for the only row of a class."""
    generator = np.random.default_rng(seed)
    fold = np.full(len(labels), -1)
    dealt = 0
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            fold[rows] = (dealt + np.arange(len(rows))) % folds
            dealt += len(rows)
    return fold


def grouped_folds(groups: np.ndarray, seed: int, folds: int = FOLDS) -> np.ndarray:
    """Deal whole groups of rows to folds: int [N] in [0, folds), equal for rows of equal `groups` [N]."""
    names, group = np.unique(groups, return_inverse=True)
    return np.random.default_rng(seed).permutation(np.arange(len(names)) % folds)[group]


def linear_predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, groups: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Classes of the test rows by multinomial logistic regression on standardised features.

    C is the value of `REGULARISATION_GRID` with the best mean score over validation folds of the training rows (the
    strongest regularisation of a tie); the model is then fitted on all training rows.

    Args:
        train: float [N, D].
        labels: int [N], at least two classes.
        test: float [M, D].
        groups: int [N], the clip of each row, for frame tasks: folds then keep clips whole, and classes weigh the same
            however frequent they are, because balanced accuracy is what is scored. None: rows are independent clips.
        seed: of the folds.

    Returns:
        int [M], values out of `labels`.
    """
    standardise = Standardiser.fit(train)
    rows = standardise(train)
    balanced = groups is not None
    fold = stratified_folds(labels, seed) if groups is None else grouped_folds(groups, seed)
    with warnings.catch_warnings():
        # of few clips a class, scikit-learn asks whether this is a regression
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        strength = choose_regularisation(rows, labels, fold, balanced=balanced)
        model = _logistic_regression(balanced).set_params(C=strength).fit(rows, labels)
    return np.asarray(model.predict(standardise(test)))


def choose_regularisation(rows: np.ndarray, labels: np.ndarray, fold: np.ndarray, *, balanced: bool) -> float:
    """The C of the best validation score; the middle of the grid where no fold can be held out.

    Args:
        rows: float64 [N, D], standardised.
        labels: int [N].
        fold: int [N], the fold in which each row is held out, or -1.
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
        return REGULARISATION_GRID[len(REGULARISATION_GRID) // 2]
    return REGULARISATION_GRID[int(np.mean(scores, axis=0).argmax())]


def knn_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int = 10,
    temperature: float = 0.07,
    balanced: bool = False,
) -> np.ndarray:
    """Classes of the test rows by the votes of their k most similar training rows.

    Similarity is the cosine; a neighbour's vote weighs exp(similarity / temperature), as in X-ARES. The cosine is taken
    of the rows as they are given.

    Args:
        train: float [N, D].
        labels: int [N].
        test: float [M, D].
        k: number of neighbours, at most N are used.
        temperature: of the votes.
        balanced: divide every vote by the frequency of its class among `labels`, for balanced accuracy.

    Returns:
        int [M], values out of `labels`.
    """
    classes, column, counts = np.unique(labels, return_inverse=True, return_counts=True)
    votes_of = np.eye(len(classes))[column] / (counts if balanced else 1)
    k = min(k, len(train))
    train, test = _unit_rows(train), _unit_rows(test)
    answers = []
    for row in range(0, len(test), 512):
        similarity = test[row : row + 512] @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        closeness = np.take_along_axis(similarity, nearest, axis=1)
        # subtracting the row's maximum leaves the ranking of the classes and keeps exp in range
        weight = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / temperature)
        answers.append(np.einsum("mk,mkc->mc", weight, votes_of[nearest]).argmax(axis=1))
    return classes[np.concatenate(answers)] if answers else classes[:0]


def _logistic_regression(balanced: bool):  # type: ignore[no-untyped-def]
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000, warm_start=True, class_weight="balanced" if balanced else None)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
