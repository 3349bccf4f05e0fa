"""soundworld-1: what is frozen, how frames are judged, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_benchmark import SMALL
from toy_tasks import WaveformFeatures

import bestrq2
from bestrq2 import soundworld
from bestrq2.cli import run
from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate import benchmark as module
from bestrq2.evaluate.adam_probe import adam_probe_predict
from bestrq2.evaluate.benchmark import (
    SOUNDWORLD_1,
    grid_points,
    nearest_frames,
    predictions_on_grid,
    run_benchmark,
)
from bestrq2.evaluate.classifiers import knn_predict
from bestrq2.evaluate.metrics import balanced_accuracy_with_interval
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.score_table import all_means
from bestrq2.evaluate.task_probe import ProbeRows, embed_split


def test_the_frozen_protocol_is_what_it_was():
    """A change here makes old and new scores incomparable: give it another name instead."""
    protocol = SOUNDWORLD_1.protocol()
    tasks = protocol.pop("tasks")
    assert protocol == {
        "train": 400,
        "test": 200,
        "world_seed": 0,
        "soundworld_version": "2",
        "synthesiser": "espeak",
        "epochs": 100,
        "batch_clips": 32,
        "lr": 0.001,
        "seed": 42,
        "knn_k": 10,
        "knn_temperature": 0.07,
        "frame_grid_seconds": 0.04,
    }
    assert [task["name"] for task in tasks] == [
        "speech/language",
        "speech/voice",
        "speech/word",
        "speech/speakers",
        "music/instrument",
        "music/chord",
        "music/key",
        "music/tempo",
        "music/melody",
        "environment/event",
        "environment/count",
        "environment/rhythm",
        "environment/distance",
        "environment/presence",
    ]
    assert json.loads(json.dumps(SOUNDWORLD_1.protocol())) == SOUNDWORLD_1.protocol()


def test_the_frozen_tasks_are_soundworlds():
    for task in SOUNDWORLD_1.tasks:
        spec = soundworld.TASKS[task.name]
        assert task.domain == spec.domain == task.name.split("/")[0]
        assert task.metric == ("balanced accuracy" if spec.kind == "frame" else "accuracy")


def test_the_benchmark_asks_for_the_frozen_audio(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def tasks(names, train, test, seed, progress):
        asked.append((names, train, test, seed))
        return []

    monkeypatch.setattr(soundworld, "synthesiser", lambda: "espeak")
    monkeypatch.setattr(module, "soundworld_tasks", tasks)
    assert run_benchmark([WaveformFeatures(6)]) == []
    assert asked == [([task.name for task in SOUNDWORLD_1.tasks], 400, 200, 0)]


def test_scores_are_those_of_the_probe_on_clip_tasks(small):
    scores = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    assert [(score.task, score.method) for score in scores] == [
        (task.name, method) for task in SMALL.tasks for method in ("linear", "knn")
    ]
    train, test = (embed_split(WaveformFeatures(6), small[1], split) for split in ("train", "test"))
    linear = adam_probe_predict(train.features, train.labels, test.features, epochs=2, batch=32, lr=1e-3, seed=42)
    nearest = knn_predict(train.features, train.labels, test.features)
    assert [score.score for score in scores[2:4]] == [(linear == test.labels).mean(), (nearest == test.labels).mean()]
    assert {score.n_test for score in scores} == {30}
    assert [score.metric for score in scores[3:5]] == ["accuracy", "balanced accuracy"]
    assert scores[4].chance == 0.5


def test_domains_count_the_same_in_the_mean(small):
    means = all_means(run_benchmark([WaveformFeatures(6)], SMALL, progress=False))
    linear = means["waveform"]["linear"]
    assert list(linear) == ["speech", "music", "environment", "mean"]
    assert linear["mean"] == pytest.approx((linear["speech"] + linear["music"] + linear["environment"]) / 3)


def test_the_same_features_get_the_same_scores_again(small):
    first = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert run_benchmark([WaveformFeatures(6)], SMALL, progress=False) == first


def test_grid_points_are_the_centres_of_40_ms():
    clips = LabelledClips([np.zeros(size, np.float32) for size in (80_000, 1919, 1920, 100)], [None] * 4, 16_000)
    points = grid_points(clips, 0.04)
    assert [len(one) for one in points] == [125, 2, 3, 1]
    np.testing.assert_allclose(points[0][[0, 1, -1]], [0.02, 0.06, 4.98])
    np.testing.assert_allclose(points[3], [0.02])
    with pytest.raises(DataError, match="needs waveforms"):
        grid_points(LabelledClips([Path("a.wav")], [None]), 0.04)


def test_each_point_takes_the_nearest_frame_and_the_earlier_of_two():
    frames = (np.arange(3) + 0.5) * 0.08  # 0.04, 0.12, 0.20
    points = (np.arange(8) + 0.5) * 0.04  # 0.02, 0.06, 0.10, ...
    assert nearest_frames(frames, points).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    fine = (np.arange(16) + 0.5) * 0.02  # 0.01, 0.03: every point lies between two
    assert nearest_frames(fine, points).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_frame_answers_are_judged_on_the_grid():
    """Clips of 0.4 s, 10 moments each, and a hop of 0.16 s: the frames answer for 4, 4 and 2 of them."""
    waves = [np.zeros(6400, np.float32)] * 3
    events = [np.array([[0.1, 0.25]]), np.array([[0.0, 0.1]]), np.zeros((0, 2))]
    clips = LabelledClips(waves, events, 16_000)
    task = LabelledTask("environment/presence", "environment", "frame", ("absent", "present"), clips, clips)
    rows = ProbeRows(
        features=np.zeros((5, 1)),
        labels=np.zeros(5, np.int64),
        clip=np.array([0, 0, 0, 2, 2]),  # clip 1 has no frames
        seconds=np.array([0.08, 0.24, 0.40, 0.08, 0.24]),
        skipped=(),
    )
    truth, answers, clip = predictions_on_grid(task, rows, np.array([0, 1, 0, 1, 0]), 0.04)
    assert clip.tolist() == [0] * 10 + [2] * 10
    # moments 0.02, 0.06, 0.10 | 0.14 .. 0.22 | 0.26 ..; the event is from 0.10 to 0.25
    assert truth.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, *[0] * 10]
    assert answers.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, *[1] * 4, *[0] * 6]
    score = balanced_accuracy_with_interval(truth, answers, clip)[0]
    assert score == pytest.approx((2 / 4 + (2 + 2 + 6) / 16) / 2)


def test_encoders_of_any_hop_are_judged_on_the_same_moments(small, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def record(name, task, method, labels, truth, answers, clip, **options):
        seen.append((truth, clip))
        return TaskScore(name, task.name, method, "balanced accuracy", 0.5, 0.4, 0.6, 0.5, 30, task.domain)

    monkeypatch.setattr(module, "soundworld_tasks", lambda *arguments, **options: [small[2]])
    monkeypatch.setattr(module, "score_predictions", record)
    run_benchmark([WaveformFeatures(6, "coarse"), WaveformFeatures(2, "fine")], SMALL, progress=False)
    for coarse, fine in zip(seen[0], seen[2], strict=True):
        np.testing.assert_array_equal(coarse, fine)


def test_another_soundworld_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soundworld, "VERSION", "3")
    with pytest.raises(DataError, match=r"soundworld-1 is frozen at version 2 of SoundWorld, but this is version 3"):
        run_benchmark([WaveformFeatures(6)])


def test_other_voices_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soundworld, "synthesiser", lambda: "formant")
    with pytest.raises(DataError, match=r"needs the espeak synthesiser.*pip install 'bestrq2\[demo\]'"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-1")


def test_two_features_of_one_name_are_refused(small):
    with pytest.raises(DataError, match="a different name for every kind of features"):
        run_benchmark([WaveformFeatures(6), WaveformFeatures(6)], SMALL)


def test_an_encoder_that_rejects_clips_is_refused(small):
    audio = [*small[0].test.audio]
    audio[4] = np.full_like(audio[4], np.nan)
    small[0] = dataclasses.replace(small[0], test=dataclasses.replace(small[0].test, audio=audio))
    with pytest.raises(DataError, match=r"counts every clip: it rejects 1 of speech/toy, the first: test clip 4"):
        run_benchmark([WaveformFeatures(6)], SMALL, progress=False)


@pytest.mark.parametrize("name", ["soundworld-2", "soundworld-9", "soundworld-x"])
def test_unknown_benchmarks_are_refused_by_listing_the_known(name, capsys):
    with pytest.raises(DataError, match=f"no benchmark '{name}'; the benchmarks are: soundworld-1"):
        bestrq2.probe("best-rq-2-tiny", name)
    assert run(["probe", "best-rq-2-tiny", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_soundworld_and_folders_keep_their_meaning(tmp_path: Path, monkeypatch):
    asked = []

    def load_labelled(source, seed):
        asked.append(source)
        raise DataError("enough")

    monkeypatch.setattr("bestrq2.evaluate.probe.load_labelled", load_labelled)
    (tmp_path / "soundworld-2").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("soundworld", "soundworld:40", "soundworld-2"):
        with pytest.raises(DataError, match="enough"):
            bestrq2.probe("best-rq-2-tiny", source)
    assert asked == ["soundworld", "soundworld:40", "soundworld-2"]


def test_seeds_of_a_benchmark_are_not_for_the_user():
    with pytest.raises(ConfigError, match="seed is 3, but soundworld-1 is frozen with seeds of its own"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-1", seed=3)


def test_outputs_that_cannot_be_written_are_refused_first(small, tmp_path: Path):
    with pytest.raises(BestRQ2Error, match="does not exist"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-1", output=tmp_path / "no" / "a.json")
