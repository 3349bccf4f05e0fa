"""soundworld-2: what is frozen, and what is refused."""

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
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate import benchmark as module
from bestrq2.evaluate.benchmark import SOUNDWORLD_2, run_benchmark
from bestrq2.evaluate.classifiers import LinearProbe
from bestrq2.evaluate.score_table import all_means
from bestrq2.evaluate.task_probe import embed_split

HALVES = ("choose", "report")


def test_the_frozen_protocol_is_what_it_was():
    """A change here makes old and new scores incomparable: give it another name instead."""
    assert SOUNDWORLD_2.protocol() == {
        "tasks": {
            "speech/voice": "choose",
            "speech/speakers": "choose",
            "speech/language": "report",
            "speech/word": "report",
            "music/instrument": "choose",
            "music/key": "choose",
            "music/tempo": "choose",
            "music/chord": "report",
            "music/melody": "report",
            "environment/count": "choose",
            "environment/event": "report",
            "environment/rhythm": "report",
        },
        "train": 400,
        "test": 400,
        "world_seed": 0,
        "soundworld_version": "2",
        "synthesiser": "espeak",
        "seed": 0,
        "methods": ["linear", "statistics", "knn"],
        "regularisation": [0.001, 0.01, 0.1, 1.0, 10.0],
        "folds": 3,
    }
    assert json.loads(json.dumps(SOUNDWORLD_2.protocol())) == SOUNDWORLD_2.protocol()


def test_both_halves_have_tasks_of_every_domain():
    halves = {half: {name.split("/")[0] for name, own in SOUNDWORLD_2.tasks.items() if own == half} for half in HALVES}
    assert halves == {half: {*soundworld.DOMAINS} for half in HALVES}
    assert all(soundworld.TASKS[name].kind == "clip" for name in SOUNDWORLD_2.tasks)


def test_the_benchmark_asks_for_the_frozen_audio(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def tasks(names, train, test, seed, progress):
        asked.append((names, train, test, seed))
        return []

    monkeypatch.setattr(soundworld, "synthesiser", lambda: "espeak")
    monkeypatch.setattr(module, "soundworld_tasks", tasks)
    assert run_benchmark([WaveformFeatures(6)]) == []
    assert asked == [(list(SOUNDWORLD_2.tasks), 400, 400, 0)]


def test_scores_are_those_of_the_probe_and_have_the_outcome_of_every_clip(small):
    scores = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    assert [(score.task, score.method, score.half) for score in scores] == [
        (task, method, half) for task, half in SMALL.tasks.items() for method in ("linear", "statistics", "knn")
    ]
    train, test = (embed_split(WaveformFeatures(6), small[1], split) for split in ("train", "test"))
    assert train.statistics.shape == (40, 36)
    right = LinearProbe(train.features, train.labels).predict(test.features) == test.labels
    assert scores[3].clips == tuple(right)
    right = LinearProbe(train.statistics, train.labels).predict(test.statistics) == test.labels
    assert (scores[4].clips, scores[4].score) == (tuple(right), right.mean())


def test_means_leave_out_the_tasks_to_choose_on(small):
    scores = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    linear = all_means(scores)["waveform"]["linear"]
    assert list(linear) == ["speech", "music", "mean", "choosing tasks"]
    assert linear["mean"] == pytest.approx((linear["speech"] + linear["music"]) / 2)
    first, _, chosen_on = (score for score in scores if score.method == "linear")
    assert linear["speech"] == (first.score - first.chance) / (1 - first.chance)
    assert linear["choosing tasks"] == chosen_on.relative


def test_the_same_features_get_the_same_scores_again(small):
    first = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert run_benchmark([WaveformFeatures(6)], SMALL, progress=False) == first


def test_another_soundworld_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soundworld, "VERSION", "3")
    with pytest.raises(DataError, match=r"soundworld-2 is frozen at version 2 of SoundWorld, but this is version 3"):
        run_benchmark([WaveformFeatures(6)])


def test_other_voices_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soundworld, "synthesiser", lambda: "formant")
    with pytest.raises(DataError, match=r"needs the espeak synthesiser.*pip install 'bestrq2\[demo\]'"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-2")


def test_two_features_of_one_name_are_refused(small):
    with pytest.raises(DataError, match="a different name for every kind of features"):
        run_benchmark([WaveformFeatures(6), WaveformFeatures(6)], SMALL)


def test_an_encoder_that_rejects_clips_is_refused(small):
    audio = [*small[0].test.audio]
    audio[4] = np.full_like(audio[4], np.nan)
    small[0] = dataclasses.replace(small[0], test=dataclasses.replace(small[0].test, audio=audio))
    with pytest.raises(DataError, match=r"counts every clip: it rejects 1 of speech/toy, the first: test clip 4"):
        run_benchmark([WaveformFeatures(6)], SMALL, progress=False)


@pytest.mark.parametrize("name", ["soundworld-1", "soundworld-9", "soundworld-x"])
def test_unknown_benchmarks_are_refused_by_listing_the_known(name, capsys):
    with pytest.raises(DataError, match=f"no benchmark '{name}'; the benchmarks are: soundworld-2"):
        bestrq2.probe("best-rq-2-tiny", name)
    assert run(["probe", "best-rq-2-tiny", name]) == 2
    # a slow machine also shows progress
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("probe")]
    assert len(lines) == 1


def test_soundworld_and_folders_keep_their_meaning(tmp_path: Path, monkeypatch):
    asked = []

    def load_labelled(source, seed):
        asked.append(source)
        raise DataError("enough")

    monkeypatch.setattr("bestrq2.evaluate.probe.load_labelled", load_labelled)
    (tmp_path / "soundworld-3").mkdir()
    monkeypatch.chdir(tmp_path)
    sources = ["soundworld", "soundworld:40", "soundworld-3", "shard.tar," * 50]
    for source in sources:
        with pytest.raises(DataError, match="enough"):
            bestrq2.probe("best-rq-2-tiny", source)
    assert asked == sources


def test_seeds_of_a_benchmark_are_not_for_the_user():
    with pytest.raises(ConfigError, match="seed is 3, but soundworld-2 is frozen with seeds of its own"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-2", seed=3)


def test_outputs_that_cannot_be_written_are_refused_first(small, tmp_path: Path):
    with pytest.raises(BestRQ2Error, match="does not exist"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-2", output=tmp_path / "no" / "a.json")
