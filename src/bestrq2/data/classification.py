"""Labelled recordings for fine-tuning: one or several classes a recording, in training, validation and test splits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.data.division import SPLITS, divide
from bestrq2.data.labelled import EVENTS_FILE, check_files, subfolders
from bestrq2.data.open_source import audio_files, open_recordings
from bestrq2.data.shards.members import BrokenOffError, members
from bestrq2.data.shards.shard_source import ShardSource
from bestrq2.data.sources import FileSource, PathList, Source, SubsetSource
from bestrq2.data.tables import TABLE_SUFFIXES, read_rows, resolved
from bestrq2.errors import DataError

SEPARATOR = ";"
"""Between the labels of one recording in a column `labels`."""

_FORMS = (
    f"a folder with a subfolder per class, a table ({', '.join(sorted(TABLE_SUFFIXES))}) with path and label, "
    "or tars with KEY.json or KEY.cls"
)

# What tables, folders and tars call the splits.
_SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid"} | {
    "test": "test",
    "eval": "test",
}
_FOLD = re.compile(r"fold-(\d+)")


@dataclass(frozen=True)
class ClassificationData:
    """Recordings, what is true of them, and what they are for.

    Attributes:
        name: where they come from.
        source: all recordings.
        classes: names of the classes, sorted.
        multi_label: whether a recording may have any number of classes; else it has exactly one.
        targets: float32 [recordings, classes], 1 where a recording is of a class, else 0.
        splits: for "train", "valid" and "test" the numbers of its recordings, int64, rising; disjoint.
    """

    name: str
    source: Source
    classes: tuple[str, ...]
    multi_label: bool
    targets: np.ndarray
    splits: dict[str, np.ndarray]

    def split(self, name: str) -> SubsetSource:
        """The recordings of one split."""
        return SubsetSource(self.source, self.splits[name], f"{self.name} ({name})")


@dataclass(frozen=True)
class _Annotations:
    """What was read: a source and, for every recording, its labels, split ("" if not given) and group ("" for none)."""

    source: Source
    labels: list[tuple[str, ...]]
    splits: list[str]
    groups: list[str]
    multi_label: bool


def load_classification(labelled: str | os.PathLike[str], seed: int = 0) -> ClassificationData:
    """Labelled recordings, divided into training, validation and test.

    Args:
        labelled: one of
            - a folder with a subfolder of audio for every class, or with `train`, `test` and perhaps `valid`, each with
              a subfolder for every class;
            - a table (.csv, .tsv, .jsonl) with the column `path` and either `label` (one class) or `labels` (any number
              of classes with ";" between them; empty for none), and perhaps `split` ("train", "valid", "test") and
              `group` (recordings that must not be separated, such as those of one speaker);
            - WebDataset tars (a folder of them, one tar, or a pattern such as "fold-*.tar"): beside the audio, KEY.json
              has "label" (one class) or "labels" (a list), or KEY.cls holds one class. Tars whose names begin with
              train, valid or test are those splits; "fold-K" in the name of all tars makes each fold a group.
        seed: splits that are not given are drawn from the training recordings, class by class and group by group, as a
            function of it and the sorted names: a tenth for validation and a fifth for test.

    Raises:
        DataError: nothing there, missing files, columns or labels, one class only, a split without recordings, or a
            class that has no training recordings.
    """
    name = os.fspath(labelled)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        found = _of_table(path)
    elif path.is_dir() and not any(path.glob("*.tar")):
        found = _of_folder(path.absolute())
    elif not path.exists() and not set(":{*?[") & set(name):  # no pattern, URL or word
        raise DataError(f"{name} does not exist; give {_FORMS}.")
    else:
        source = open_recordings(name)
        if not isinstance(source, ShardSource):
            raise DataError(f"{name} has no labels; give {_FORMS}.")
        found = _of_tars(source)
    return _checked(name, found, seed)


def _of_folder(folder: Path) -> _Annotations:
    if (folder / EVENTS_FILE).is_file():
        raise DataError(f"{folder} labels moments ({EVENTS_FILE}); fine-tuning names classes of whole recordings.")
    given = [entry for entry in subfolders(folder) if _SPLIT_NAMES.get(entry.name.lower())]
    named = {_SPLIT_NAMES[entry.name.lower()] for entry in given}
    parts = [(entry, _SPLIT_NAMES[entry.name.lower()]) for entry in given] if "train" in named else [(folder, "")]
    files: list[Path] = []
    labels: list[tuple[str, ...]] = []
    splits: list[str] = []
    for part, split in parts:
        classes = subfolders(part)
        if not classes:
            raise DataError(f"{part} holds no subfolders; expected one with audio for every class.")
        for one in classes:
            inside = audio_files(one)
            files += inside
            labels += [(one.name,)] * len(inside)
            splits += [split] * len(inside)
    source = FileSource(str(folder), PathList(map(str, files)))
    return _Annotations(source, labels, splits, [""] * len(files), multi_label=False)


def _of_table(path: Path) -> _Annotations:
    found = read_rows(path, [("path",)], optional=("label", "labels"))
    multi_label = any(row["labels"] for row in found)
    if multi_label and any(row["label"] for row in found):
        raise DataError(f"{path} has the columns 'label' and 'labels'; keep one: label for one class, labels for any.")
    if multi_label:
        rows = read_rows(path, [("path",)], optional=("split", "group"), blank=("labels",))
        labels = [_several(row["labels"]) for row in rows]
    else:
        rows = read_rows(path, [("path",), ("label",)], optional=("split", "group"))
        labels = [(row["label"],) for row in rows]
        for (label,) in labels:
            if SEPARATOR in label:
                raise DataError(
                    f"{path} has the label {label!r}; call the column 'labels' if that is several classes, else write "
                    f"it without {SEPARATOR!r}."
                )
    files = [resolved(path, row["path"]) for row in rows]
    check_files(path, files)
    splits = [_split(path, row["split"]) for row in rows]
    source = FileSource(str(path.absolute()), PathList(map(str, files)))
    return _Annotations(source, labels, splits, [row["group"] for row in rows], multi_label)


def _several(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label.strip() for label in text.split(SEPARATOR) if label.strip()))


def _split(origin: object, name: str) -> str:
    if name and name.lower() not in _SPLIT_NAMES:
        raise DataError(f"{origin} has the split {name!r}; expected 'train', 'valid' or 'test'.")
    return _SPLIT_NAMES[name.lower()] if name else ""


def _of_tars(source: ShardSource) -> _Annotations:
    usable = np.flatnonzero(source.index.problem == 0)
    tars = [source.tars[place] for place in source.starts.searchsorted(usable, side="right") - 1]
    classes = {tar: _class_members(Path(tar)) for tar in dict.fromkeys(tars)}
    labels: list[tuple[str, ...]] = []
    kinds: dict[bool, str] = {}
    for index, tar in zip(usable.tolist(), tars, strict=True):
        clip, known = source.describe(index), source.metadata(index)
        several = "labels" in known
        key = clip.removeprefix(f"{tar}/").rpartition(".")[0]
        labels.append(
            _labels_of(clip, known["labels"] if several else known.get("label", classes[tar].get(key)), several)
        )
        kinds.setdefault(several, clip)
    if len(kinds) > 1:
        raise DataError(f"{source.name}: {kinds[False]} has one 'label', but {kinds[True]} has 'labels'; use one form.")
    names = [Path(tar).name for tar in tars]
    splits = [next((split for word, split in _SPLIT_NAMES.items() if name.startswith(word)), "") for name in names]
    folds = [_FOLD.search(name) for name in names]
    groups = [fold[1] if fold and all(folds) else "" for fold in folds]
    return _Annotations(SubsetSource(source, usable, source.name), labels, splits, groups, multi_label=True in kinds)


def _labels_of(clip: str, value: Any, several: bool) -> tuple[str, ...]:
    if several and isinstance(value, list) and all(isinstance(one, str | int) for one in value):
        return tuple(dict.fromkeys(str(one).strip() for one in value))
    if not several and isinstance(value, str | int) and str(value).strip():
        return (str(value).strip(),)
    form = '"labels": ["a", "b"]' if several else '"label": "a"'
    raise DataError(
        f"{clip} has no label that can be read (found {json.dumps(value)[:60]}); expected {form} in its KEY.json, or "
        "one class in KEY.cls."
    )


def _class_members(tar: Path) -> dict[str, str]:
    """Key → content of every member KEY.cls."""
    found: dict[str, str] = {}
    with tar.open("rb") as file:
        try:
            for member in members(tar, file.fileno()):
                key, _, suffix = member.name.rpartition(".")
                if suffix == "cls" and not member.problem:
                    found[key] = os.pread(file.fileno(), member.size, member.offset).decode("utf-8", "replace").strip()
        except BrokenOffError:
            pass  # its whole clips are used, as everywhere
    return found


def _checked(name: str, found: _Annotations, seed: int) -> ClassificationData:
    classes = tuple(sorted({label for labels in found.labels for label in labels}))
    if not classes or (len(classes) < 2 and not found.multi_label):
        what = f"one class only ({classes[0]!r})" if classes else "no labels at all"
        raise DataError(f"{name} has {what}; a classifier needs at least two.")
    column = {label: number for number, label in enumerate(classes)}
    targets = np.zeros((len(found.labels), len(classes)), np.float32)
    for row, labels in zip(targets, found.labels, strict=True):
        row[[column[label] for label in labels]] = 1
    splits = _given_or_drawn(name, found, targets, seed)
    for split in SPLITS:
        if not len(splits[split]):
            raise DataError(f"{name} leaves no recordings for the split {split!r}; give more, or a split for each.")
    trained = targets[splits["train"]].any(axis=0)
    for number in np.flatnonzero(~trained)[:1]:
        raise DataError(f"{name}: the class {classes[number]!r} has no training recordings; give it some or remove it.")
    return ClassificationData(name, found.source, classes, found.multi_label, targets, splits)


def _given_or_drawn(name: str, found: _Annotations, targets: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    given = {split: [place for place, one in enumerate(found.splits) if one == split] for split in (*SPLITS, "")}
    if given[""] and len(given[""]) < len(found.splits):
        raise DataError(f"{name} gives the split of some recordings only; give it for all or none.")
    if not given[""] and not given["train"]:
        raise DataError(f"{name} has no recordings in the split 'train'; give some, or no split at all.")
    wanted = [split for split in SPLITS if not given[split]]
    pool = given[""] or given["train"]
    order = sorted(pool, key=found.source.describe)
    drawn = divide(targets[order], [found.groups[place] for place in order], _ordered(wanted), seed)
    splits = {split: np.array(sorted(places), np.int64) for split, places in given.items() if split}
    for split in {"train", *wanted}:
        splits[split] = np.sort(np.array(order, np.int64)[drawn == split])
    return splits


def _ordered(wanted: Sequence[str]) -> list[str]:
    """The splits to draw, training always among them."""
    return [split for split in SPLITS if split == "train" or split in wanted]
