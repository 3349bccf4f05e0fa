"""Labelled audio: tasks with classes and splits, read from folders, tables, tars, the Hub and SoundWorld.

Probes, fine-tuning, the online probe and the report read labels here and nowhere else, so that one corpus has the same
classes and the same test recordings for all of them.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal, TypeAlias, overload

import numpy as np

from bestrq2.data.hub import HubSource
from bestrq2.data.open_source import audio_files, log_skipped, open_source, soundworld_count
from bestrq2.data.places import AudioBytes
from bestrq2.data.shards.shard_source import ShardSource, open_shards
from bestrq2.data.sources import FileSource, PathList, Source, SubsetSource
from bestrq2.data.specs import TABLE_SUFFIXES, read_rows, resolved
from bestrq2.data.splits import SPLITS, checked_split, complete_splits, split_named
from bestrq2.data.tar_labels import MARKER, OTHER_KINDS, XARES_TASKS, ClipLabel, json_labels, tar_groups, tar_labels
from bestrq2.errors import DataError
from bestrq2.text import counted, nearest

logger = logging.getLogger(__name__)

DOMAINS = ("speech", "music", "environment")
PRESENCE = ("absent", "present")
EVENTS_FILE = "events.csv"
SEPARATOR = ";"
"""Between the classes of one recording in a column `labels`."""

_SOUNDWORLD_TRAIN = 400
_FORMS = (
    f"a folder with a subfolder per class, a table ({', '.join(sorted(TABLE_SUFFIXES))}) with path and label, "
    "tars with KEY.json or KEY.cls, or hub:NAME with a column label"
)

ClipAudio: TypeAlias = Path | AudioBytes | np.ndarray
"""A file, a member of a tar, or a mono float32 waveform [samples]."""


@dataclass(frozen=True)
class LabelledClips:
    """One split of a task: audio and, in the same order, its labels.

    Attributes:
        audio: files, or mono float32 waveforms [samples] at `sampling_rate`.
        labels: int64 [clips], class indices (kind "clip"); float32 [clips, classes], 1 for the classes of each clip
            (kind "multilabel"); or for each clip float64 [events, 2], onset and offset in seconds (kind "frame").
        sampling_rate: sampling rate of the waveforms in Hz; None where `audio` holds files.
        source: the same recordings as a source of batches; None for waveforms.
        groups: group of each clip, such as its speaker, int64 [clips]; None where the corpus names no groups.
    """

    audio: Sequence[ClipAudio]
    labels: np.ndarray | list[np.ndarray]
    sampling_rate: int | None = None
    source: SubsetSource | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.audio)

    def part(self, places: np.ndarray) -> LabelledClips:
        """The clips at these places, in their order; their audio is still looked up on access."""
        labels = [self.labels[place] for place in places]
        return LabelledClips(
            AudioAt(self.audio.__getitem__, places),
            np.asarray(labels) if isinstance(self.labels, np.ndarray) else labels,
            self.sampling_rate,
            groups=None if self.groups is None else self.groups[places],
        )


@dataclass(frozen=True)
class AudioAt(Sequence[ClipAudio]):
    """Audio of numbered clips, looked up on access.

    Attributes:
        lookup: from the number of a clip to its audio.
        places: int64 [clips], their numbers.
    """

    lookup: Callable[[int], ClipAudio]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> ClipAudio: ...
    @overload
    def __getitem__(self, index: slice) -> list[ClipAudio]: ...
    def __getitem__(self, index: int | slice) -> ClipAudio | list[ClipAudio]:
        if isinstance(index, slice):
            return [self.lookup(int(place)) for place in self.places[index]]
        return self.lookup(int(self.places[index]))


@dataclass(frozen=True)
class LabelledTask:
    """A classification task with disjoint splits.

    Attributes:
        name: short identifier, such as "music/instrument".
        domain: "speech", "music", "environment", or "" where unknown.
        kind: "clip" (one class per clip), "multilabel" (any number of classes per clip) or "frame" (presence of an
            event at each moment).
        classes: names of the classes in the order of their indices; ("absent", "present") for kind "frame".
        train: training clips.
        test: test clips.
        valid: validation clips; None where there are none.
    """

    name: str
    domain: str
    kind: Literal["clip", "multilabel", "frame"]
    classes: tuple[str, ...]
    train: LabelledClips
    test: LabelledClips
    valid: LabelledClips | None = None

    def clips(self, split: str) -> LabelledClips:
        """Clips of the split "train", "valid" or "test".

        Raises:
            DataError: the task has no such split.
        """
        found = {"train": self.train, "valid": self.valid, "test": self.test}[split]
        if found is None:
            raise DataError(f"{self.name} has no recordings in the split {split!r}.")
        return found

    @property
    def multi_label(self) -> bool:
        """Whether a clip may have any number of classes."""
        return self.kind == "multilabel"

    def source(self, split: str) -> SubsetSource:
        """Clips of a split as a source of batches.

        Raises:
            DataError: the task has no such split, or its clips are waveforms.
        """
        source = self.clips(split).source
        if source is None:
            raise DataError(f"{self.name} holds waveforms, not recordings.")
        return source

    def targets(self, split: str) -> np.ndarray:
        """Classes of the clips of a split: float32 [clips, classes], 1 for the classes of each clip, else 0."""
        labels = np.asarray(self.clips(split).labels)
        return labels if self.multi_label else np.eye(len(self.classes), dtype=np.float32)[labels]


def load_labelled(source: str | Path, seed: int = 0, names: Sequence[str] | None = None) -> list[LabelledTask]:
    """Load the tasks of a labelled corpus for probes: one class per clip, or one kind of event.

    Args:
        source: one of
            - a folder with a subfolder of audio for every class;
            - a folder with `train`, `test` and perhaps `valid`, each with a subfolder for every class;
            - a folder with `events.csv`: columns path (relative to it), onset and offset in seconds, and perhaps split
              and group; one row per event, and a row with empty onset and offset for a clip without events;
            - a folder with tars, such as that of an X-ARES task (see `tar_labels`);
            - a folder that holds several of the latter three at any depth, such as `tasks/music/instrument`;
            - a table (.csv, .tsv, .jsonl) with the columns path and label, and perhaps split and group;
            - a tar, or a pattern such as "fold-*.tar";
            - "hub:NAME": a dataset of the Hub with a column label, and perhaps split and group;
            - "soundworld" or "soundworld:N": generated tasks with N training and N // 2 test clips (400).
        seed: random seed of splits that are not given (see `complete_splits`). Probes keep a fifth for test and fit on
            the rest; where validation recordings are given but no test recordings, they are the test.
        names: names of the wanted tasks; None for all.

    Returns:
        The tasks, sorted by place; `audio` holds files, or waveforms for SoundWorld.

    Raises:
        DataError: missing, no audio, no labels, fewer than two classes, or a missing column, file, split or task.
    """
    if isinstance(source, str) and source.partition(":")[0] == "soundworld":
        train = soundworld_count(source, _SOUNDWORLD_TRAIN)
        if train < 2:
            raise DataError(f"{source!r}: tasks need at least 2 training clips.")
        return soundworld_tasks(names, train, train // 2)
    places = _places(source)
    known = [_task_name(place)[1] for place in places]
    for name in names or ():
        if name not in known:
            hint = nearest(name, known) or f"; it has {', '.join(known)}"
            raise DataError(f"{source} has no task {name!r}{hint}")
    wanted = [place for place, name in zip(places, known, strict=True) if names is None or name in names]
    unfit = [PurePath(place).name for place in wanted if PurePath(place).name in OTHER_KINDS]
    fitting = [place for place in wanted if PurePath(place).name not in OTHER_KINDS]
    others = ", ".join(f"{name} ({OTHER_KINDS[name]})" for name in unfit)
    if others and not fitting:
        raise DataError(f"{source}: {others} cannot be probed; a task has one class per clip, or one kind of event.")
    if others:
        logger.info("%s: left out, because a probe takes one class per clip or one kind of event: %s", source, others)
    return [_probe_task(_read(place), seed) for place in fitting]


def load_task(labelled: str | os.PathLike[str], seed: int = 0) -> LabelledTask:
    """Load the one task of a labelled corpus for fine-tuning, with training, validation and test recordings.

    Args:
        labelled: as for `load_labelled`, but with one task; instead of `label`, a table may have the column `labels`
            (any number of classes with ";" between them, empty for none), and KEY.json in tars a list "labels".
        seed: random seed of splits that are not given: from the training recordings a tenth is drawn for validation
            and a fifth for test (see `complete_splits`).

    Raises:
        DataError: as `load_labelled`; also several tasks, labelled moments, a split without recordings, or a class
            without training recordings.
    """
    name = os.fspath(labelled)
    if name.partition(":")[0] == "soundworld":
        raise DataError(f"{name} holds several tasks; write it as files (bestrq2 soundworld) and name one task.")
    places = _places(name)
    if len(places) > 1:
        several = ", ".join(_task_name(place)[1] for place in places[:3]) + (", ..." if len(places) > 3 else "")
        raise DataError(f"{name} holds {len(places)} tasks ({several}); name the folder of one.")
    task = _task(_read(places[0]), seed, SPLITS)
    if task.kind == "frame":
        raise DataError(f"{name} labels moments (onset and offset); fine-tuning takes classes of whole recordings.")
    for split in ("valid", "test"):
        missing = [task.classes[place] for place in np.flatnonzero(~task.targets(split).any(axis=0))]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            logger.warning("%s: no %s recordings of %s; means leave them out", name, split, shown)
    return task


def soundworld_tasks(
    names: Sequence[str] | None = None,
    train: int = 400,
    test: int = 200,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> list[LabelledTask]:
    """Labelled tasks of SoundWorld, with float32 waveforms at 16 kHz; see `soundworld.generated_tasks`."""
    from bestrq2.soundworld import SAMPLE_RATE, generated_tasks

    return [
        LabelledTask(
            spec.name, spec.domain, spec.kind, spec.classes, *(LabelledClips(*split, SAMPLE_RATE) for split in splits)
        )
        for spec, *splits in generated_tasks(names, train, test, seed, cache, None, progress)
    ]


# Reading: places of tasks, then the labels of each.


@dataclass(frozen=True)
class _Annotations:
    """Labels as they were read.

    Attributes:
        place: file, folder or pattern of the task, for its name and for messages.
        source: all recordings.
        labels: classes or events of each recording.
        splits: split of each recording; "" where it is not given.
        groups: group of each recording; "" for none.
        multilabel: whether a recording may have any number of classes.
    """

    place: str
    source: Source
    labels: Sequence[ClipLabel]
    splits: list[str]
    groups: list[str]
    multilabel: bool = False

    @property
    def framewise(self) -> bool:
        """Whether labels are events."""
        return isinstance(self.labels[0], np.ndarray)


def _places(source: str | os.PathLike[str]) -> list[str]:
    """Files, folders or patterns of the tasks in a corpus."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        folder = path.absolute()
        return [str(one) for one in _task_folders(folder)] or [str(folder)]
    exists = os.path.exists(path)
    if not exists and not set(":{*?[") & set(name):  # neither a pattern nor a named source
        raise DataError(f"{path} does not exist; give {_FORMS}, or soundworld.")
    return [str(path) if exists else name]


def _task_folders(folder: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """Folders at or below this one that hold a task: events, splits or tars; each real folder once."""
    try:
        names = {entry.name for entry in _entries(folder)}
    except DataError:
        if seen is None:
            raise
        return  # logged where the classes around it are read
    seen, real = set() if seen is None else seen, folder.resolve()
    if real in seen:
        return
    seen.add(real)
    below = _subfolders(folder)
    if {EVENTS_FILE, MARKER} & names or _tars(folder) or _are_splits(below):
        yield folder
        return
    for one in below:
        yield from _task_folders(one, seen)


def _entries(folder: Path) -> list[Path]:
    """Files and folders in a folder, sorted."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions.") from error


def _tars(folder: Path) -> list[Path]:
    """Tars in a folder, sorted; pipes and links that lead nowhere are none."""
    return [entry for entry in _entries(folder) if entry.name.endswith(".tar") and os.path.isfile(entry)]


def _subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted; hidden ones and links to folders around it are left out."""
    around = folder.resolve()
    return [
        entry
        for entry in _entries(folder)
        if not entry.name.startswith(".") and os.path.isdir(entry) and not around.is_relative_to(entry.resolve())
    ]


def _are_splits(folders: Sequence[Path]) -> bool:
    """Whether folders are splits: a class may be called "train" too, but without a "test" next to it."""
    splits = {split_named(folder.name) for folder in folders}
    return "train" in splits and (splits == {"train"} or len(splits - {""}) > 1)


def _task_name(place: str) -> tuple[str, str]:
    """Domain and name of a task; the domain is in its path, as in "music/instrument" and "music-instrument"."""
    path = PurePath(place)
    name = path.stem if path.suffix.lower() in (*TABLE_SUFFIXES, ".tar") else path.name
    if path.parent.name in DOMAINS:
        return path.parent.name, f"{path.parent.name}/{name}"
    domain, _, rest = path.name.partition("-")
    if domain in DOMAINS and rest:
        return domain, f"{domain}/{rest}"
    return XARES_TASKS.get(path.name, ("", ""))[0], name


def _read(place: str) -> _Annotations:
    """Labels of one task."""
    path = Path(place)
    if os.path.isdir(path):
        if (path / EVENTS_FILE).is_file():
            return _read_events(path / EVENTS_FILE)
        if (path / MARKER).exists() or _tars(path):
            return _read_tar_folder(path)
        return _read_class_folders(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _read_table(path)
    source = open_source(place)
    if isinstance(source, ShardSource):
        return _read_tars(place, source)
    if isinstance(source, HubSource):
        return _read_hub(place, source)
    raise DataError(f"{place} has no labels; give {_FORMS}.")


def _read_class_folders(folder: Path) -> _Annotations:
    below = _subfolders(folder)
    if _are_splits(below):
        parts = [(one, split_named(one.name)) for one in below if split_named(one.name)]
    else:
        parts = [(folder, "")]
    files: list[str] = []
    labels: list[ClipLabel] = []
    splits: list[str] = []
    skipped: Counter[str] = Counter()
    for part, split in parts:
        classes = _subfolders(part)
        if not classes:
            raise DataError(f"{part} holds no subfolders; expected one with audio for every class.")
        for one in classes:
            try:
                inside, others = audio_files(one)
            except DataError as error:
                logger.warning("%s is not used as a class: %s", one.name, error)
                continue
            skipped += others
            files += inside
            labels += [(one.name,)] * len(inside)
            splits += [split] * len(inside)
    log_skipped(folder, skipped)
    if not files:
        raise DataError(f"{folder} holds no audio in its subfolders; expected one with audio for every class.")
    source = FileSource(str(folder), PathList(files))
    return _Annotations(str(folder), source, labels, splits, [""] * len(files))


def _read_table(path: Path) -> _Annotations:
    found = read_rows(path, [("path",)], optional=("label", "labels"))
    multilabel = any(row["labels"] for row in found)
    if multilabel and any(row["label"] for row in found):
        raise DataError(f"{path} has the columns 'label' and 'labels'; keep one: label for one class, labels for any.")
    if multilabel:
        rows = read_rows(path, [("path",)], optional=("split", "group"), blank=("labels",))
        every = [[name.strip() for name in row["labels"].split(SEPARATOR)] for row in rows]
        labels: list[ClipLabel] = [tuple(dict.fromkeys(filter(None, names))) for names in every]
    else:
        rows = read_rows(path, [("path",), ("label",)], optional=("split", "group"))
        labels = [(row["label"],) for row in rows]
        if mixed := next((row["label"] for row in rows if SEPARATOR in row["label"]), None):
            raise DataError(
                f"{path} has the label {mixed!r}; call the column 'labels' if that is several classes, else write "
                f"it without {SEPARATOR!r}."
            )
    files = [resolved(path, row["path"]) for row in rows]
    return _of_files(path, path, files, labels, rows, multilabel)


def _read_events(path: Path) -> _Annotations:
    """Clips with their events; several rows of a file are gathered."""
    events: dict[str, list[tuple[float, float]]] = {}
    first: dict[str, dict[str, str]] = {}
    for row in read_rows(path, [("path",)], optional=("split", "group"), blank=("onset", "offset")):
        name = row["path"]
        if first.setdefault(name, row)["split"] != row["split"]:
            raise DataError(f"{path}: {name} is in both splits; keep its rows in one.")
        events.setdefault(name, [])
        if row["onset"] or row["offset"]:
            events[name].append(_event(path, row))
    if not any(events.values()):
        raise DataError(f"{path.parent} lists no event; expected onsets and offsets in seconds.")
    files = [resolved(path, name) for name in events]
    labels = [np.array(sorted(found), np.float64).reshape(-1, 2) for found in events.values()]
    return _of_files(path.parent, path, files, labels, list(first.values()))


def _event(path: Path, row: dict[str, str]) -> tuple[float, float]:
    try:
        onset, offset = float(row["onset"]), float(row["offset"])
    except ValueError:
        onset, offset = math.nan, math.nan
    if not 0 <= onset < offset < math.inf:
        raise DataError(
            f"{path}: {row['path']} has an event from {row['onset']!r} to {row['offset']!r}; expected seconds with "
            "0 <= onset < offset, or both empty for none."
        )
    return onset, offset


def _of_files(
    place: Path, origin: Path, files: list[Path], labels: Sequence[ClipLabel], rows: list[dict[str, str]],
    multilabel: bool = False,
) -> _Annotations:  # fmt: skip
    """Annotations of files that a table lists: each exists and is listed once."""
    seen: set[Path] = set()
    for path in files:
        if path in seen:
            raise DataError(f"{origin} lists {path} twice; one label and split for each recording is expected.")
        seen.add(path)
    # False for impossible names, too. What is there but is no file is rejected when it is read.
    missing = [path for path in files if not os.path.lexists(path)]
    if missing:
        raise DataError(
            f"{origin} lists {counted(len(missing), 'file')} of {len(files)} that cannot be found; first: {missing[0]}."
        )
    splits = [checked_split(origin, row["split"]) for row in rows]
    source = FileSource(str(origin.absolute()), PathList(map(str, files)))
    return _Annotations(str(place), source, labels, splits, [row["group"] for row in rows], multilabel)


def _read_tar_folder(folder: Path) -> _Annotations:
    tars = _tars(folder)
    if not tars:
        raise DataError(f"{folder} holds no tars although it has {MARKER}; delete that file and fetch them again.")
    if folder.name in XARES_TASKS and not (folder / MARKER).exists():
        raise DataError(
            f"{folder} has tars but no {MARKER}: its download is not finished; finish it, or create that empty file if "
            "all tars are there."
        )
    return _read_tars(str(folder), open_shards(tars, str(folder)))


def _read_tars(place: str, source: ShardSource) -> _Annotations:
    kept, labels, multilabel = tar_labels(place, source)
    splits, groups = tar_groups(source, kept)
    return _Annotations(place, SubsetSource(source, kept, source.name), labels, splits, groups, multilabel)


def _read_hub(place: str, source: HubSource) -> _Annotations:
    """Labels of a dataset of the Hub: columns label, and perhaps split and group."""
    rows = [source.metadata(number) for number in range(len(source))]
    kept, labels, multilabel = json_labels(place, range(len(rows)), rows.__getitem__)
    splits = [checked_split(place, str(rows[row].get("split", ""))) for row in kept]
    groups = [str(rows[row].get("group", "")) for row in kept]
    return _Annotations(place, SubsetSource(source, kept, source.name), labels, splits, groups, multilabel)


# Assembly: from annotations to tasks.


def _probe_task(found: _Annotations, seed: int) -> LabelledTask:
    """A task for probes, which fit on training recordings and on validation recordings that were only drawn."""
    if found.multilabel:
        raise DataError(f"{found.place} has any number of classes per clip; a probe takes one class per clip.")
    if "valid" in found.splits and "test" not in found.splits:
        found = replace(found, splits=["test" if split == "valid" else split for split in found.splits])
    return _task(found, seed, ("train", "test"))


def _task(found: _Annotations, seed: int, needed: Sequence[str]) -> LabelledTask:
    """The task of these annotations, checked and split; validation recordings that are not needed are not drawn."""
    classes = PRESENCE if found.framewise else tuple(sorted({name for label in found.labels for name in label}))
    if not classes or (len(classes) < 2 and not found.multilabel):
        what = f"one class only ({classes[0]!r})" if classes else "no labels at all"
        raise DataError(f"{found.place} has {what}; at least two classes are needed.")
    targets = _targets(found, classes)
    names = list(found.source.names())
    splits = complete_splits(found.place, found.splits, names, targets, found.groups, seed)
    if "valid" not in needed and "valid" not in found.splits:
        splits["train"] = np.sort(np.concatenate([splits["train"], splits.pop("valid")]))
    if empty := next((split for split in needed if not len(splits[split])), None):
        raise DataError(f"{found.place} leaves no recordings for the split {empty!r}; give more, or a split for each.")
    if not found.framewise and (untrained := np.flatnonzero(~targets[splits["train"]].any(axis=0))).size:
        name = classes[untrained[0]]
        raise DataError(f"{found.place}: the class {name!r} has no training recordings; give it some or remove it.")
    domain, name = _task_name(found.place)
    kind: Literal["clip", "multilabel", "frame"] = "multilabel" if found.multilabel else "clip"
    clips = {split: _clips(found, places, targets, split) for split, places in splits.items()}
    return LabelledTask(name, domain, "frame" if found.framewise else kind, classes, **clips)


def _targets(found: _Annotations, classes: tuple[str, ...]) -> np.ndarray:
    """Float32 [recordings, classes]; of events one column for the recordings that have any."""
    if found.framewise:
        return np.array([[bool(len(events))] for events in found.labels], np.float32)
    column = {name: number for number, name in enumerate(classes)}
    targets = np.zeros((len(found.labels), len(classes)), np.float32)
    for row, label in zip(targets, found.labels, strict=True):
        row[[column[name] for name in label]] = 1
    return targets


def _clips(found: _Annotations, places: np.ndarray, targets: np.ndarray, split: str) -> LabelledClips:
    if found.framewise:
        labels: np.ndarray | list[np.ndarray] = [np.asarray(found.labels[place]) for place in places.tolist()]
    else:
        labels = targets[places] if found.multilabel else targets[places].argmax(axis=1)
    source = SubsetSource(found.source, places, f"{found.place} ({split})")
    # a clip without a group is a group of its own
    names = [found.groups[place] or f"\0{place}" for place in places.tolist()]
    groups = np.unique(names, return_inverse=True)[1] if any(found.groups) else None
    return LabelledClips(_audio(found.source, places), labels, source=source, groups=groups)


def _audio(source: Source, places: np.ndarray) -> Sequence[ClipAudio]:
    if isinstance(source, FileSource):
        return [source.files[place] for place in places.tolist()]
    assert isinstance(source, SubsetSource)
    assert isinstance(source.whole, ShardSource | HubSource)
    lookup = source.whole.member if isinstance(source.whole, ShardSource) else source.whole.encoded
    return AudioAt(lookup, source.indices[places])
