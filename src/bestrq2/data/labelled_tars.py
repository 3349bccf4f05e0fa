"""Labelled tasks in the tars that X-ARES (github.com/jimbozhang/xares) reads: clips, splits and labels."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bestrq2.data.labelled import DOMAINS, PRESENCE, AudioAt, LabelledClips, LabelledTask, check_names, subfolders
from bestrq2.data.shards.shard_source import ShardSource, open_shards
from bestrq2.errors import DataError
from bestrq2.text import counted

logger = logging.getLogger(__name__)

MARKER = ".audio_tar_ready"
"""X-ARES puts this empty file into the folder of a task when all its tars are there."""

LABEL_FIELD = "label"
"""Field of the JSON with the class of a clip, where the task is none of X-ARES."""

XARES_TASKS = {
    "asvspoof2015": ("speech", "binary_spoof"),
    "cremad": ("speech", "label"),
    "fluentspeechcommands": ("speech", "transcription"),
    "libricount": ("speech", "num_speakers"),
    "librispeechmalefemale": ("speech", "gender"),
    "ravdess": ("speech", "emotion"),
    "speechcommandsv1": ("speech", "labels"),
    "vocalimitations": ("speech", "imitation"),
    "vocalsound": ("speech", "label"),
    "voxceleb1": ("speech", "speakerid"),
    "voxlingua33": ("speech", "labels"),
    "freemusicarchive": ("music", "genre"),
    "gtzan_genre": ("music", "genre"),
    "nsynthinstument": ("music", "instrument_family_str"),
    "esc50": ("environment", "label"),
    "finger_snap": ("environment", "tag"),
    "fsdkaggle2018": ("environment", "sound"),
    "inside_outside_car": ("environment", "position"),
    "key_scratching": ("environment", "tag"),
    "liveenv": ("environment", "soundevent"),
    "subway_broadcast": ("environment", "broadcasting"),
    "urbansound8k": ("environment", "soundevent"),
}
"""Tasks of xares 0.1.3 with one class a clip: domain, and the field of the JSON that holds the class."""

OTHER_KINDS = {
    "clotho": "captions",
    "desed": "several kinds of events",
    "fsd50k": "several classes a clip",
    "librispeech": "transcripts",
    "maestro": "notes",
}
"""Its tasks whose labels a probe of one class a clip, or of one kind of event, cannot take."""

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "eval", "evaluation"),
    "valid": ("valid", "validation", "val", "dev"),
}
_FOLD = re.compile(r"fold[-_]?(\d+)")
_Label: TypeAlias = "str | np.ndarray"
"""A class, or events as float64 [events, 2]."""


def tar_tasks(folder: Path, names: Sequence[str] | None = None) -> list[LabelledTask]:
    """The tasks at or below a folder that lie in tars; none where there are no tars and no marker.

    A task is tested on its tars of the test split, else of the validation split, else of the lowest fold, and trained
    on those of the training split or of the other folds. Tasks of a kind that probes cannot take are left out with a
    notice, unless there is no other.

    Args:
        folder: of one task, or of several at any depth, such as the `env` of X-ARES.
        names: of the tasks that are wanted; None for all.

    Raises:
        DataError: a task, its tars, marker, split or labels are missing, or none is of a fitting kind.
    """
    folders = list(_folders(folder))
    if folders and names is not None:
        check_names(folder, [_name(one)[1] for one in folders], names)
        folders = [one for one in folders if _name(one)[1] in names]
    fitting = [one for one in folders if one.name not in OTHER_KINDS]
    others = ", ".join(f"{one.name} ({OTHER_KINDS[one.name]})" for one in folders if one.name in OTHER_KINDS)
    if others and not fitting:
        raise DataError(f"{folder}: {others} cannot be probed; a task has one class a clip, or one kind of event.")
    if others:
        logger.info("%s: left out, because a probe takes one class a clip or one kind of event: %s", folder, others)
    return [_task(one) for one in fitting]


def _folders(folder: Path) -> Iterator[Path]:
    """Folders at or below this one that hold tars, or say that they do."""
    try:
        with os.scandir(folder) as entries:
            is_task = any(entry.name == MARKER or entry.name.endswith(".tar") for entry in entries)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions.") from error
    if is_task:
        yield folder
    else:
        for below in subfolders(folder):
            yield from _folders(below)


def _task(folder: Path) -> LabelledTask:
    train, test = _split_tars(folder)
    source = open_shards([*train, *test], str(folder))
    usable = np.flatnonzero(source.index.problem == 0)
    labels = _labels(folder, source, usable, XARES_TASKS.get(folder.name, ("", LABEL_FIELD))[1])
    framewise = isinstance(next(iter(labels.values())), np.ndarray)
    classes = PRESENCE if framewise else tuple(sorted({str(label) for label in labels.values()}))
    if not framewise and len(classes) < 2:
        raise DataError(f"{folder} has one class only ({classes[0]!r}); a task needs at least two.")
    places, first_test = np.array(list(labels), np.int64), source.starts[len(train)]
    parts = (places[places < first_test], places[places >= first_test])
    splits = [_clips(folder, source, part, labels, classes) for part in parts]
    domain, name = _name(folder)
    return LabelledTask(name, domain, "frame" if framewise else "clip", classes, *splits)


def _name(folder: Path) -> tuple[str, str]:
    """Domain and name of a task; SoundWorld's say their domain, as in "music-instrument"."""
    domain, _, rest = folder.name.partition("-")
    if domain in DOMAINS and rest:
        return domain, f"{domain}/{rest}"
    return XARES_TASKS.get(folder.name, ("", ""))[0], folder.name


def _split_tars(folder: Path) -> tuple[list[Path], list[Path]]:
    """Tars to train and to test on."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder} holds no tars although {MARKER} says so; delete that file and fetch them again.")
    if not (folder / MARKER).exists():
        raise DataError(
            f"{folder} has tars but no {MARKER}: its download is not finished; finish it, or create that empty file if "
            "all tars are there."
        )
    folds = [_FOLD.search(tar.name) for tar in tars]
    numbers = [int(fold[1]) if fold else -1 for fold in folds]
    if all(folds) and len(set(numbers)) > 1:
        lowest = min(numbers)
        return (
            [tar for tar, number in zip(tars, numbers, strict=True) if number > lowest],
            [tar for tar, number in zip(tars, numbers, strict=True) if number == lowest],
        )
    of: dict[str, list[Path]] = {split: [] for split in _SPLIT_WORDS}
    for tar in tars:
        words = re.split(r"[^a-z]+", tar.stem.lower())
        for split in [split for split, names in _SPLIT_WORDS.items() if set(names) & set(words)][:1]:
            of[split].append(tar)
    train, test = of["train"], of["test"] or of["valid"]
    if not train or not test:
        found = ", ".join(tar.name for tar in tars[:3]) + (", ..." if len(tars) > 3 else "")
        raise DataError(
            f"{folder} has no tars of a {'test' if train else 'training'} split (found: {found}); expected names with "
            "'train' and with 'test', 'eval' or 'valid', or with several 'fold-N'."
        )
    return train, test


def _labels(folder: Path, source: ShardSource, usable: np.ndarray, field: str) -> dict[int, _Label]:
    """Labels of the clips that have one, by their numbers; all classes or all events."""
    labels: dict[int, _Label] = {}
    kinds: set[str] = set()
    found = "no JSON"
    for place in usable.tolist():
        content = source.json(place)
        events = content.get("events") if isinstance(content, dict) else content
        label = _class(content, field) if events is None else _events(events)
        if label is None:
            found = _fields(content)
        else:
            labels[place] = label
            kinds |= {str(event.get("label")) for event in events or ()}
    if not labels:
        raise DataError(
            f"{folder} has no labels; expected {field!r} or 'events' in the JSON of a clip (found: {found})."
        )
    if len({type(label) for label in labels.values()}) > 1 or len(kinds) > 1:
        what = f"{len(kinds)} kinds of events" if len(kinds) > 1 else "classes and events"
        raise DataError(f"{folder} has {what}; a probe takes one class a clip, or one kind of event.")
    if len(labels) < len(usable):
        missing = len(usable) - len(labels)
        logger.warning("%s: left out without a label: %s of %d", folder, counted(missing, "clip"), len(usable))
    return labels


def _class(content: Any, field: str) -> str | None:
    value = content.get(field) if isinstance(content, dict) else None
    return str(value).strip() or None if isinstance(value, str | int) else None


def _events(events: Any) -> np.ndarray | None:
    try:
        times = sorted((float(event["onset"]), float(event["offset"])) for event in events)
    except (TypeError, KeyError, ValueError):
        return None
    return np.array(times, np.float64).reshape(-1, 2)


def _fields(content: Any) -> str:
    if isinstance(content, dict) and content:
        return ", ".join(map(repr, list(content)[:6]))
    return "no JSON" if content is None else f"JSON of type {type(content).__name__}"


def _clips(
    folder: Path, source: ShardSource, places: np.ndarray, labels: dict[int, _Label], classes: tuple[str, ...]
) -> LabelledClips:
    if not len(places):
        raise DataError(f"{folder} has labels in one of its splits only; both need some.")
    chosen = [labels[place] for place in places.tolist()]
    if classes == PRESENCE and isinstance(chosen[0], np.ndarray):
        return LabelledClips(AudioAt(source.member, places), [np.asarray(events) for events in chosen])
    number = {name: at for at, name in enumerate(classes)}
    return LabelledClips(AudioAt(source.member, places), np.array([number[str(label)] for label in chosen], np.int64))
