"""Labelled tasks in the tars of X-ARES: their splits, their labels, and what is said where something is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import clip, encoded, pack

from bestrq2.data.audio import read_audio
from bestrq2.data.labels import load_labelled, load_task, soundworld_tasks
from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import DataError
from bestrq2.evaluate.probe import LogMelStatistics, probe_features
from bestrq2.inference.embedder import load
from bestrq2.soundworld import export, write_corpus


def members(contents: Iterable[Any], seed: int = 0) -> list[tuple[str, bytes]]:
    """A clip and its JSON for every content; None stands for a clip without JSON."""
    found = []
    for number, content in enumerate(contents):
        found.append((f"{number:03d}.flac", clip(0.2, seed=seed + number, kind="FLAC")))
        if content is not None:
            found.append((f"{number:03d}.json", json.dumps(content).encode()))
    return found


def task(folder: Path, tars: dict[str, list[Any]], ready: bool = True) -> Path:
    """The folder of a task with tars of these names and contents."""
    folder.mkdir(parents=True)
    for name, contents in tars.items():
        pack(folder / f"{name}.tar", members(contents))
    if ready:
        (folder / MARKER).touch()
    return folder


AB = [{"label": "a"}, {"label": "b"}, {"label": "a"}]


def test_tars_of_soundworld_hold_what_its_tasks_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["music/melody", "environment/presence"]
    monkeypatch.setattr(export, "TASKS", {name: export.TASKS[name] for name in names})
    write_corpus(tmp_path / "sw", clips=4, format="xares", progress=False)
    read = load_labelled(tmp_path / "sw")
    assert sorted(one.name for one in read) == sorted(names)
    direct = {task.name: task for task in soundworld_tasks(names, train=3, test=1, cache=tmp_path, progress=False)}
    for one in read:
        other = direct[one.name]
        assert (one.domain, one.kind) == (other.domain, other.kind)
        for split, same in ((one.train, other.train), (one.test, other.test)):
            assert len(split) == len(same)
            for at, audio in enumerate(split.audio):
                wave = read_audio(audio)  # type: ignore[arg-type]
                np.testing.assert_allclose(wave, same.audio[at], atol=1e-4)
                if one.kind == "frame":
                    np.testing.assert_allclose(split.labels[at], same.labels[at], atol=1e-9)
                else:
                    assert one.classes[split.labels[at]] == other.classes[same.labels[at]]


@pytest.mark.parametrize(
    ("tars", "trained", "tested"),
    [
        ({"wds-audio-fold-2-000": AB, "wds-audio-fold-1-000": AB[:2], "wds-audio-fold-3-000": AB}, 6, 2),
        ({"libricount_fold00": AB[:2], "libricount_fold01": AB}, 3, 2),
        ({"wds-audio-train-0": AB, "wds-audio-valid-0": AB[:1], "wds-audio-eval-0": AB[:2]}, 3, 2),
        ({"train_subset_00": AB, "train_subset_01": AB, "dev_00": AB[:2]}, 6, 2),
        ({"train-clean-100-000000": AB, "dev-clean-0": AB, "test-clean-0": AB[:2]}, 3, 2),
        ({"0": AB * 2, "1": AB[:2] * 2}, 8, 2),
    ],
)
def test_names_of_tars_tell_the_splits(tmp_path: Path, tars: dict[str, list[Any]], trained: int, tested: int):
    (read,) = load_labelled(task(tmp_path / "mine", tars))
    assert (read.name, read.kind, read.classes) == ("mine", "clip", ("a", "b"))
    assert (len(read.train), len(read.test)) == (trained, tested)
    assert sorted(read.test.labels.tolist()) == [0, 1]


@pytest.mark.parametrize("form", ["json", "cls", "labels"])
def test_fine_tuning_takes_one_class_or_several_from_tars(tmp_path: Path, form: str):
    for split in ("train", "valid", "test"):
        packed = []
        for number in range(4):
            kind = "ab"[number % 2]
            content = {"json": {"label": kind}, "cls": kind, "labels": {"labels": [kind, "c"][: 1 + number // 2]}}[form]
            text = content if isinstance(content, str) else json.dumps(content)
            packed += [
                (f"{number}.wav", clip(0.1, seed=number)),
                (f"{number}.{'cls' if form == 'cls' else 'json'}", text.encode()),
            ]
        pack(tmp_path / f"{split}-000000.tar", packed)
    for place in (tmp_path, str(tmp_path / "*-000000.tar")):
        read = load_task(place)
        assert read.multi_label == (form == "labels")
        assert read.classes == (("a", "b", "c") if form == "labels" else ("a", "b"))
        for split in ("train", "valid", "test"):
            assert all(f"/{split}-000000.tar/" in name for name in read.source(split).names())
            np.testing.assert_array_equal(read.targets(split)[3, :2], [0, 1])
            assert read.targets(split).sum() == (6 if form == "labels" else 4)


def test_folds_of_tars_are_not_separated(tmp_path: Path):
    read = load_task(task(tmp_path / "mine", {f"wds-audio-fold-{fold}-000000": AB[:2] * 2 for fold in range(1, 6)}))
    folds = {s: {Path(name).parent.name for name in read.source(s).names()} for s in ("train", "valid", "test")}
    assert folds["test"] == {"wds-audio-fold-1-000000.tar"}
    assert (len(folds["train"]), len(folds["valid"])) == (3, 1)


def test_tasks_of_x_ares_have_their_own_fields_and_domains(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    genres = [{"genre": name, "id": 7} for name in ("rock", "jazz")]
    task(tmp_path / "env" / "gtzan_genre", {"gtzan_fold_0_0000000": genres, "gtzan_fold_1_0000000": genres})
    counts = [{"num_speakers": number} for number in (0, 10, 2)]
    task(tmp_path / "env" / "libricount", {"libricount_fold00": counts, "libricount_fold01": counts})
    task(tmp_path / "env" / "fsd50k", {"fsd50k_train_0": AB, "fsd50k_eval_0": AB})
    read = {one.name: one for one in load_labelled(tmp_path / "env")}
    assert {name: (one.domain, one.classes) for name, one in read.items()} == {
        "gtzan_genre": ("music", ("jazz", "rock")),
        "libricount": ("speech", ("0", "10", "2")),
    }
    assert "fsd50k (several classes per clip)" in caplog.text
    assert [one.name for one in load_labelled(tmp_path / "env", names=["libricount"])] == ["libricount"]
    with pytest.raises(DataError, match=r"has no task 'libri'; did you mean 'libricount'\?"):
        load_labelled(tmp_path / "env", names=["libri"])
    with pytest.raises(DataError, match=r"fsd50k \(several classes per clip\) cannot be probed"):
        load_labelled(tmp_path / "env" / "fsd50k")


def test_one_kind_of_event_is_a_frame_task(tmp_path: Path):
    heard = [{"onset": 0.1, "offset": 0.15, "label": "dog"}, {"onset": 0.0, "offset": 0.05, "label": "dog"}]
    folder = task(tmp_path / "barks", {"train-0": [heard, []], "test-0": [[], heard]})
    (read,) = load_labelled(folder)
    assert (read.kind, read.classes) == ("frame", ("absent", "present"))
    assert [events.tolist() for events in read.train.labels] == [[[0.0, 0.05], [0.1, 0.15]], []]
    other = [{"onset": 0.1, "offset": 0.15, "label": "cat"}]
    with pytest.raises(DataError, match=r"2 kinds of events; a task has one class per clip or one kind of event"):
        load_labelled(task(tmp_path / "both", {"train-0": [heard], "test-0": [other]}))


def test_probes_take_clips_in_tars_and_pass_over_bad_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rng, folder = np.random.default_rng(0), task(tmp_path / "loudness", {})
    for split, count in (("train", 20), ("test", 10)):
        packed = []
        for number in range(count):
            level = 0.01 if number % 2 else 0.3
            wave = level * rng.standard_normal(8000).clip(-3, 3)
            packed.append((f"{number}.wav", encoded(wave.astype(np.float32), 16_000)))
            packed.append((f"{number}.json", json.dumps({"label": "quiet" if number % 2 else "loud"}).encode()))
        packed += [("broken.wav", b"RIFF no wave"), ("broken.json", b'{"label": "loud"}')]
        packed += [("bare.wav", encoded(wave.astype(np.float32), 16_000))]
        pack(folder / f"{split}-0.tar", packed)
    (read,) = load_labelled(folder)
    assert (len(read.train), len(read.test)) == (21, 11)
    assert "left out without a label: 2 clips of 34" in caplog.text
    (score,) = probe_features(LogMelStatistics(), [read], ("linear",), progress=False)
    assert score.score == 1.0
    assert score.n_test == 10
    assert len(score.skipped) == 2
    assert "train-0.tar/broken.wav" in score.skipped[0]


@pytest.mark.parametrize(
    ("tars", "ready", "reason"),
    [
        ({}, True, rf"holds no tars although it has {MARKER}"),
        ({"train-0": AB, "test-0": AB}, False, rf"has tars but no {MARKER}: its download is not finished"),
        ({"test-0": AB}, True, "has no recordings in the split 'train'"),
        ({"train-0": AB, "more-0": AB}, True, "gives the split of some recordings only"),
        ({"audio-fold-1": AB[:2]}, True, "leaves no recordings for the split|no training recordings"),
        ({"train-0": [None, None], "test-0": [None]}, True, r"has no labels; expected 'label'.* \(found: no JSON\)"),
        ({"train-0": [{"text": 1}], "test-0": [{"text": 2}]}, True, r"has no labels.*\(found: 'text'\)"),
        ({"train-0": AB[:1], "test-0": AB[:1]}, True, r"has one class only \('a'\)"),
        ({"train-0": AB, "test-0": [{"events": []}]}, True, "mixes 'events' and 'label'; use one form"),
        ({"train-0": AB, "test-0": [{"labels": ["a"]}]}, True, "mixes 'label' and 'labels'; use one form"),
    ],
)
def test_what_is_wrong_with_a_task_is_named(tmp_path: Path, tars: dict[str, list[Any]], ready: bool, reason: str):
    folder = task(tmp_path / "env" / ("mine" if ready else "cremad"), tars, ready)
    for source in (folder, tmp_path):
        for reader in (load_labelled, load_task):
            with pytest.raises(DataError, match=reason):
                reader(source)


def test_the_embedder_takes_clips_in_tars_as_it_takes_their_files(tmp_path: Path):
    folder = task(tmp_path / "mine", {"train-0": AB, "test-0": AB})
    (read,) = load_labelled(folder)
    for number in range(len(AB)):
        (tmp_path / f"{number}.flac").write_bytes(clip(0.2, seed=number, kind="FLAC"))
    embedder = load("best-rq-2-tiny", "cpu")
    from_tars = embedder.embed(list(read.train.audio))
    from_files = embedder.embed([tmp_path / f"{number}.flac" for number in range(len(AB))])
    np.testing.assert_array_equal(from_tars.clip, from_files.clip)
