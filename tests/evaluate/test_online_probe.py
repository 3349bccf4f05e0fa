from __future__ import annotations

import math

import numpy as np
import pytest
from toy_tasks import WaveformFeatures, make_clip_task, make_frame_task

from bestrq2.evaluate.task_probe import OnlineProbe, probe_features
from bestrq2.inference.embedder import Embeddings


def test_online_probe_names_tasks_domains_and_the_mean() -> None:
    tasks = [make_clip_task(width=6), make_frame_task()]
    results = OnlineProbe(tasks).run(WaveformFeatures(6))
    clip, frame = probe_features(WaveformFeatures(6), tasks, ("linear",), progress=False)
    assert results == {
        "probe/music/toy": clip.score,
        "probe/environment/present": frame.score,
        "probe/music": clip.relative,
        "probe/environment": frame.relative,
        "probe/mean": pytest.approx((clip.relative + frame.relative) / 2),
    }


def test_online_probe_embeds_no_more_clips_than_allowed_and_always_the_same() -> None:
    features = WaveformFeatures(12)
    online = OnlineProbe([make_clip_task(noise=2.0)], max_train=50, max_test=30, batch=16)
    assert online.run(features) == online.run(features)
    assert sum(features.batches) == 2 * 80
    again = OnlineProbe([make_clip_task(noise=2.0)], max_train=50, max_test=30)
    np.testing.assert_array_equal(again.tasks[0].train.labels, online.tasks[0].train.labels)


def test_clips_keep_their_labels_when_tasks_are_cut() -> None:
    task = make_frame_task()
    (part,) = OnlineProbe([task], max_train=10, max_test=10).tasks
    places = [next(i for i, one in enumerate(task.train.audio) if one is audio) for audio in part.train.audio]
    assert places == sorted(places)
    assert all(task.train.labels[place] is events for place, events in zip(places, part.train.labels, strict=True))


class Diverged(WaveformFeatures):
    def embed(self, audio, sampling_rate=None) -> Embeddings:
        embeddings = super().embed(audio, sampling_rate)
        return Embeddings(embeddings.clip * np.nan, embeddings.frames, embeddings.frame_mask, embeddings.timestamps)


def test_an_encoder_that_diverged_gives_nan_instead_of_stopping(caplog: pytest.LogCaptureFixture) -> None:
    results = OnlineProbe([make_clip_task(width=6), make_frame_task()]).run(Diverged(6))
    assert math.isnan(results["probe/music/toy"])
    assert math.isnan(results["probe/music"])
    assert math.isnan(results["probe/mean"])
    assert results["probe/environment"] > 0.1
    assert "not finite" in caplog.text


def test_few_clips_of_many_classes_are_no_reason_for_warnings(recwarn: pytest.WarningsRecorder) -> None:
    OnlineProbe([make_clip_task(classes=30, train=40, test=30)]).run(WaveformFeatures(12))
    assert not recwarn.list


def test_online_probe_without_tasks_reports_nothing() -> None:
    assert OnlineProbe([]).run(WaveformFeatures(6)) == {}
