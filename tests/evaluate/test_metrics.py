"""Metrics of classifiers against numbers worked out by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binomtest
from sklearn import metrics

from bestrq2.errors import DataError
from bestrq2.evaluate.metrics import (
    Z_95,
    accuracy_with_interval,
    balanced_accuracy_with_interval,
    chance_accuracy,
    class_table,
    clip_outcomes,
    is_uneven,
    log_loss,
    metrics_with_intervals,
    point_metrics,
    wilson_interval,
)


def test_mean_average_precision_of_a_case_worked_out_by_hand():
    targets = np.array([[1, 0], [0, 1], [1, 0], [0, 0]])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.7], [0.3, 0.6], [0.2, 0.9]])
    found = point_metrics(targets, probabilities, multi_label=True)
    # first class: positives at ranks 1 and 3, precisions 1 and 2/3; second: its positive at rank 2, precision 1/2
    assert found["macro mAP"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    # all pairs: .9 (one positive, one negative, equal) .8- .7+ .6- .3+: precisions 1/2, 2/4, 3/6
    assert found["micro mAP"] == pytest.approx(1 / 2)
    # first class: 3 of 4 pairs in order; second: 2 of 3
    assert found["macro ROC-AUC"] == pytest.approx((3 / 4 + 2 / 3) / 2)


@pytest.mark.parametrize("ties", [False, True])
def test_several_classes_are_scored_as_by_scikit_learn(ties: bool):
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype(np.float32)
    probabilities = 1 / (1 + np.exp(-(2 * targets + rng.normal(size=targets.shape))))
    probabilities = probabilities.round(1) if ties else probabilities
    found = point_metrics(targets, probabilities, multi_label=True)
    for average in ("macro", "micro"):
        expected = metrics.average_precision_score(targets, probabilities, average=average)
        assert found[f"{average} mAP"] == pytest.approx(expected)
    assert found["macro ROC-AUC"] == pytest.approx(metrics.roc_auc_score(targets, probabilities))
    rows = class_table("abcde", targets, probabilities, multi_label=True)
    assert rows[3]["average precision"] == pytest.approx(
        metrics.average_precision_score(targets[:, 3], probabilities[:, 3])
    )


def test_one_class_is_scored_as_by_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.choice(4, 80, p=[0.6, 0.2, 0.15, 0.05])
    targets = np.eye(4)[truth]
    probabilities = rng.dirichlet(np.ones(4), 80) + 0.4 * targets
    predicted = probabilities.argmax(axis=1)
    found = {one.name: one for one in metrics_with_intervals(targets, probabilities, multi_label=False)}
    assert found["accuracy"].score == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert found["balanced accuracy"].score == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))
    assert found["macro F1"].score == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert all(0 <= one.low < one.score < one.high <= 1 for one in found.values())
    assert found["accuracy"].chance == pytest.approx((truth == 0).mean())
    precision, recall, f1, clips = metrics.precision_recall_fscore_support(truth, predicted)
    for place, row in enumerate(class_table("abcd", targets, probabilities, multi_label=False)):
        assert row["clips"] == clips[place]
        assert [row["precision"], row["recall"], row["F1"]] == pytest.approx(
            [precision[place], recall[place], f1[place]]
        )
    assert log_loss(targets, probabilities, multi_label=False) == pytest.approx(
        -np.log(np.clip(probabilities[np.arange(80), truth], 0, 1)).mean()
    )


def test_classes_without_clips_are_left_out_of_the_means():
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    assert point_metrics(targets, probabilities, multi_label=False)["balanced accuracy"] == 1
    assert point_metrics(targets, probabilities, multi_label=True)["macro mAP"] == 1
    assert np.isnan(class_table("abc", targets, probabilities, multi_label=True)[2]["average precision"])
    with pytest.raises(DataError, match="has a label"):
        point_metrics(np.zeros((3, 3)), probabilities, multi_label=True)


def test_intervals_cover_the_truth_of_repeated_samples():
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.random(100) < 0.4
        scores = truth + rng.normal(size=100)
        (auc,) = (
            one
            for one in metrics_with_intervals(truth[:, None], scores[:, None], multi_label=True, resamples=200)
            if one.name == "macro ROC-AUC"
        )
        covered += auc.low <= 0.7602 <= auc.high  # two normal distributions one deviation apart: Phi(1 / sqrt 2)
    assert covered >= 35


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (1, 10), (37, 50), (200, 400), (399, 400), (12, 12)])
def test_wilson_interval_agrees_with_scipy(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_are_the_shares_whose_normal_test_just_rejects() -> None:
    def distance(share: float) -> float:
        return abs(0.3 - share) - Z_95 * np.sqrt(share * (1 - share) / 60)

    low, high = wilson_interval(18, 60)
    assert low == pytest.approx(brentq(distance, 1e-9, 0.3))
    assert high == pytest.approx(brentq(distance, 0.3, 1 - 1e-9))


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_in_range(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert high > low


def test_accuracy_counts_equal_labels() -> None:
    score, low, high = accuracy_with_interval(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]))
    assert score == 0.75
    assert (low, high) == wilson_interval(3, 4)


def test_outcomes_of_clips_have_the_spread_of_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [360, 60, 30])  # frames of clips of 3: 120, 20 and 10 clips
    clip, predicted = np.arange(450) // 3, np.where(rng.random(450) < 0.9, truth, (truth + 1) % 3)
    score, low, high = balanced_accuracy_with_interval(truth, predicted, clip)
    outcomes = clip_outcomes(truth, predicted, clip, balanced=True)
    assert outcomes.mean() == pytest.approx(score)
    assert 1.96 * outcomes.std() / np.sqrt(150) == pytest.approx((high - low) / 2, rel=0.15)
    perfect = clip_outcomes(truth, truth, clip, balanced=True)
    assert perfect == pytest.approx(np.ones(150)), "classes of different size are no error"
    plain = clip_outcomes(truth, predicted, clip, balanced=False)
    assert plain == pytest.approx((truth == predicted).reshape(150, 3).mean(axis=1))


def test_balanced_accuracy_is_the_mean_recall() -> None:
    truth = np.array([0] * 8 + [1] * 2)
    predicted = np.array([0] * 6 + [1] * 2 + [1, 0])
    clip = np.arange(10) // 2
    score, low, high = balanced_accuracy_with_interval(truth, predicted, clip)
    assert score == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert low < score < high


def simulate_frames(generator: np.random.Generator, clips: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips of 10 frames that are mostly right or mostly wrong together; the expected balanced accuracy is 0.7."""
    present = generator.random((clips, 10)) < generator.uniform(0.1, 0.5, size=(clips, 1))
    right = generator.random((clips, 10)) < generator.choice([0.95, 0.2], p=[2 / 3, 1 / 3], size=(clips, 1))
    truth = present.astype(int)
    return truth.ravel(), np.where(right, truth, 1 - truth).ravel(), np.repeat(np.arange(clips), 10)


def test_bootstrap_over_clips_covers_the_true_score_about_95_percent_of_the_time() -> None:
    generator = np.random.default_rng(0)
    covered = covered_by_frames = 0
    for repeat in range(80):
        truth, predicted, clip = simulate_frames(generator)
        _, low, high = balanced_accuracy_with_interval(truth, predicted, clip, seed=repeat, resamples=400)
        covered += low <= 0.7 <= high
        _, low, high = balanced_accuracy_with_interval(truth, predicted, np.arange(600), seed=repeat, resamples=400)
        covered_by_frames += low <= 0.7 <= high
    assert 0.90 < covered / 80 < 0.985
    assert covered_by_frames / 80 < 0.75, "frames of a clip are dependent, so drawing frames is far too sure"


def test_bootstrap_is_reproducible_and_ignores_the_order_of_frames() -> None:
    truth, predicted, clip = simulate_frames(np.random.default_rng(1))
    first = balanced_accuracy_with_interval(truth, predicted, clip, seed=3)
    order = np.random.default_rng(2).permutation(len(truth))
    assert balanced_accuracy_with_interval(truth[order], predicted[order], clip[order], seed=3) == pytest.approx(first)


def test_perfect_balanced_accuracy_still_has_an_interval() -> None:
    truth = np.tile([0, 1, 1], 20)
    score, low, high = balanced_accuracy_with_interval(truth, truth, np.arange(60) // 3)
    assert (score, high) == (1.0, 1.0)
    assert low == pytest.approx(wilson_interval(20, 20)[0])


def test_balanced_accuracy_of_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="at least two classes"):
        balanced_accuracy_with_interval(np.zeros(5, int), np.zeros(5, int), np.arange(5))


def test_chance_is_the_accuracy_of_the_most_frequent_training_class_on_the_test_clips() -> None:
    train, test = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 1, 2, 2, 0, 2, 1])
    assert chance_accuracy(train, test) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("counts", "uneven"),
    [((90, 10), True), ((60, 40), False), ((13, 17, 21, 17), False), ((40, 5, 5, 5), True), ((7,), False)],
)
def test_classes_are_uneven_where_some_are_rare(counts: tuple[int, ...], uneven: bool) -> None:
    assert is_uneven(np.repeat(np.arange(len(counts)), counts)) == uneven
