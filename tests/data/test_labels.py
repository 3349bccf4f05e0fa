"""Labelled corpora: the meaning of each layout, for probes and for fine-tuning, and the errors for what has none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import clip

from bestrq2 import soundworld
from bestrq2.data.audio import read_audio
from bestrq2.data.labels import LabelledTask, load_labelled, load_task
from bestrq2.data.places import AudioBytes
from bestrq2.errors import DataError
from bestrq2.soundworld import Split


def touch(root: Path, *names: str) -> Path:
    """Labelled folders are listed, not opened: empty files will do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{i}.wav" for i in range(count)]


def by_path(task: LabelledTask, split: str, root: Path) -> dict[str, set[str]]:
    """Class names of the clips of a split by their path below a folder."""
    paths = [path.relative_to(root.absolute()).as_posix() for path in task.clips(split).audio]
    rows = task.targets(split)
    return {path: {task.classes[at] for at in np.flatnonzero(row)} for path, row in zip(paths, rows, strict=True)}


def test_class_folders_are_split_class_by_class(tmp_path):
    root = touch(tmp_path / "pets", *numbered("dog", 20), *numbered("cat/indoor", 10), "dog/notes.txt")
    (probed,), tuned = load_labelled(root), load_task(str(root))
    assert (probed.name, probed.domain, probed.kind, probed.classes) == ("pets", "", "clip", ("cat", "dog"))
    assert probed.train.labels.dtype == np.int64
    assert {split: tuned.targets(split).sum(axis=0).tolist() for split in ("train", "valid", "test")} == {
        "train": [7, 14],
        "valid": [1, 2],
        "test": [2, 4],
    }
    assert np.bincount(probed.train.labels).tolist() == [8, 16]
    for split in ("train", "test"):
        assert all(path.startswith(*names) for path, names in by_path(probed, split, root).items())
    # Scores of a probe and of fine-tuning are comparable: the test recordings are the same.
    assert probed.test.audio == tuned.test.audio
    assert {*probed.train.audio} == {*tuned.train.audio, *tuned.valid.audio}


def test_folders_without_audio_and_links_to_folders_around_them_are_no_classes(tmp_path, caplog):
    root = touch(tmp_path / "corpus", *numbered("a", 10), *numbered("b", 10), "notes/1.txt", "a/list.txt")
    (root / "loop").symlink_to(root)
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "loop").symlink_to(root / "b")
    with caplog.at_level("INFO"):
        task = load_task(str(root))
    assert task.classes == ("a", "b")
    assert "notes is not used as a class" in caplog.text
    assert f"{root}: 1 file skipped by suffix: .txt 1" in caplog.text


def test_pipes_and_broken_links_neither_stop_nor_stall_the_search_for_labels(tmp_path):
    root = touch(tmp_path / "corpus", *numbered("a", 5), *numbered("b", 5))
    os.mkfifo(root / "a" / "pipe.wav")
    os.mkfifo(root / "pipe.tar")
    (root / "b" / "itself.wav").symlink_to("itself.wav")
    rows = [f"{name}/{file},{name}" for name in "ab" for file in sorted(os.listdir(root / name))]
    (tmp_path / "corpus.csv").write_text("\n".join(["path,label", *(f"corpus/{row}" for row in rows)]))
    for place in (root, tmp_path / "corpus.csv"):
        assert sum(len(load_task(str(place)).source(split)) for split in ("train", "valid", "test")) == 12


def test_the_split_is_a_function_of_the_seed(tmp_path):
    root = touch(tmp_path, *numbered("a", 20), *numbered("b", 20))
    assert load_labelled(root, seed=1)[0].test.audio == load_labelled(str(root), seed=1)[0].test.audio
    assert load_labelled(root, seed=1)[0].test.audio != load_labelled(root, seed=2)[0].test.audio


def test_given_splits_are_kept_and_missing_ones_come_out_of_training(tmp_path):
    names = [f"{split}/{clip}" for split in ("train", "TEST") for clip in numbered("a", 8) + numbered("b", 8)]
    root = touch(tmp_path / "t", *names, "notes/readme.txt")
    (probed,), tuned = load_labelled(root), load_task(root)
    assert [len(probed.train), len(probed.test), probed.valid] == [16, 16, None]
    assert [len(tuned.train), len(tuned.valid), len(tuned.test)] == [14, 2, 16]
    for task in (probed, tuned):
        assert all(path.startswith("TEST/") for path in by_path(task, "test", root))
    assert list(tuned.source("valid").names()) == [str(path) for path in tuned.valid.audio]


def test_given_validation_recordings_are_the_test_of_a_probe_without_test_recordings(tmp_path):
    names = [f"{split}/{clip}" for split in ("train", "dev") for clip in numbered("a", 4) + numbered("b", 4)]
    (task,) = load_labelled(touch(tmp_path, *names))
    assert all(path.startswith("dev/") for path in by_path(task, "test", tmp_path))


def test_a_class_may_be_called_train(tmp_path):
    (task,) = load_labelled(touch(tmp_path, *numbered("train", 5), *numbered("car", 5), *numbered("bus", 5)))
    assert task.classes == ("bus", "car", "train")


def test_a_folder_of_tasks_gives_each_with_its_domain(tmp_path):
    out = tmp_path / "out"
    for task in ("speech/voice", "music/key", "other/thing"):
        for split in ("train", "test"):
            touch(out / "tasks" / task / split, "x/1.wav", "y/1.wav")
    touch(out / "pretrain", "1.wav")
    tasks = load_labelled(out)
    assert [(t.name, t.domain) for t in tasks] == [("music/key", "music"), ("thing", ""), ("speech/voice", "speech")]
    assert [t.name for t in load_labelled(out, names=["thing"])] == ["thing"]
    assert [t.name for t in load_labelled(out / "tasks" / "music" / "key")] == ["music/key"]
    with pytest.raises(DataError, match=r"has no task 'thinq'; did you mean 'thing'\?"):
        load_labelled(out, names=["thinq"])
    with pytest.raises(DataError, match=r"holds 3 tasks \(music/key, thing, speech/voice\); name the folder of one"):
        load_task(out)


EVENTS = """path,split,onset,offset
a.wav,train,2.5,3
a.wav,train,0.5,1.25
b.wav,train,,
c.wav,test,0,1
"""


def test_events_make_a_frame_task(tmp_path):
    root = touch(tmp_path / "environment" / "presence", "a.wav", "b.wav", "c.wav")
    (root / "events.csv").write_text(EVENTS)
    (task,) = load_labelled(root)
    assert (task.name, task.kind, task.classes) == ("environment/presence", "frame", ("absent", "present"))
    assert [path.name for path in task.train.audio] == ["a.wav", "b.wav"]
    np.testing.assert_array_equal(task.train.labels[0], [[0.5, 1.25], [2.5, 3.0]])
    assert task.train.labels[1].shape == (0, 2)
    assert task.train.labels[1].dtype == np.float64
    np.testing.assert_array_equal(task.test.labels[0], [[0, 1]])
    with pytest.raises(DataError, match="labels moments"):
        load_task(touch(root, *(f"more/{i}.wav" for i in range(30))))


def test_events_without_a_split_are_split_in_proportion(tmp_path):
    root = touch(tmp_path, *numbered("clips", 15))
    rows = [f"clips/{i}.wav,{'' if i % 3 else '0.1'},{'' if i % 3 else '0.4'}" for i in range(15)]
    (root / "events.csv").write_text("path,onset,offset\n" + "\n".join(rows))
    (task,) = load_labelled(root)
    assert (len(task.train), len(task.test)) == (12, 3)
    assert sum(bool(len(events)) for events in task.test.labels) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [("t.csv", "{},{},{}"), ("t.tsv", "{}\t{}\t{}"), ("t.jsonl", '{{"path": "{}", "label": "{}", "split": "{}"}}')],
)
@pytest.mark.parametrize("split", [True, False])
def test_tables_name_paths_labels_and_perhaps_splits(tmp_path, name, line, split):
    touch(tmp_path, *numbered("x", 5), *numbered("y", 5))
    header = line.format("path", "label", "split") + "\n"
    rows = [
        line.format(f"{c}/{i}.wav", c.upper(), ("eval" if i == 0 else "Training") if split else "")
        for c in "xy"
        for i in range(5)
    ]
    (tmp_path / name).write_text(("" if name.endswith("jsonl") else header) + "\n".join(rows))
    (task,) = load_labelled(tmp_path / name)
    assert (task.name, task.classes, len(task.train), len(task.test)) == ("t", ("X", "Y"), 8, 2)
    for part in ("train", "test"):
        assert all(names == {path[0].upper()} for path, names in by_path(task, part, tmp_path).items())
    if split:
        assert [path.name for path in task.test.audio] == ["0.wav", "0.wav"]


def test_a_column_of_labels_gives_any_number_of_classes(tmp_path):
    touch(tmp_path, *numbered("x", 40))
    rows = [f"x/{i}.wav,{['a;b', 'b', '', 'a; c'][i % 4]}" for i in range(40)]
    (tmp_path / "t.csv").write_text("path,labels\n" + "\n".join(rows))
    task = load_task(tmp_path / "t.csv")
    assert (task.classes, task.multi_label) == (("a", "b", "c"), True)
    found = {
        path: names for split in ("train", "valid", "test") for path, names in by_path(task, split, tmp_path).items()
    }
    assert [found[f"x/{i}.wav"] for i in range(4)] == [{"a", "b"}, {"b"}, set(), {"a", "c"}]
    with pytest.raises(DataError, match="a probe takes one class per clip"):
        load_labelled(tmp_path / "t.csv")


def test_groups_stay_together_and_classes_in_proportion(tmp_path):
    rng = np.random.default_rng(0)
    speakers = [f"s{i}" for i in range(40) for _ in range(rng.integers(1, 6))]
    touch(tmp_path, *numbered("x", len(speakers)))
    rows = [f"x/{i}.wav,{'ab'[i % 2]},{speaker}" for i, speaker in enumerate(speakers)]
    (tmp_path / "t.csv").write_text("path,label,group\n" + "\n".join(rows))
    task = load_task(tmp_path / "t.csv")
    of = {s: {speakers[int(path.stem)] for path in task.clips(s).audio} for s in ("train", "valid", "test")}
    assert not of["train"] & of["valid"] | of["train"] & of["test"] | of["valid"] & of["test"]
    shares = [len(task.clips(split)) / len(speakers) for split in ("train", "valid", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)
    (probed,) = load_labelled(tmp_path / "t.csv")
    assert {speakers[int(path.stem)] for path in probed.test.audio} == of["test"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path,lable\na.wav,x\n", r"no column 'label'; found 'path', 'lable' \(did you mean 'lable'"),
        ("path,label\na.wav,x\nb.wav,\n", "line 3: no value for 'label'"),
        ("path,label\na.wav,x\nb.wav,x\n", r"one class only \('x'\)"),
        ("path,label\na.wav,x\na.wav,y\n", r"a\.wav twice"),
        ("path,label\na.wav,x\nzz.wav,y\n", r"1 file of 2 that cannot be found; first: .*zz\.wav"),
        ("path,label\na.wav,x;y\nb.wav,y\n", r"label 'x;y'; call the column 'labels'"),
        ("path,label,labels\na.wav,x,x;y\nb.wav,y,x\n", "columns 'label' and 'labels'; keep one"),
        ("path,label,split\na.wav,x,trian\nb.wav,y,test\n", r"split 'trian'; .*did you mean 'train'"),
        ("path,label,split\na.wav,x,valid\nb.wav,y,test\n", "no recordings in the split 'train'"),
        ("path,label,split\na.wav,x,train\nb.wav,y,test\nc.wav,x,valid\n", "'y' has no training recordings"),
        ("path,label,split\na.wav,x,train\nb.wav,y,\n", "split of some recordings only"),
        ("path,label\na.wav,x\nb.wav,y\n", "leaves no recordings for the split|no training recordings"),
        ("path,labels\na.wav,\nb.wav,\n", "no column 'label'"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, content, reason):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "t.csv").write_text(content)
    for load in (load_labelled, load_task):
        with pytest.raises(DataError, match=reason):
            load(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path,split,onset\na.wav,train,1\n", "no column 'offset'; found 'path', 'split', 'onset'"),
        ("path,onset,offset\na.wav,2,1\n", "event from '2' to '1'; expected seconds with"),
        ("path,onset,offset\na.wav,1,\n", "event from '1' to ''"),
        ("path,onset,offset\na.wav,,\nb.wav,,\n", "lists no event"),
        ("path,split,onset,offset\na.wav,train,1,2\na.wav,test,3,4\n", r"a\.wav is in both splits"),
        ("path,onset,offset\na.wav,1,2\n", "leaves no recordings for the split 'test'"),
    ],
)
def test_what_is_wrong_with_events_is_named(tmp_path, content, reason):
    touch(tmp_path, "a.wav", "b.wav")
    (tmp_path / "events.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        load_labelled(tmp_path)


def test_what_is_wrong_with_a_place_is_named(tmp_path):
    for place, reason in {
        tmp_path / "nowhere": "nowhere does not exist; give a folder with a subfolder per class, a table",
        touch(tmp_path / "flat", "a.wav"): "holds no subfolders; expected one with audio for every class",
        touch(tmp_path / "one", *numbered("a", 5)): r"one class only \('a'\)",
        touch(tmp_path / "hollow", "x/1.wav", "y/readme.md"): r"one class only \('x'\)",
        touch(tmp_path / "mute", "x/1.txt", "y/readme.md"): r"holds no audio in its subfolders",
        touch(tmp_path / "more", "notes.pdf") / "notes.pdf": r"notes\.pdf is neither audio, nor",
        touch(tmp_path / "more", "one.wav") / "one.wav": r"has no labels; give a folder",
        tmp_path / "fold-*.tar": r"fold-\*\.tar does not exist, or nothing fits it",
    }.items():
        for load in (load_labelled, load_task):
            with pytest.raises(DataError, match=reason):
                load(place)
    with pytest.raises(DataError, match="soundworld:2 holds several tasks"):
        load_task("soundworld:2")


def test_soundworld_tasks_come_from_the_generator(monkeypatch):
    asked = []

    def generated(names, train, test, *_):
        asked.append((names, train, test))
        split = Split([np.ones(4, np.float32)], np.array([0]))
        return [(soundworld.TASKS["music/key"], split, split)]

    monkeypatch.setattr(soundworld, "generated_tasks", generated)
    (task,) = load_labelled("soundworld:50")
    assert (task.name, task.domain, task.kind, len(task.classes)) == ("music/key", "music", "clip", 12)
    assert (task.test.audio[0].sum(), task.test.sampling_rate) == (4, 16_000)
    load_labelled("soundworld", names=["music/key"])
    assert asked == [(None, 50, 25), (["music/key"], 400, 200)]
    with pytest.raises(DataError, match="at least 2"):
        load_labelled("soundworld:1")


def test_a_dataset_of_the_hub_with_a_column_label_is_a_task(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    clips = [clip(0.1, seed=number) for number in range(20)]
    audio = [{"bytes": content, "path": f"{number}.wav"} for number, content in enumerate(clips)]
    table = pa.table(
        {
            "audio": pa.array(audio, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": ["dog", "cat"] * 10,
            "group": [str(number) for number in range(20)],
        }
    )
    pq.write_table(table, tmp_path / "pets.parquet")
    spec = f"hub:{tmp_path}/pets.parquet?column=audio"
    (probed,), tuned = load_labelled(spec), load_task(spec)
    assert (probed.classes, len(probed.train), len(probed.test)) == (("cat", "dog"), 16, 4)
    assert [len(tuned.clips(split)) for split in ("train", "valid", "test")] == [14, 2, 4]
    heard = read_audio(probed.test.audio[0])
    place = int(next(tuned.source("test").names()).split("/")[-2])
    np.testing.assert_array_equal(heard, read_audio(AudioBytes("a.wav", clips[place])))
    assert probed.classes[probed.test.labels[0]] == ["dog", "cat"][place % 2]
