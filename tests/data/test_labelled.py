"""Labelled corpora: what each layout means, and what is said when it means nothing."""

from __future__ import annotations

import numpy as np
import pytest

from bestrq2.data.labelled import LabelledClips, LabelledTask, load_labelled
from bestrq2.errors import ConfigError, DataError


def touch(root, *names):
    """Labelled folders are listed, not opened: empty files will do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def numbered(folder, count):
    return [f"{folder}/{i}.wav" for i in range(count)]


def labels_by_path(clips, classes, root):
    return {p.relative_to(root).as_posix(): classes[i] for p, i in zip(clips.audio, clips.labels, strict=True)}


def test_class_folders_are_split_class_by_class(tmp_path):
    root = touch(tmp_path / "pets", *numbered("dog", 8), *numbered("cat/indoor", 4), "dog/notes.txt")
    (task,) = load_labelled(root)
    assert (task.name, task.domain, task.kind, task.classes) == ("pets", "", "clip", ("cat", "dog"))
    assert task.train.labels.dtype == np.int64
    assert np.bincount(task.test.labels).tolist() == [1, 2]
    assert np.bincount(task.train.labels).tolist() == [3, 6]
    both = [*task.train.audio, *task.test.audio]
    assert len(set(both)) == 12
    for clips in (task.train, task.test):
        for path, label in labels_by_path(clips, task.classes, root.absolute()).items():
            assert path.startswith(label)


def test_the_split_is_a_function_of_the_seed(tmp_path):
    root = touch(tmp_path, *numbered("a", 20), *numbered("b", 20))
    assert load_labelled(root, seed=1)[0].test.audio == load_labelled(str(root), seed=1)[0].test.audio
    assert load_labelled(root, seed=1)[0].test.audio != load_labelled(root, seed=2)[0].test.audio
    assert len(load_labelled(root, test_fraction=0.5)[0].test) == 20


def test_given_splits_are_kept(tmp_path):
    root = touch(
        tmp_path / "t", *numbered("train/a", 3), *numbered("train/b", 3), *numbered("test/a", 2), "test/b/x.mp3"
    )
    (task,) = load_labelled(root)
    assert labels_by_path(task.test, task.classes, root.absolute()) == {
        "test/a/0.wav": "a",
        "test/a/1.wav": "a",
        "test/b/x.mp3": "b",
    }
    assert len(task.train) == 6


def test_a_folder_of_tasks_gives_each_with_its_domain(tmp_path):
    out = tmp_path / "out"
    for task in ("speech/voice", "music/key", "other/thing"):
        for split in ("train", "test"):
            touch(out / "tasks" / task / split, "x/1.wav", "y/1.wav")
    touch(out / "pretrain", "1.wav")
    tasks = load_labelled(out)
    assert [(t.name, t.domain) for t in tasks] == [("music/key", "music"), ("thing", ""), ("speech/voice", "speech")]
    assert [t.name for t in load_labelled(out / "tasks" / "music" / "key")] == ["music/key"]


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


def test_events_without_a_split_are_split(tmp_path):
    root = touch(tmp_path, *numbered("clips", 12))
    rows = [f"clips/{i}.wav,{'' if i % 3 else '0.1'},{'' if i % 3 else '0.4'}" for i in range(12)]
    (root / "events.csv").write_text("path,onset,offset\n" + "\n".join(rows))
    (task,) = load_labelled(root)
    assert (len(task.train), len(task.test)) == (9, 3)
    assert sum(bool(len(events)) for events in task.test.labels) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [("t.csv", "{},{},{}"), ("t.tsv", "{}\t{}\t{}"), ("t.jsonl", '{{"path": "{}", "label": "{}", "split": "{}"}}')],
)
@pytest.mark.parametrize("split", [True, False])
def test_tables_name_paths_labels_and_perhaps_splits(tmp_path, name, line, split):
    touch(tmp_path, *numbered("x", 4), *numbered("y", 4))
    header = line.format("path", "label", "split") + "\n"
    rows = [
        line.format(f"{c}/{i}.wav", c.upper(), ("test" if i == 0 else "train") if split else "")
        for c in "xy"
        for i in range(4)
    ]
    (tmp_path / name).write_text(("" if name.endswith("jsonl") else header) + "\n".join(rows))
    (task,) = load_labelled(tmp_path / name)
    assert (task.name, task.classes, len(task.train), len(task.test)) == ("t", ("X", "Y"), 6, 2)
    for clips in (task.train, task.test):
        for path, label in labels_by_path(clips, task.classes, tmp_path).items():
            assert path[0].upper() == label
    if split:
        assert [path.name for path in task.test.audio] == ["0.wav", "0.wav"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path,lable\na.wav,x\n", r"no column 'label'; found 'path', 'lable' \(did you mean 'lable'"),
        ("path,label\na.wav,x\nb.wav,x\n", "one class only"),
        ("path,label\na.wav,x\nb.wav,y\nc.wav,y\n", "class 'x' has a single clip"),
        ("path,label\na.wav,x\na.wav,y\n", r"a\.wav twice"),
        ("path,label\na.wav,x\nzz.wav,y\n", r"1 file of 2 that cannot be found; first: .*zz\.wav"),
        ("path,label,split\na.wav,x,training\nb.wav,y,test\n", r"split 'training'; .* \(did you mean 'train'\?\)"),
        ("path,label,split\na.wav,x,train\nb.wav,y,train\n", "no recordings in the split 'test'"),
        ("path,label,split\na.wav,x,train\nb.wav,y,test\n", "'y' is tested on but has no training clips"),
        ("path,label,split\na.wav,x,train\nb.wav,y,\n", "split of some recordings only"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, content, reason):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        load_labelled(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path,split,onset\na.wav,train,1\n", "no column 'offset'; found 'path', 'split', 'onset'"),
        ("path,onset,offset\na.wav,2,1\n", "event from '2' to '1'; expected seconds with"),
        ("path,onset,offset\na.wav,1,\n", "event from '1' to ''"),
        ("path,onset,offset\na.wav,,\nb.wav,,\n", "lists no event"),
        ("path,split,onset,offset\na.wav,train,1,2\na.wav,test,3,4\n", r"a\.wav is in both splits"),
        ("path,onset,offset\na.wav,1,2\nb.wav,,\n", "too few clips"),
    ],
)
def test_what_is_wrong_with_events_is_named(tmp_path, content, reason):
    touch(tmp_path, "a.wav", "b.wav")
    (tmp_path / "events.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        load_labelled(tmp_path)


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_labelled(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no subfolders; expected one with audio for every class"):
        load_labelled(touch(tmp_path / "flat", "a.wav"))
    with pytest.raises(DataError, match="one class only \\('a'\\)"):
        load_labelled(touch(tmp_path / "one", *numbered("a", 5)))
    with pytest.raises(DataError, match=r"y is empty|none with an audio suffix"):
        load_labelled(touch(tmp_path / "hollow", "x/1.wav", "x/2.wav", "y/readme.md"))
    with pytest.raises(DataError, match=r"notes\.pdf is no labelled table; expected \.csv, \.jsonl, \.tsv or a folder"):
        load_labelled(touch(tmp_path, "notes.pdf") / "notes.pdf")
    with pytest.raises(ConfigError, match="test_fraction is 1"):
        load_labelled(tmp_path, test_fraction=1)


def test_soundworld_tasks_come_from_the_generator(monkeypatch):
    import bestrq2.soundworld as soundworld

    clips = LabelledClips([np.ones(4, np.float32)], np.array([0]), 16_000)
    asked = {}

    def tasks(names, train, test):
        asked.update(names=names, train=train, test=test)
        return [LabelledTask("music/key", "music", "clip", ("a", "b"), clips, clips)]

    monkeypatch.setattr(soundworld, "tasks", tasks, raising=False)
    assert load_labelled("soundworld:50")[0].name == "music/key"
    assert asked == {"names": None, "train": 50, "test": 25}
    load_labelled("soundworld", names=["music/key"])
    assert asked == {"names": ["music/key"], "train": 400, "test": 200}
    with pytest.raises(DataError, match="at least 2"):
        load_labelled("soundworld:1")
