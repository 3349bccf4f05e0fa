from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binomtest

from bestrq2.errors import DataError
from bestrq2.evaluate.scores import (
    Z_95,
    ProbeScore,
    accuracy_with_interval,
    balanced_accuracy_with_interval,
    chance_accuracy,
    domain_means,
    wilson_interval,
)


def score_of(features: str, task: str, domain: str, score: float, method: str = "linear") -> ProbeScore:
    return ProbeScore(features, task, domain, method, "accuracy", score, score - 0.1, score + 0.1, 0.25, 100)


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


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(DataError, match="0 <= correct <= n"):
        wilson_interval(correct, n)


def test_accuracy_counts_equal_labels() -> None:
    score, low, high = accuracy_with_interval(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]))
    assert score == 0.75
    assert (low, high) == wilson_interval(3, 4)


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
    for repeat in range(300):
        truth, predicted, clip = simulate_frames(generator)
        _, low, high = balanced_accuracy_with_interval(truth, predicted, clip, seed=repeat, resamples=400)
        covered += low <= 0.7 <= high
        _, low, high = balanced_accuracy_with_interval(truth, predicted, np.arange(600), seed=repeat, resamples=400)
        covered_by_frames += low <= 0.7 <= high
    assert 0.90 < covered / 300 < 0.985
    assert covered_by_frames / 300 < 0.75, "frames of a clip are dependent, so drawing frames is far too sure"


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


def test_domain_means_weigh_domains_equally() -> None:
    scores = [
        score_of("a", "speech/word", "speech", 0.5),
        score_of("a", "speech/voice", "speech", 0.7),
        score_of("a", "music/key", "music", 0.2),
        score_of("a", "music/key", "music", 0.9, method="knn"),
    ]
    assert domain_means(scores, "linear") == pytest.approx({"speech": 0.6, "music": 0.2, "mean": 0.4})


def test_domain_means_of_several_features_need_a_name() -> None:
    scores = [score_of(name, "music/key", "music", value) for name, value in (("a", 0.2), ("b", 0.6))]
    assert domain_means(scores, "linear", "b") == {"music": 0.6, "mean": 0.6}
    with pytest.raises(DataError, match=r"\['a', 'b'\]"):
        domain_means(scores, "linear")


def test_domain_means_refuse_features_probed_on_other_tasks() -> None:
    scores = [score_of("a", "music/key", "music", 0.2), score_of("a", "music/tempo", "music", 0.3)]
    scores.append(score_of("b", "music/key", "music", 0.9))
    with pytest.raises(DataError, match="b has no score on music/tempo"):
        domain_means(scores, "linear", "a")
    with pytest.raises(DataError, match="several scores on one task"):
        domain_means([scores[0], scores[0]], "linear")


def test_scores_round_trip_through_plain_types() -> None:
    score = dataclasses.replace(score_of("a", "music/key", "music", 0.123456789), skipped=("test clip 3: silent",))
    assert ProbeScore.from_dict(score.to_dict()) == score


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "wrong type"),
        ({"skipped": None}, "wrong type"),
        ({"points": 3}, r"unknown fields \['points'\]"),
    ],
)
def test_unreadable_scores_are_named(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ProbeScore.from_dict(score_of("a", "music/key", "music", 0.5).to_dict() | change)


def test_missing_fields_are_named() -> None:
    values = score_of("a", "music/key", "music", 0.5).to_dict()
    del values["low"]
    with pytest.raises(DataError, match=r"missing fields \['low'\]"):
        ProbeScore.from_dict(values)
