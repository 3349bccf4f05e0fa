"""SoundWorld in bulk: parallel generation, caching, and files on disk."""

import ast
import csv
import json
import os
import signal
import tarfile

import numpy as np
import pytest
import soundfile

from bestrq2 import soundworld
from bestrq2.errors import DataError
from bestrq2.soundworld import clips, corpus, export


@pytest.fixture
def few_tasks(monkeypatch):
    """One clip task and the frame task, so that writing a corpus stays quick."""
    kept = {name: soundworld.TASKS[name] for name in ("music/key", "environment/presence")}
    monkeypatch.setattr(export, "TASKS", kept)
    monkeypatch.setattr(export, "UNLABELLED_SECONDS", 1.0)


def test_unlabelled_holds_the_clips_in_order_however_many_processes(tmp_path):
    alone = soundworld.unlabelled(20, 5, 1.0, tmp_path / "one", workers=1, progress=False)
    together = soundworld.unlabelled(20, 5, 1.0, tmp_path / "two", workers=2, progress=False)
    assert alone.shape == (20, 16000)
    assert alone.dtype == np.int16
    assert np.array_equal(alone, together)
    assert np.array_equal(alone[7], corpus.to_int16(soundworld.clip(5, 7, 1.0)))


def test_a_larger_cache_serves_a_smaller_request(tmp_path, monkeypatch):
    large = np.array(soundworld.unlabelled(6, 0, 0.5, tmp_path, workers=1, progress=False))

    def fail(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(corpus, "clip", fail)
    small = soundworld.unlabelled(4, 0, 0.5, tmp_path, workers=1, progress=False)
    assert np.array_equal(small, large[:4])
    with pytest.raises(AssertionError, match="generated again"):
        soundworld.unlabelled(7, 0, 0.5, tmp_path, workers=1, progress=False)


def test_cache_names_tell_everything_the_audio_depends_on(tmp_path):
    base = corpus.Series(0, 1.0)
    others = [corpus.Series(1, 1.0), corpus.Series(0, 2.0), corpus.Series(0, 1.0, "music/key", "train")]
    stems = {series.stem() for series in [base, *others, corpus.Series(0, 1.0, "music/key", "test")]}
    assert len(stems) == 5
    assert all(f"v{soundworld.VERSION}" in stem and soundworld.synthesiser() in stem for stem in stems)


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "elsewhere"))
    soundworld.unlabelled(1, 0, 0.5, workers=1, progress=False)
    assert [path.suffix for path in (tmp_path / "elsewhere").iterdir()] == [".npy"]


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path, monkeypatch):
    made = []

    def interrupted(seed, index, seconds):
        made.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return np.zeros(8000, dtype=np.float32)

    monkeypatch.setattr(corpus, "clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        soundworld.unlabelled(6, 0, 0.5, tmp_path, workers=1, progress=False)
    assert made == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_cache_file_is_made_again(tmp_path):
    whole = np.array(soundworld.unlabelled(3, 0, 0.5, tmp_path, workers=1, progress=False))
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size // 2)
    assert np.array_equal(soundworld.unlabelled(3, 0, 0.5, tmp_path, workers=1, progress=False), whole)


def test_a_cache_that_cannot_be_written_is_a_data_error(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(DataError, match="BESTRQ2_CACHE"):
        soundworld.unlabelled(2, 0, 0.5, blocker, workers=1, progress=False)


def test_a_full_disk_is_a_data_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus.os, "posix_fallocate", full)
    with pytest.raises(DataError, match="No space left"):
        soundworld.unlabelled(2, 0, 0.5, tmp_path, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "seconds"), [(0, 1.0), (-3, 1.0), (2, 0.0), (2, -1.0)])
def test_nothing_to_generate_is_a_data_error(tmp_path, count, seconds):
    with pytest.raises(DataError, match="at least 1 clip"):
        soundworld.unlabelled(count, 0, seconds, tmp_path, progress=False)


def test_tasks_are_balanced_and_read_as_float32(tmp_path):
    names = ["environment/count", "environment/presence"]
    found = soundworld.generated_tasks(names, 12, 6, 0, tmp_path, progress=False)
    (count, train, test), (presence, events, _) = found
    assert (count, presence) == tuple(soundworld.TASKS[name] for name in names)
    assert np.bincount(train.labels).tolist() == [2] * 6
    assert np.bincount(test.labels).tolist() == [1] * 6
    assert train.labels.dtype == np.int64
    wave = train.audio[5]
    assert wave.dtype == np.float32
    assert wave.shape == (60000,)
    assert np.abs(wave - clips.render("environment/count", "train", 0, 5)).max() <= 0.5 / 32768 + 1e-7
    assert len(train.audio[2:5]) == 3
    assert not np.array_equal(train.audio[0], test.audio[0])
    assert len(events.labels) == len(events.audio) == 12
    assert all(one.dtype == np.float64 and one.shape[1] == 2 for one in events.labels)


def test_an_unknown_task_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"speech/language"):
        soundworld.generated_tasks(["speech/langage"], cache=tmp_path, progress=False)


def test_folder_corpus_has_a_labelled_folder_per_task(tmp_path, few_tasks):
    out = tmp_path / "corpus"
    soundworld.write_corpus(out, 8, progress=False)
    assert len(list((out / "unlabelled").glob("*.wav"))) == 8
    key = out / "tasks" / "music" / "key"
    assert len(list(key.glob("train/*/*.wav"))) == 6
    assert len(list(key.glob("test/*/*.wav"))) == 2
    wave, rate = soundfile.read(key / "train" / "Db" / "0001.wav", dtype="int16")
    assert rate == 16000
    assert np.array_equal(wave, corpus.to_int16(clips.render("music/key", "train", 0, 1)))
    presence = out / "tasks" / "environment" / "presence"
    rows = list(csv.DictReader((presence / "events.csv").open()))
    assert {row["path"] for row in rows} == {path.relative_to(presence).as_posix() for path in presence.rglob("*.wav")}
    for row in rows:
        assert row["split"] == row["path"].split("/")[0]
        events = clips.presence_events(0, row["split"], int(row["path"].split("/")[1][:4]), 5.0)
        if row["onset"]:
            assert np.abs(events - [float(row["onset"]), float(row["offset"])]).sum(axis=1).min() < 2e-4
        else:
            assert len(events) == 0
    assert not list(out.rglob("*.tmp"))


def test_xares_corpus_has_a_tar_per_split(tmp_path, few_tasks):
    out = tmp_path / "xares"
    soundworld.write_corpus(out, 4, format="xares", progress=False)
    folder = out / "env" / "music-key"
    assert (folder / ".audio_tar_ready").stat().st_size == 0
    with tarfile.open(folder / "train-000000.tar") as tar:
        names = tar.getnames()
        assert [name.rpartition(".")[2] for name in names] == ["wav", "json"] * 3
        assert names[0].rpartition(".")[0] == names[1].rpartition(".")[0]
        assert json.load(tar.extractfile(names[3])) == {"label": "Db", "label_index": 1}
        wave, rate = soundfile.read(tar.extractfile(names[2]), dtype="int16")
    assert rate == 16000
    assert np.array_equal(wave, corpus.to_int16(clips.render("music/key", "train", 0, 1)))
    with tarfile.open(out / "env" / "environment-presence" / "test-000000.tar") as tar:
        (label,) = (json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json"))
    assert [[event["onset"], event["offset"]] for event in label["events"]] == clips.presence_events(
        0, "test", 0, 5.0
    ).tolist()


def test_xares_corpus_has_a_task_file_per_task(tmp_path, few_tasks):
    soundworld.write_corpus(tmp_path / "xares", 2, format="xares", progress=False)
    files = sorted((tmp_path / "xares" / "tasks").iterdir())
    names = ["soundworld_environment_presence_task.py", "soundworld_music_key_task.py"]
    assert [file.name for file in files] == names
    for file, folder in zip(files, ("environment-presence", "music-key"), strict=True):
        defined = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert defined == [file.name.replace("_task.py", "_config")], "the harness wants one such function"
        assert f'name="{folder}"' in file.read_text()
        assert (tmp_path / "xares" / "env" / folder).is_dir()


def test_a_corpus_is_never_written_into_a_foreign_folder(tmp_path, few_tasks):
    precious = tmp_path / "tasks" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("irreplaceable")
    with pytest.raises(DataError, match="not made by SoundWorld"):
        soundworld.write_corpus(tmp_path, 4, progress=False)
    (tmp_path / "soundworld.json").write_text('{"generator": "something else"}')
    with pytest.raises(DataError, match="not made by SoundWorld"):
        soundworld.write_corpus(tmp_path, 4, progress=False)
    assert precious.read_text() == "irreplaceable"
    with pytest.raises(DataError, match="is a file"):
        soundworld.write_corpus(precious, 4, progress=False)


def test_an_interrupted_corpus_is_completed_and_other_arguments_start_anew(tmp_path, few_tasks):
    out = tmp_path / "corpus"
    soundworld.write_corpus(out, 4, progress=False)
    kept, lost = out / "unlabelled" / "000000.wav", out / "unlabelled" / "000001.wav"
    content, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (out / "unlabelled" / ".000001.wav.1.tmp").write_bytes(b"half")
    soundworld.write_corpus(out, 4, progress=False)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before
    assert not list(out.rglob("*.tmp"))
    soundworld.write_corpus(out, 2, seed=1, progress=False)
    assert len(list((out / "unlabelled").glob("*.wav"))) == 2
    assert kept.read_bytes() != content


def test_a_corpus_needs_a_known_format_and_two_clips(tmp_path):
    with pytest.raises(DataError, match="folder or xares"):
        soundworld.write_corpus(tmp_path / "a", 4, format="zip")
    with pytest.raises(DataError, match="at least 2"):
        soundworld.write_corpus(tmp_path / "b", 1)
    assert list(tmp_path.iterdir()) == []


def signalled(number: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return number


def test_workers_leave_signals_of_a_scheduler_to_the_main_process():
    assert sorted(corpus._results(signalled, [(1,), (2,), (3,)], 2)) == [1, 2, 3]
