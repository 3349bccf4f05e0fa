"""realworld-1: fetching, verification, what is frozen, and scores with groups held out."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from made_up import RATE, SAMPLES, made_up_manifest, write_more, write_packages

import bestrq2
from bestrq2 import realworld
from bestrq2.cli import run
from bestrq2.data.labels import load_labelled
from bestrq2.data.open_source import open_source
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate import benchmark as module
from bestrq2.evaluate.benchmark import RealWorldBenchmark, find_benchmark, realworld_1, run_benchmark
from bestrq2.evaluate.classifiers import LinearProbe
from bestrq2.evaluate.metrics import clip_outcomes
from bestrq2.evaluate.probe import LogMelStatistics
from bestrq2.evaluate.result import write_result
from bestrq2.evaluate.score_table import all_means, score_notes
from bestrq2.evaluate.task_probe import HeldOutTask, ProbeRows, retrieval_scores, score_held_out
from bestrq2.inference.embedder import Embeddings
from bestrq2.realworld import fetch, load_manifest, with_more
from bestrq2.report.runs import find_probes, own_labels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def manifest(monkeypatch: pytest.MonkeyPatch):
    made_up = made_up_manifest()
    monkeypatch.setattr(realworld, "load_manifest", lambda: made_up)
    monkeypatch.setattr(realworld, "TASKS", {name: realworld.TASKS[name] for name in made_up.tasks})
    return made_up


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    write_packages(tmp_path / "unpacked")
    return tmp_path / "unpacked"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_lists_and_tasks_are_those_of_the_manifest(tmp_path, packages, manifest):
    found = fetch(tmp_path / "real", manifest, packages)
    assert (found.recordings, found.unlabelled, found.tasks, found.missing) == (56, 5, 2, {})
    source = open_source(tmp_path / "real" / "unlabelled.csv")
    assert sorted(Path(name).name for name in source.names()) == [f"{n}.wav" for n in range(5)]
    assert rows(tmp_path / "real/unlabelled.csv")[0]["licence"] == "CC0"
    (task,) = load_labelled(tmp_path / "real/tasks/music/drum-2.csv")
    assert (task.classes, len(task.train), len(task.test)) == (("pitch 0", "pitch 1"), 19, 8)
    groups = {row["split"]: set() for row in rows(tmp_path / "real/tasks/music/drum-2.csv")}
    for row in rows(tmp_path / "real/tasks/music/drum-2.csv"):
        groups[row["split"]].add(row["group"])
    assert groups == {"test": {"speaker 1"}, "train": {"speaker 0", "speaker 2", "instrument"}}


def test_samples_of_instruments_are_cut_out_of_their_file(tmp_path, packages, manifest):
    fetch(tmp_path / "real", manifest, packages)
    files = sorted((tmp_path / "real/audio/tones").iterdir())
    whole = np.frombuffer((packages / "tones/all.sf2").read_bytes()[8:], "<i2")
    found = [soundfile.read(file, dtype="int16") for file in sorted(files, key=lambda one: int(one.stem.split("-")[1]))]
    assert [rate for _, rate in found] == [RATE] * SAMPLES
    np.testing.assert_array_equal(np.concatenate([samples for samples, _ in found]), whole)


def test_what_differs_or_is_missing_is_named_and_refused_by_the_benchmark(tmp_path, packages, manifest, capsys):
    (packages / "tones/tones/03.wav").write_bytes(b"other")
    (packages / "words/words/05.wav").unlink()
    (packages / "words/free/1.wav").unlink()
    (packages / "tones/usr/share/doc/tones/changelog.Debian.gz").unlink()
    found = fetch(tmp_path / "real", manifest, packages)
    assert found.missing == {
        "tones": "version 1.0-1; of 27 recordings 1 differ, the first: tones/03.wav",
        "words": "version 1.0-1; of 29 recordings 2 missing, the first: words/05.wav",
    }
    assert (found.recordings, found.unlabelled, found.tasks) == (53, 4, 0)
    assert {row["problem"] for row in rows(tmp_path / "real/missing.csv")} == {"missing", "differs"}
    reason = r"lacks 2 of 51 recordings \(1 of tones, 1 of words\), on which speech/prompt, music/drum depend"
    with pytest.raises(DataError, match=reason):
        bestrq2.probe("best-rq-2-tiny", tmp_path / "real")
    assert run(["probe", "best-rq-2-tiny", "realworld-1"]) == 2


def test_a_recording_that_vanishes_later_is_refused_too(tmp_path, packages, manifest):
    fetch(tmp_path / "real", manifest, packages)
    (packages / "words/words/05.wav").write_bytes(b"short")
    with pytest.raises(DataError, match=r"lacks 1 of 51 recordings \(1 of words\), on which speech/prompt depend"):
        bestrq2.probe("best-rq-2-tiny", tmp_path / "real")


def test_a_damaged_sample_is_written_again_by_the_command_that_the_error_names(tmp_path, packages, manifest):
    fetch(tmp_path / "real", manifest, packages)
    sample = min((tmp_path / "real/audio/tones").iterdir())
    content = sample.read_bytes()
    sample.write_bytes(content[:50])
    with pytest.raises(DataError, match=f"`bestrq2 realworld {tmp_path}/real --packages {packages}` says why"):
        bestrq2.probe("best-rq-2-tiny", tmp_path / "real")
    fetch(tmp_path / "real", manifest, packages)
    assert sample.read_bytes() == content


@pytest.fixture
def more(tmp_path, packages, manifest, monkeypatch) -> list[bytes]:
    """Contents of another package, for pretraining only."""
    monkeypatch.setattr(realworld, "with_more", lambda one: with_more(one, tmp_path))
    return write_more(packages, tmp_path)


def test_more_packages_are_listed_for_pretraining_and_leave_the_benchmark_alone(tmp_path, packages, manifest, more):
    folder = tmp_path / "real"
    assert run(["realworld", str(folder), "--packages", str(packages), "--more"]) == 0
    listed = [row["path"] for row in rows(folder / "unlabelled.csv")]
    assert listed[5:] == [
        str(packages / "more/whole.wav"),
        "audio/more/all/music/deflated.wav",
        "audio/more/all/10.wav",
    ]
    assert [Path(folder, path).read_bytes() for path in listed[5:]] == more
    assert realworld.places(folder, manifest).keys() == manifest.tested
    tasks = {path: path.read_bytes() for path in (folder / "tasks").rglob("*.csv")}
    fetch(folder, manifest, packages)
    assert {path: path.read_bytes() for path in tasks} == tasks
    assert len(rows(folder / "unlabelled.csv")) == 5


def test_damage_to_a_package_for_pretraining_only_does_not_touch_the_benchmark(tmp_path, packages, manifest, more):
    archive = packages / "more/all.pk3"
    archive.write_bytes(archive.read_bytes().replace(b"music/deflated.wav", b"music/deflated.wav\xff\xff"))
    (packages / "more/all.rcc").unlink()
    found = fetch(tmp_path / "real", with_more(manifest, tmp_path), packages)
    assert found.missing == {
        "more": "version 1.0-1; of 3 recordings 1 differ, the first: all.pk3, and 1 missing, the first: all.rcc"
    }
    assert (found.unlabelled, found.tasks, found.incomplete) == (6, 2, 0)
    assert "cannot be scored" not in str(found)
    assert realworld.places(tmp_path / "real", manifest).keys() == manifest.tested


@pytest.mark.parametrize("name", ["unlabelled.csv", "tasks"])
def test_tables_of_another_corpus_are_never_replaced(tmp_path, packages, manifest, name):
    place = tmp_path / "corpus" / name
    place.mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"corpus: holds {name} of something else; name an empty or new folder"):
        fetch(tmp_path / "corpus", manifest, packages)
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == [name]


@pytest.mark.parametrize("name", ["realworld-1", "realworld-7"])
def test_a_benchmark_that_is_not_at_hand_is_one_sentence(name, manifest, capsys):
    assert run(["probe", "best-rq-2-tiny", name]) == 2
    # a slow machine also shows progress
    (message,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("probe"))
    assert "`bestrq2 realworld FOLDER` fetches them" in message or "the benchmarks are" in message


@pytest.fixture
def apt(tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that has one of the two packages; it logs its calls."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    control = packages / "tones" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text("Package: tones\nVersion: 1.0-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: tones\n")
    assert os.system(f"dpkg-deb -b {packages / 'tones'} {tmp_path / 'tones_1.0-1_all.deb'} > {os.devnull}") == 0
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho $3 >> {tmp_path}/calls\n"
        f'[ "$3" = tones ] && cp {tmp_path}/tones_1.0-1_all.deb . && exit 0\n'
        'echo "E: Unable to locate package $3" >&2; exit 100\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path / "calls"


def test_packages_are_fetched_once_and_those_that_cannot_be_had_are_named(tmp_path, apt, manifest, capsys):
    found = fetch(tmp_path / "real", manifest)
    assert found.missing == {"words": "apt-get: Unable to locate package words"}
    assert (found.recordings, found.tasks) == (27, 1)
    assert Path(rows(tmp_path / "real/tasks/music/drum-1.csv")[0]["path"]).parts[:3] == ("..", "..", "packages")
    fetch(tmp_path / "real", manifest)
    assert apt.read_text().split() == ["tones", "words", "words"]
    assert sorted(path.name for path in (tmp_path / "real/packages").iterdir()) == ["tones"]


def test_without_apt_get_the_folder_of_unpacked_packages_is_asked_for(tmp_path, manifest, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt-get and dpkg-deb of Debian and Ubuntu cannot be found.*by --packages"):
        fetch(tmp_path / "real", manifest)
    assert run(["realworld", str(tmp_path / "x"), "--packages", str(tmp_path / "none")]) == 2


# --- scores ---


class Vectors:
    """Features that are given: the audio is a row of a table. Counts what it embeds."""

    def __init__(self, table: np.ndarray) -> None:
        self.name, self.table, self.embedded = "vectors", table, Counter()

    def embed(self, audio, sampling_rate=None) -> Embeddings:
        self.embedded.update(int(one[0]) for one in audio)
        frames = np.stack([self.table[int(one[0])] for one in audio])[:, None]
        return Embeddings(frames[:, 0], frames, np.ones(frames.shape[:2], bool), np.zeros(frames.shape[:2]))


def test_probes_never_see_the_group_that_they_are_tested_on():
    generator = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 60), np.repeat([0, 1, 2], 40)
    table = generator.normal(size=(120, 4)).astype(np.float32)
    table[:, 0] += 2 * labels
    audio = [np.array([n], np.float32) for n in range(120)]
    features, task = Vectors(table), HeldOutTask("music/drum", np.arange(120), labels, groups, groups)
    other = HeldOutTask("music/pitch", np.arange(60), labels[:60], groups[:60], groups[:60] % 2)
    scores = score_held_out(features, audio, [task, other], progress=False)
    assert set(features.embedded.values()) == {1}
    assert [(score.task, score.method) for score in scores[:3]] == [
        ("music/drum", method) for method in ("linear", "statistics", "knn")
    ]
    predicted = np.concatenate(
        [
            LinearProbe(
                table[groups != one], labels[groups != one], groups=groups[groups != one], balanced=True
            ).predict(table[groups == one])
            for one in range(3)
        ]
    )
    assert scores[0].clips == pytest.approx(clip_outcomes(labels, predicted, np.arange(120), balanced=True), abs=1e-6)
    assert scores[0].score == pytest.approx((predicted == labels).mean())
    assert (scores[0].chance, scores[0].n_test) == (0.5, 120)
    assert scores[0].low < scores[0].score < scores[0].high


def test_retrieval_counts_the_queries_whose_item_is_among_ten_of_another_group():
    """Two speakers say 40 items; the second shifts and scales everything, and the last ten are said at random."""
    generator = np.random.default_rng(1)
    first = generator.normal(size=(40, 16))
    second = 5 + 3 * first
    second[30:] = 5 + 3 * generator.normal(size=(10, 16))
    vectors = np.concatenate([first, second]).astype(np.float32)
    items, speakers = np.tile(np.arange(40), 2), np.repeat([0, 1], 40)
    rows = ProbeRows(vectors, items, np.arange(80), np.zeros(80), (), speakers, vectors)
    task = HeldOutTask("speech/prompt", np.arange(80), items, speakers, speakers, retrieval=True)
    scores = retrieval_scores("vectors", rows, task)
    assert [score.method for score in scores] == ["statistics", "knn"]
    assert all(score.clips[:30] == (1.0,) * 30 for score in scores)
    assert scores[0].chance == pytest.approx(10 / 40)
    assert (scores[0].metric, scores[0].n_test) == ("recall at 10", 80)
    assert 60 / 80 <= scores[0].score < 1
    same = ProbeRows(np.ones_like(vectors), items, np.arange(80), np.zeros(80), (), speakers, np.ones_like(vectors))
    assert retrieval_scores("constant", same, task)[0].score == 0


def test_a_result_of_a_run_is_checked_and_shown_by_compare(tmp_path, packages, manifest):
    fetch(tmp_path / "real", manifest, packages)
    benchmark = realworld_1(tmp_path / "real")
    scores = run_benchmark([LogMelStatistics()], benchmark, progress=False)
    drum = {score.method: score for score in scores if score.task == "music/drum"}
    assert drum["statistics"].score > 0.9
    assert {score.half for score in scores} == {"choose", "report"}
    one = dataclasses.replace(benchmark, tasks={"music/drum": "choose"})
    assert run_benchmark([LogMelStatistics()], one, progress=False) == list(drum.values())
    result = module.benchmark_result(benchmark, LogMelStatistics.name, scores, {})
    module.check_benchmark_result(result, RealWorldBenchmark("realworld-1", benchmark.tasks, manifest.checksum))
    write_result(tmp_path / "realworld-1.json", result)
    (found,) = find_probes(tmp_path)
    assert (own_labels(found)[0], found.scores) == ("realworld-1", tuple(scores))
    assert "Recall at 10 by cosine similarity, chance 10/candidates: speech/prompt." in score_notes(scores)
    with pytest.raises(DataError, match="the protocol has manifest '0123456789abcdef'"):
        module.check_benchmark_result(result, RealWorldBenchmark("realworld-1", benchmark.tasks, "another"))


def test_readouts_are_chosen_on_the_choosing_tasks_with_whole_groups_held_out(tmp_path, packages, manifest):
    fetch(tmp_path / "real", manifest, packages)
    benchmark = realworld_1(tmp_path / "real")
    tasks = benchmark.choosing_tasks(progress=False)
    assert "music/drum" in [task.name for task in tasks]
    for task in tasks:
        assert benchmark.tasks[task.name] == "choose"
        assert not set(task.train.groups) & set(task.test.groups)
        assert len(task.train) + len(task.test) == len(manifest.tasks[task.name].recordings)
        assert all(Path(task.train.audio[place]).is_file() for place in range(len(task.train)))


# --- the shipped manifest ---


def test_the_manifest_is_what_it_was():
    """A change here makes old and new scores incomparable: give it another name instead."""
    assert load_manifest().checksum == "be070934d7e15a51"
    assert json.loads(json.dumps(realworld_1().protocol()))["tasks"] == realworld_1().tasks


def test_every_recording_is_tested_once_and_no_group_is_on_both_sides():
    manifest = load_manifest()
    halves = Counter((name.split("/")[0], task.half) for name, task in realworld.TASKS.items())
    assert set(halves) == {
        (domain, half) for domain in ("speech", "music", "environment") for half in ("choose", "report")
    }
    for name, task in manifest.tasks.items():
        assert len(set(task.recordings.tolist())) == len(task.recordings), name
        sides = {(group, fold) for group, fold in zip(task.groups, task.fold.tolist(), strict=True)}
        assert len({group for group, _ in sides}) == len(sides), name
        for fold in set(task.fold.tolist()):
            trained = Counter(np.array(task.labels)[task.fold != fold].tolist())
            assert all(trained[label] >= (1 if realworld.TASKS[name].retrieval else 3) for label in task.labels), name


def test_recordings_for_pretraining_share_no_content_with_tasks():
    manifest = load_manifest()
    contents = {manifest.recordings[number].sha256 for number in manifest.tested}
    others = [one for number, one in enumerate(manifest.recordings) if number not in manifest.tested]
    assert len(others) > 15_000
    assert not any(one.sha256 in contents for one in others)
    assert {one.package for one in manifest.recordings} == set(manifest.packages)
    assert all(manifest.packages.values())


def test_the_packages_for_pretraining_only_add_20_hours_and_change_nothing_else():
    base, both = load_manifest(), with_more(load_manifest())
    own = both.recordings[len(base.recordings) :]
    assert (both.checksum, both.tasks, both.tested) == (base.checksum, base.tasks, base.tested)
    assert both.recordings[: len(base.recordings)] == list(base.recordings)
    assert len({one.sha256 for one in own} - {one.sha256 for one in base.recordings}) == len(own)
    assert len({one.place for one in both.recordings}) == len(both.recordings)
    assert {one.package for one in own} == both.packages.keys() - base.packages.keys()
    assert all(all(versions) for versions in both.packages.values())
    free = [one for number, one in enumerate(both.recordings) if number not in both.tested]
    assert sum(one.seconds for one in free) / 3600 > 40
    assert min(one.seconds for one in own) >= 0.1


@pytest.mark.slow
def test_the_real_packages_agree_with_the_manifest(tmp_path):
    folder = os.environ.get("BESTRQ2_PACKAGES")
    if not folder:
        pytest.skip("BESTRQ2_PACKAGES does not name a folder of the unpacked packages")
    found = fetch(tmp_path / "real", load_manifest(), Path(folder))
    assert (found.missing, found.tasks) == ({}, len(realworld.TASKS))
    assert find_benchmark("realworld-1").folder is None
    scores = run_benchmark([LogMelStatistics()], find_benchmark("realworld-1"), progress=False)
    mean = all_means(scores)[LogMelStatistics.name]["statistics"]["mean"]
    assert mean == pytest.approx(0.302, abs=0.002)  # as docs/realworld.md has it
