"""Splits: the share of each class, words for them, and balanced sampling."""

from __future__ import annotations

import numpy as np
import pytest
from shard_crops import fields

from bestrq2.data.loader import training_rows
from bestrq2.data.sources import ArraySource, SubsetSource
from bestrq2.data.splits import balanced, split_in, stratified_splits


def test_rare_classes_of_several_are_in_every_split():
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 6)) < [0.5, 0.3, 0.1, 0.05, 0.03, 0.01]).astype(np.float32)
    split = stratified_splits(targets, [""] * 400, ["train", "valid", "test"], seed=0)
    assert all(targets[split == one].any(axis=0).all() for one in ("train", "valid", "test"))
    assert [np.mean(split == one) for one in ("train", "valid", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-clean-100-000000.tar", "train"),
        ("wds-audio-eval-0.tar", "test"),
        ("dev_00.tar", "valid"),
        ("Training001.tar", "train"),
        ("trains.tar", ""),
        ("shard-000.tar", ""),
    ],
)
def test_names_of_tars_tell_splits(name, split):
    assert split_in(name) == split


def test_balanced_recordings_of_rare_classes_come_as_often_as_others():
    targets = np.zeros((100, 2), np.float32)
    targets[:10, 0] = targets[10:, 1] = 1
    source = SubsetSource(ArraySource(np.ones((100, 4000), np.float32), 16_000), np.arange(100), "all")
    rows = training_rows(balanced(source, targets), fields(), 3)
    drawn = [[one.recording for row in range(len(rows)) for one in rows.segments(epoch, row)] for epoch in range(40)]
    assert targets[np.concatenate(drawn)].mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert len(drawn[0]) == 100
    assert drawn[0] != drawn[1]
