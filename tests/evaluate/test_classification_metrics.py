"""Metrics of classifiers against numbers worked out by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from bestrq2.errors import DataError
from bestrq2.evaluate.classification import class_table, log_loss, metrics_with_intervals, point_metrics


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
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = rng.random(100) < 0.4
        scores = truth + rng.normal(size=100)
        (auc,) = (
            one
            for one in metrics_with_intervals(truth[:, None], scores[:, None], multi_label=True, resamples=200)
            if one.name == "macro ROC-AUC"
        )
        covered += auc.low <= 0.7602 <= auc.high  # two normal distributions one deviation apart: Phi(1 / sqrt 2)
    assert covered >= 52
