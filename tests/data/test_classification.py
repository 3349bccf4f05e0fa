"""What each layout of labelled recordings means for fine-tuning, and how they are divided."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tars import clip, pack

from bestrq2.data.balance import balanced
from bestrq2.data.classification import ClassificationData, load_classification
from bestrq2.data.division import divide
from bestrq2.data.sources import SubsetSource
from bestrq2.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{i}.wav" for i in range(count)]


def labels(data: ClassificationData) -> dict[str, set[str]]:
    """Class names by the last two parts of what the source calls a recording."""
    names = ["/".join(name.split("/")[-2:]) for name in data.source.names()]
    return {
        name: {data.classes[at] for at in np.flatnonzero(row)} for name, row in zip(names, data.targets, strict=True)
    }


def test_class_folders_are_divided_class_by_class(tmp_path: Path):
    data = load_classification(touch(tmp_path, *numbered("cat", 20), *numbered("dog", 10)))
    assert (data.classes, data.multi_label) == (("cat", "dog"), False)
    assert all(name.startswith(*of) for name, of in labels(data).items())
    assert {split: data.targets[places].sum(axis=0).tolist() for split, places in data.splits.items()} == {
        "train": [14, 7],
        "valid": [2, 1],
        "test": [4, 2],
    }
    assert sorted(np.concatenate(list(data.splits.values()))) == list(range(30))
    again, other = load_classification(tmp_path), load_classification(tmp_path, seed=1)
    assert again.splits["test"].tolist() == data.splits["test"].tolist() != other.splits["test"].tolist()


def test_given_splits_are_kept_and_missing_ones_come_out_of_training(tmp_path: Path):
    data = load_classification(
        touch(
            tmp_path,
            *(f"{split}/{name}" for split in ("train", "test") for name in numbered("a", 8) + numbered("b", 8)),
        )
    )
    names = list(data.source.names())
    assert all("/test/" in names[place] for place in data.splits["test"])
    assert len(data.splits["test"]) == 16
    assert (len(data.splits["train"]), len(data.splits["valid"])) == (14, 2)


def test_a_column_of_labels_gives_any_number_of_classes(tmp_path: Path):
    touch(tmp_path, *numbered("x", 12))
    rows = [f"x/{i}.wav,{['a;b', 'b', '', 'a; c'][i % 4]}" for i in range(12)]
    (tmp_path / "t.csv").write_text("path,labels\n" + "\n".join(rows))
    data = load_classification(tmp_path / "t.csv")
    assert (data.classes, data.multi_label) == (("a", "b", "c"), True)
    assert [labels(data)[f"x/{i}.wav"] for i in range(4)] == [{"a", "b"}, {"b"}, set(), {"a", "c"}]


def test_groups_stay_together_and_classes_in_proportion(tmp_path: Path):
    rng = np.random.default_rng(0)
    speakers = [f"s{i}" for i in range(40) for _ in range(rng.integers(1, 6))]
    touch(tmp_path, *numbered("x", len(speakers)))
    kinds = ["ab"[i % 2] for i in range(len(speakers))]
    rows = [f"x/{i}.wav,{kinds[i]},{speaker}" for i, speaker in enumerate(speakers)]
    (tmp_path / "t.csv").write_text("path,label,group\n" + "\n".join(rows))
    data = load_classification(tmp_path / "t.csv")
    of = {split: {speakers[place] for place in places} for split, places in data.splits.items()}
    assert not of["train"] & of["valid"] | of["train"] & of["test"] | of["valid"] & of["test"]
    shares = [len(data.splits[split]) / len(speakers) for split in ("train", "valid", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)


def test_rare_classes_of_several_are_in_every_split():
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 6)) < [0.5, 0.3, 0.1, 0.05, 0.03, 0.01]).astype(np.float32)
    split = divide(targets, [""] * 400, ["train", "valid", "test"], seed=0)
    assert all(targets[split == one].any(axis=0).all() for one in ("train", "valid", "test"))
    assert [np.mean(split == one) for one in ("train", "valid", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


@pytest.mark.parametrize("form", ["json", "cls", "labels"])
def test_tars_carry_labels_and_their_names_splits(tmp_path: Path, form: str):
    for split in ("train", "valid", "test"):
        members = []
        for number in range(4):
            kind = "ab"[number % 2]
            content = {"json": {"label": kind}, "cls": kind, "labels": {"labels": [kind, "c"][: 1 + number // 2]}}[form]
            text = content if isinstance(content, str) else json.dumps(content)
            members += [
                (f"{number}.wav", clip(0.1, seed=number)),
                (f"{number}.{'cls' if form == 'cls' else 'json'}", text.encode()),
            ]
        pack(tmp_path / f"{split}-000000.tar", members)
    data = load_classification(tmp_path)
    assert data.multi_label == (form == "labels")
    assert data.classes == (("a", "b", "c") if form == "labels" else ("a", "b"))
    assert {split: places.tolist() for split, places in data.splits.items()} == {
        "test": [0, 1, 2, 3],
        "train": [4, 5, 6, 7],
        "valid": [8, 9, 10, 11],
    }
    assert labels(data)["train-000000.tar/3.wav"] == ({"b", "c"} if form == "labels" else {"b"})


def test_folds_of_tars_are_not_separated(tmp_path: Path):
    for fold in range(1, 6):
        members = [
            (f"{i}.{s}", clip(0.1, seed=i) if s == "wav" else b"ab"[i % 2 :][:1])
            for i in range(4)
            for s in ("wav", "cls")
        ]
        pack(tmp_path / f"wds-audio-fold-{fold}-000000.tar", members)
    data = load_classification(tmp_path)
    folds = {split: {int(place) // 4 for place in places} for split, places in data.splits.items()}
    assert sorted(len(one) for one in folds.values()) == [1, 1, 3]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path,lable\na.wav,x\n", r"no column 'label'; found 'path', 'lable'"),
        ("path,label\na.wav,x\nb.wav,\n", "line 3: no value for 'label'"),
        ("path,label\na.wav,x\nb.wav,x\n", r"one class only \('x'\)"),
        ("path,label\na.wav,x\nzz.wav,y\n", r"1 file of 2 that cannot be found; first: .*zz\.wav"),
        ("path,label\na.wav,x;y\nb.wav,y\n", r"label 'x;y'; call the column 'labels'"),
        ("path,label,labels\na.wav,x,x;y\nb.wav,y,x\n", "columns 'label' and 'labels'; keep one"),
        ("path,label,split\na.wav,x,trian\nb.wav,y,test\n", r"split 'trian'; expected"),
        ("path,label,split\na.wav,x,train\nb.wav,y,\n", "split of some recordings only"),
        ("path,label,split\na.wav,x,valid\nb.wav,y,test\n", "no recordings in the split 'train'"),
        ("path,label,split\na.wav,x,train\nb.wav,y,test\nc.wav,x,valid\n", "'y' has no training recordings"),
        ("path,label\na.wav,x\nb.wav,y\n", "leaves no recordings for the split"),
        ("path,labels\na.wav,\nb.wav,\n", "no column 'label'"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, content: str, reason: str):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        load_classification(tmp_path / "t.csv")


def test_what_is_wrong_with_folders_and_tars_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist; give a folder with a subfolder per class, a table"):
        load_classification(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no subfolders"):
        load_classification(touch(tmp_path / "flat", "a.wav"))
    with pytest.raises(DataError, match=r"fold-\*\.tar does not exist, or nothing fits it"):
        load_classification(tmp_path / "fold-*.tar")
    with pytest.raises(DataError, match="soundworld:2 has no labels"):
        load_classification("soundworld:2")
    with pytest.raises(DataError, match="labels moments"):
        load_classification(touch(tmp_path / "events", "events.csv"))
    with pytest.raises(DataError, match=r"has no labels; give a folder"):
        load_classification(touch(tmp_path, "one.wav") / "one.wav")
    tar = pack(tmp_path / "train.tar", [("a.wav", clip(0.1)), ("a.json", b"{}")])
    with pytest.raises(DataError, match=r"train\.tar/a\.wav has no label that can be read"):
        load_classification(tar)


def test_balanced_recordings_of_rare_classes_come_as_often_as_others(tmp_path: Path):
    data = load_classification(touch(tmp_path, *numbered("rare", 10), *numbered("common", 90)))
    whole = SubsetSource(data.source, np.arange(100), "all")
    order = balanced(whole, data.targets).order(seed=3)
    drawn = np.array([order(place)[1] for place in range(4000)])
    assert data.targets[drawn].mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert [order(place) for place in (0, 150, 399)] == [(0, drawn[0]), (1, drawn[150]), (3, drawn[399])]
