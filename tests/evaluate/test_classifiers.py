from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq2.evaluate.classifiers import (
    FOLDS,
    MAX_ITERATIONS,
    REGULARISATION_GRID,
    TOLERANCE,
    LinearProbe,
    Standardiser,
    choose_regularisation,
    knn_predict,
    row_space,
    validation_folds,
)


def linear_predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, **options) -> np.ndarray:
    return LinearProbe(train, labels, **options).predict(test)


def correlated_rows(seed: int, n: int = 300, width: int = 20, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Rows with offsets, very different scales and correlations; classes overlap. Same classes for every seed."""
    world = np.random.default_rng(99)
    centres, mixing = 0.6 * world.normal(size=(classes, width)), world.normal(size=(width, width))
    scales, offset = 10.0 ** world.uniform(-3, 2, width), world.normal(size=width) * 50
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    rows = (centres[labels] + generator.normal(size=(n, width))) @ mixing * scales + offset
    return rows, labels


def test_linear_predictions_are_those_of_a_scikit_learn_pipeline() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train, labels), (test, _) = correlated_rows(0), correlated_rows(1, n=1000)
    rows = Standardiser.fit(train)(train)
    strength, _ = choose_regularisation(rows, labels, validation_folds(labels, None, seed=0), balanced=False)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=strength, solver="newton-cg", max_iter=1000))
    expected = pipeline.fit(train, labels).predict(test)
    assert (linear_predict(train, labels, test) == expected).mean() >= 0.999


def test_chosen_regularisation_is_near_the_best_of_cross_validation() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    train, labels = correlated_rows(0)
    rows = Standardiser.fit(train)(train)
    chosen, _ = choose_regularisation(rows, labels, validation_folds(labels, None, seed=0), balanced=False)
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    shares = {
        strength: cross_val_score(LogisticRegression(C=strength, max_iter=1000), rows, labels, cv=folds).mean()
        for strength in REGULARISATION_GRID
    }
    assert shares[chosen] > max(shares.values()) - 0.02
    assert max(shares.values()) - min(shares.values()) > 0.05, "the choice must matter for this test to mean anything"


@pytest.mark.parametrize("method", [linear_predict, knn_predict])
def test_other_test_rows_change_no_answer(method) -> None:
    (train, labels), (test, _) = correlated_rows(0), correlated_rows(1)
    expected = method(train, labels, test)
    other = test.copy()
    other[50:] = 1e4 * other[50:] + 7
    np.testing.assert_array_equal(method(train, labels, other)[:50], expected[:50])
    np.testing.assert_array_equal(method(train, labels, test[:50]), expected[:50])


def test_linear_answers_are_reproducible_and_ignore_scale_and_offset_of_features() -> None:
    (train, labels), (test, _) = correlated_rows(0), correlated_rows(1)
    expected = linear_predict(train, labels, test)
    np.testing.assert_array_equal(linear_predict(train, labels, test), expected)
    assert (linear_predict(3e3 * train - 5, labels, 3e3 * test - 5) == expected).mean() > 0.99


def test_constant_features_with_rounding_noise_do_not_disturb() -> None:
    (train, labels), (test, _) = correlated_rows(0), correlated_rows(1)
    generator = np.random.default_rng(0)

    def with_constant(rows: np.ndarray) -> np.ndarray:
        return np.hstack([rows, 50 * (1 + 1e-8 * generator.normal(size=(len(rows), 3))), np.zeros((len(rows), 2))])

    expected = linear_predict(train, labels, test)
    np.testing.assert_array_equal(linear_predict(with_constant(train), labels, with_constant(test)), expected)


def test_balanced_fit_finds_a_rare_class() -> None:
    generator = np.random.default_rng(0)
    clip = np.repeat(np.arange(200), 10)
    labels = (generator.random(2000) < 0.05).astype(int)
    rows = generator.normal(size=(2000, 4)) + labels[:, None]
    recall = {
        balanced: (linear_predict(rows, labels, rows, groups=groups, balanced=balanced)[labels == 1] == 1).mean()
        for balanced, groups in ((True, clip), (False, None))
    }
    assert recall[True] > 0.75
    assert recall[False] < 0.6
    neighbours = [
        (knn_predict(rows, labels, rows + 0.01, balanced=flag)[labels == 1] == 1).mean() for flag in (True, False)
    ]
    assert neighbours[0] > neighbours[1]


def test_answers_are_the_labels_themselves() -> None:
    rows = np.array([[0.0, 1], [0, 2], [1, 0], [2, 0]] * 5)
    labels = np.array([3, 3, 8, 8] * 5)
    for method in (linear_predict, knn_predict):
        assert method(rows, labels, np.array([[0.0, 3], [3, 0]])).tolist() == [3, 8]


def test_a_class_with_one_example_is_never_held_out() -> None:
    labels = np.array([0] * 10 + [1] * 9 + [2])
    folds = validation_folds(labels, None, seed=0)
    assert folds[-1] == -1
    rows = np.random.default_rng(0).normal(size=(20, 3))
    assert set(linear_predict(rows, labels, rows)) <= {0, 1, 2}


def test_two_examples_are_enough_to_answer() -> None:
    rows = np.array([[0.0], [1.0]])
    assert linear_predict(rows, np.array([0, 1]), rows).tolist() == [0, 1]
    assert linear_predict(rows, np.array([0, 1]), rows, groups=np.array([5, 9])).tolist() == [0, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 3))
def test_folds_are_even_and_keep_the_shares_of_classes(labels: list[int], seed: int) -> None:
    labels_array = np.array(labels)
    folds = validation_folds(labels_array, None, seed)
    sizes = np.bincount(folds[folds >= 0], minlength=FOLDS)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        counts = np.bincount(folds[(labels_array == label) & (folds >= 0)], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1


def test_folds_keep_groups_whole_and_spread_their_classes() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), generator.integers(1, 9, 30))
    labels = (groups % 3 == 0).astype(int)  # one class has a third of the groups
    folds = validation_folds(labels, groups, seed=1)
    assert all(len(set(folds[groups == group])) == 1 for group in range(30))
    assert set(folds) == set(range(FOLDS))
    for fold in range(FOLDS):
        assert 3 <= len(set(groups[(folds == fold) & (labels == 1)])) <= 4


@pytest.mark.parametrize("balanced", [False, True])
def test_the_probe_in_the_space_of_few_rows_is_that_of_all_features(balanced: bool) -> None:
    """Weights of an L2-regularised regression lie in the space of the training rows, so nothing is lost."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (train, labels), (test, _) = correlated_rows(0, n=80, width=300), correlated_rows(1, n=200, width=300)
    probe = LinearProbe(train, labels, balanced=balanced)
    scaler = StandardScaler().fit(train)
    assert row_space(scaler.transform(train)).shape == (300, 80)
    weight = "balanced" if balanced else None
    whole = LogisticRegression(C=probe.regularisation, class_weight=weight, max_iter=10_000, tol=1e-8)
    whole.fit(scaler.transform(train), labels)
    expected = whole.predict_proba(scaler.transform(test))
    np.testing.assert_allclose(probe.probabilities(test), expected, atol=2e-3)
    assert (probe.predict(test) == whole.predict(scaler.transform(test))).mean() >= 0.99


@pytest.mark.parametrize(("rows", "width", "balanced"), [(60, 256, False), (300, 20, False), (300, 20, True)])
def test_the_probe_converges(rows: int, width: int, balanced: bool, recwarn: pytest.WarningsRecorder) -> None:
    """At the solution the gradient of the penalised loss, written out in numpy, is zero up to the tolerance."""
    train, labels = correlated_rows(0, n=rows, width=width)
    probe = LinearProbe(train, labels, balanced=balanced)
    standardised = Standardiser.fit(train)(train)
    basis = row_space(standardised)
    inputs = standardised if basis is None else standardised @ basis
    weights = rows / (5 * np.bincount(labels)[labels]) if balanced else np.ones(rows)
    error = (probe.probabilities(train) - np.eye(5)[labels]) * weights[:, None]
    gradient = error.T @ inputs / rows + probe._model.coef_ / (probe.regularisation * rows)
    assert np.abs(gradient).max() <= TOLERANCE
    assert np.abs(error.sum(axis=0) / rows).max() <= TOLERANCE
    assert probe._model.n_iter_[0] < MAX_ITERATIONS
    LinearProbe(train, np.arange(rows) // 2)  # two clips per class
    assert not recwarn.list


def test_knn_matches_a_case_worked_by_hand() -> None:
    # Unit vectors at 0, 20, 40 and 180 degrees; the question points to 5 degrees.
    angles = np.deg2rad([0, 20, 40, 180])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [5], [0.1], [2]]
    labels = np.array([0, 1, 1, 1])
    question = np.array([[np.cos(np.deg2rad(5)), np.sin(np.deg2rad(5))]]) * 3
    # Votes at T = 0.07: class 0 exp(cos 5 / T); class 1 exp(cos 15 / T) + exp(cos 35 / T): 0.9962 against two.
    weights = np.exp(np.cos(np.deg2rad([5, 15, 35])) / 0.07)
    assert weights[0] > weights[1] + weights[2]
    assert knn_predict(train, labels, question, k=3).tolist() == [0]
    # At T = 1 the two neighbours of class 1 outvote the nearest; with one neighbour they cannot.
    assert knn_predict(train, labels, question, k=3, temperature=1.0).tolist() == [1]
    assert knn_predict(train, labels, question, k=1, temperature=1.0).tolist() == [0]
    # Divided by class frequencies (1 and 3), the nearest wins again.
    assert knn_predict(train, labels, question, k=3, temperature=1.0, balanced=True).tolist() == [0]


def test_classes_of_one_clip_are_no_suspicion_of_a_regression(recwarn: pytest.WarningsRecorder) -> None:
    rows = np.eye(4)
    assert knn_predict(rows, np.arange(4), rows, k=1).tolist() == [0, 1, 2, 3]
    assert not recwarn.list
