from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from toy_tasks import FRAME_SECONDS, WaveformFeatures, make_clip_task, make_frame_task

from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.errors import DataError
from bestrq2.evaluate.classifiers import validation_folds
from bestrq2.evaluate.metrics import wilson_interval
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.task_probe import MAX_TRAIN_FRAMES, embed_split, event_present, probe_features


def with_train(task: LabelledTask, **changes) -> LabelledTask:
    return dataclasses.replace(task, train=dataclasses.replace(task.train, **changes))


def with_test(task: LabelledTask, **changes) -> LabelledTask:
    return dataclasses.replace(task, test=dataclasses.replace(task.test, **changes))


def spoil(clips: LabelledClips, places: list[int]) -> LabelledClips:
    audio = [np.full_like(one, np.nan) if place in places else one for place, one in enumerate(clips.audio)]
    return dataclasses.replace(clips, audio=audio)


def without(clips: LabelledClips, places: list[int]) -> LabelledClips:
    kept = [place for place in range(len(clips)) if place not in places]
    labels = clips.labels[kept] if isinstance(clips.labels, np.ndarray) else [clips.labels[place] for place in kept]
    return LabelledClips([clips.audio[place] for place in kept], labels, clips.sampling_rate)


def probe(task: LabelledTask, width: int, **options) -> list[TaskScore]:
    return probe_features(WaveformFeatures(width), [task], progress=False, **options)


def test_separable_classes_are_told_apart_perfectly() -> None:
    task = make_clip_task(noise=0.01)
    for score in probe(task, 12):
        assert (score.score, score.high) == (1.0, 1.0)
        assert score.low == pytest.approx(wilson_interval(120, 120)[0])
        assert (score.features, score.task, score.domain, score.metric) == (
            "waveform",
            "music/toy",
            "music",
            "accuracy",
        )
        assert score.n_test == 120


def test_separable_frames_are_told_apart_perfectly() -> None:
    for score in probe(make_frame_task(noise=0.01), 6):
        assert (score.score, score.chance, score.metric) == (1.0, 0.5, "balanced accuracy")
        assert score.low < 1.0


def test_features_with_some_signal_score_between_chance_and_one() -> None:
    for score in [*probe(make_clip_task(noise=2.0), 12), *probe(make_frame_task(noise=0.7), 6)]:
        assert score.chance < score.low < score.score < score.high < 1


def shuffled(clips: LabelledClips, seed: int) -> LabelledClips:
    order = np.random.default_rng(seed).permutation(len(clips))
    labels = clips.labels
    return dataclasses.replace(
        clips, labels=labels[order] if isinstance(labels, np.ndarray) else [labels[place] for place in order]
    )


def test_intervals_of_shuffled_labels_hold_chance_about_95_percent_of_the_time() -> None:
    held = []
    for seed in range(12):
        # Two even classes, so that guessing is chance: with uneven ones it is worse than the most frequent class.
        clips = with_even_classes(make_clip_task(seed, classes=2, train=150, test=150))
        for task, width in ((clips, 12), (make_frame_task(seed), 6)):
            null = dataclasses.replace(task, train=shuffled(task.train, seed), test=shuffled(task.test, seed + 1))
            held += [score.low < 0.5 < score.high for score in probe(null, width)]
    assert 0.85 < np.mean(held) < 1.0


def with_even_classes(task: LabelledTask) -> LabelledTask:
    splits = {}
    for name, clips in (("train", task.train), ("test", task.test)):
        fewest = np.bincount(clips.labels).min()
        places = np.concatenate([np.flatnonzero(clips.labels == label)[fewest:] for label in np.unique(clips.labels)])
        splits[name] = without(clips, places.tolist())
    return dataclasses.replace(task, **splits)


def test_uneven_classes_are_scored_by_balanced_accuracy() -> None:
    task = make_clip_task(train=300, test=300, even=False)
    found = probe(task, 12)
    assert [(score.metric, score.chance) for score in found] == [("balanced accuracy", 0.25)] * 3
    assert all(score.score > 0.7 for score in found)
    for score in probe(dataclasses.replace(task, train=shuffled(task.train, 0)), 12):
        assert score.low < score.chance < score.high, "the most frequent class is worth nothing"


def test_chance_counts_the_most_frequent_training_class_in_the_test_split() -> None:
    task = make_clip_task(classes=2)
    most = np.bincount(task.train.labels).argmax()
    assert probe(task, 12)[0].metric == "accuracy"
    assert probe(task, 12)[0].chance == (task.test.labels == most).mean()


@pytest.mark.parametrize(("task", "width"), [(make_clip_task(noise=2.0), 12), (make_frame_task(), 6)])
def test_scores_do_not_depend_on_the_batch(task: LabelledTask, width: int) -> None:
    assert probe(task, width, batch=1) == probe(task, width, batch=7) == probe(task, width, batch=500)


def test_each_clip_is_embedded_once_for_all_methods() -> None:
    features, task = WaveformFeatures(12), make_clip_task()
    scores = probe_features(features, [task], progress=False)
    assert [score.method for score in scores] == ["linear", "statistics", "knn"]
    assert sum(features.batches) == len(task.train) + len(task.test)


def test_other_test_clips_and_test_labels_change_no_answer() -> None:
    task = make_clip_task(noise=2.0)
    first = 60
    expected = probe(with_test(task, audio=task.test.audio[:first], labels=task.test.labels[:first]), 12)
    louder = [*task.test.audio[:first], *(1e3 * one for one in task.test.audio[first:])]
    rest = np.full(len(louder) - first, -1)  # never right, so that only the first clips count
    scores = probe(with_test(task, audio=louder, labels=np.concatenate([task.test.labels[:first], rest])), 12)
    for score, alone in zip(scores, expected, strict=True):
        assert round(score.score * len(louder)) == round(alone.score * first)


def test_rejected_clips_are_left_out_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    task, bad = make_clip_task(noise=2.0), [3, 40, 41]
    spoilt = dataclasses.replace(task, train=spoil(task.train, bad), test=spoil(task.test, [0]))
    clean = dataclasses.replace(task, train=without(task.train, bad), test=without(task.test, [0]))
    with caplog.at_level(logging.WARNING):
        scores = probe(spoilt, 12)
    places = [reason.split(":")[0] for reason in scores[0].skipped]
    assert places == ["train clip 3", "train clip 40", "train clip 41", "test clip 0"]
    assert "holds NaN" in scores[0].skipped[0]
    assert scores[0].n_test == 119
    assert "skipped 3 of 160 clips in the train split of music/toy" in caplog.text
    assert [dataclasses.replace(score, skipped=()) for score in scores] == probe(clean, 12)


def test_a_rejected_clip_costs_only_its_own_batch_a_second_try() -> None:
    features, task = WaveformFeatures(12), make_clip_task(train=20, test=8)
    probe_features(features, [with_train(task, audio=spoil(task.train, [9]).audio)], batch=8, progress=False)
    assert features.batches == [8, 8, *[1] * 8, 4, 8]


def test_a_split_without_usable_clips_is_refused() -> None:
    task = make_clip_task(train=10, test=4)
    with pytest.raises(DataError, match=r"test split of music/toy has no usable clip out of 4 \(first: test clip 0"):
        probe(dataclasses.replace(task, test=spoil(task.test, [0, 1, 2, 3])), 12)
    with pytest.raises(DataError, match="no usable clip out of 0"):
        probe(with_train(task, audio=[], labels=np.array([], dtype=np.int64)), 12)


def test_training_clips_of_one_class_are_refused() -> None:
    task = make_clip_task(train=10, test=4)
    with pytest.raises(DataError, match="one class only"):
        probe(with_train(task, labels=np.zeros(10, dtype=np.int64)), 12)


def test_test_frames_of_one_class_are_refused() -> None:
    task = make_frame_task()
    with pytest.raises(DataError, match="environment/present cannot be scored"):
        probe(with_test(task, labels=[np.zeros((0, 2))] * len(task.test)), 6)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    task = make_clip_task(train=10, test=4)
    audio = [one.copy() for one in task.train.audio]
    audio[6][1] = np.inf
    with pytest.raises(DataError, match="not finite for clip 6 of the train split"):
        probe(with_train(task, audio=audio), 12)


def test_a_frame_is_present_when_an_event_covers_its_centre() -> None:
    moments = np.array([0.25, 0.75, 1.25, 1.75])
    assert event_present(moments, np.array([[0.3, 0.75], [1.75, 9.0]])).tolist() == [0, 1, 0, 1]
    assert event_present(moments, np.array([[0.26, 0.74]])).tolist() == [0, 0, 0, 0]
    assert event_present(moments, np.zeros((0, 2))).tolist() == [0, 0, 0, 0]


def test_frame_rows_leave_padding_out() -> None:
    task = make_frame_task()
    rows = embed_split(WaveformFeatures(6), task, "train", batch=16)
    counts = [len(one) // 6 for one in task.train.audio]
    assert np.bincount(rows.clip).tolist() == counts
    np.testing.assert_array_equal(rows.features, np.concatenate([one.reshape(-1, 6) for one in task.train.audio]))
    seconds = sum(float((events[:, 1] - events[:, 0]).sum()) for events in task.train.labels)
    assert 0 < rows.labels.sum() <= seconds / FRAME_SECONDS


def test_frame_tasks_are_fitted_on_a_bounded_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Record:
        def __init__(self, rows, labels, **options) -> None:
            seen.append(len(rows))

        def predict(self, rows):
            return np.zeros(len(rows), dtype=np.int64)

    monkeypatch.setattr("bestrq2.evaluate.task_probe.LinearProbe", Record)
    task = make_frame_task()
    long = [np.random.default_rng(0).normal(size=6 * 1000).astype(np.float32) for _ in range(len(task.train))]
    scores = probe(with_train(task, audio=long), 6, methods=("linear",))
    assert seen == [MAX_TRAIN_FRAMES]
    assert scores[0].score == 0.5, "one answer for all frames is at chance"


@pytest.mark.parametrize("frames", [False, True])
def test_the_same_seed_gives_the_same_scores(frames: bool) -> None:
    task, width = (make_frame_task(), 6) if frames else (make_clip_task(noise=2.0), 12)
    assert probe(task, width, seed=5) == probe(task, width, seed=5)


def test_validation_folds_keep_the_groups_of_clips_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(labels, groups, seed):
        seen.append(groups)
        return validation_folds(labels, groups, seed)

    monkeypatch.setattr("bestrq2.evaluate.classifiers.validation_folds", record)
    task, speakers = make_clip_task(noise=2.0), np.arange(160) // 8
    probe(with_train(task, groups=speakers), 12, methods=("linear",))
    probe(task, 12, methods=("linear",))
    probe(make_frame_task(), 6, methods=("linear",))
    np.testing.assert_array_equal(seen[0], speakers)
    assert seen[1] is None
    np.testing.assert_array_equal(np.unique(seen[2]), np.arange(40))
