"""Labelled audio for probes: what a task is, and how one is read from a folder or a table."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, overload

import numpy as np

from bestrq2.data.decoder import AudioBytes
from bestrq2.data.open_source import audio_files, soundworld_count
from bestrq2.data.tables import TABLE_SUFFIXES, read_rows, resolved
from bestrq2.errors import ConfigError, DataError
from bestrq2.seeding import generator
from bestrq2.text import counted

DOMAINS = ("speech", "music", "environment")
PRESENCE = ("absent", "present")
EVENTS_FILE = "events.csv"
SOUNDWORLD_TRAIN = 400
# First word of its seed sequence, so that it shares no random numbers with others.
SPLIT = 0x1ABE1

ClipAudio: TypeAlias = Path | AudioBytes | np.ndarray
"""A file, a member of a tar, or a mono float32 waveform [samples]."""


@dataclass(frozen=True)
class LabelledClips:
    """One split of a task: audio and, in the same order, what is true of it.

    Attributes:
        audio: files, or mono float32 waveforms [samples] at `sampling_rate`.
        labels: for kind "clip" an int64 array [clips] of class indices; for kind "frame" a list with, for every clip,
            a float64 array [events, 2] of onset and offset in seconds.
        sampling_rate: Hz, of the waveforms; None where `audio` holds files.
    """

    audio: Sequence[ClipAudio]
    labels: np.ndarray | list[np.ndarray]
    sampling_rate: int | None = None

    def __len__(self) -> int:
        return len(self.audio)

    def part(self, places: np.ndarray) -> LabelledClips:
        """The clips at these places, in their order; their audio is still looked up when it is asked for."""
        labels = [self.labels[place] for place in places]
        return LabelledClips(
            AudioAt(self.audio.__getitem__, places),
            np.asarray(labels) if isinstance(self.labels, np.ndarray) else labels,
            self.sampling_rate,
        )


@dataclass(frozen=True)
class AudioAt(Sequence[ClipAudio]):
    """Audio of numbered clips, each looked up when it is asked for.

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
        name: short identifier, e.g. "music/instrument".
        domain: "speech", "music", "environment", or "" where unknown.
        kind: "clip" (one class per clip) or "frame" (is the event present at this moment).
        classes: names of the classes in the order of their indices; ("absent", "present") for kind "frame".
        train: what probes are fitted on.
        test: what they are scored on.
    """

    name: str
    domain: str
    kind: Literal["clip", "frame"]
    classes: tuple[str, ...]
    train: LabelledClips
    test: LabelledClips


@dataclass(frozen=True)
class _Clip:
    """A labelled file; `label` is a class name or an array of events, `split` is "train", "test" or "" if undecided."""

    path: Path
    label: str | np.ndarray
    split: str


def load_labelled(
    source: str | Path, test_fraction: float = 0.25, seed: int = 0, names: Sequence[str] | None = None
) -> list[LabelledTask]:
    """The tasks in a labelled corpus.

    Args:
        source: one of
            - a folder with a subfolder of audio for every class, split here;
            - a folder with `train` and `test`, each with a subfolder for every class;
            - a folder with `events.csv`: columns path (relative to it), split (optional), onset and offset in seconds,
              one row an event, and a row with empty onset and offset for a clip without events;
            - a folder that holds several of the latter two at any depth, for instance `tasks/music/instrument`;
            - the folder of an X-ARES task, with its tars and `.audio_tar_ready`, or one that holds several, such as
              `env` (see `tar_tasks`);
            - a table (.csv, .tsv, .jsonl) with path, label and optionally split ("train" or "test");
            - "soundworld" or "soundworld:N": generated tasks with N training and N // 2 test clips (400).
        test_fraction: share of each class that is tested on, where the source does not say; at least one clip.
        seed: of that split, which is a function of it and the sorted names.
        names: of the tasks that are wanted; None for all.

    Returns:
        The tasks, sorted by name; `audio` holds files, or waveforms for SoundWorld.

    Raises:
        DataError: missing, no audio, no labels, fewer than two classes, a class with a single clip, a missing column,
            file, split or task.
        ConfigError: `test_fraction` is not between 0 and 1.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction}; it must lie between 0 and 1.")
    if isinstance(source, str) and (source == "soundworld" or source.startswith("soundworld:")):
        return _soundworld(source, names)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give a labelled folder, a table, or 'soundworld'.")
    tasks = _tasks_at(path, test_fraction, seed, names)
    check_names(path, [task.name for task in tasks], names)
    return [task for task in tasks if names is None or task.name in names]


def check_names(place: Path, known: Sequence[str], wanted: Sequence[str] | None) -> None:
    """Pass if all wanted tasks are known.

    Raises:
        DataError: one is not.
    """
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
            raise DataError(f"{place} has no task {name!r}; {hint}")


def _tasks_at(path: Path, test_fraction: float, seed: int, names: Sequence[str] | None) -> list[LabelledTask]:
    """The tasks in a file or a folder; of tars only those that are wanted."""
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise DataError(f"{path} is no labelled table; expected {', '.join(sorted(TABLE_SUFFIXES))} or a folder.")
        return [_task(path, _table_clips(path), test_fraction, seed)]
    folders = _task_folders(path.absolute())
    if folders:
        return [_task(folder, _folder_clips(folder), test_fraction, seed) for folder in folders]
    from bestrq2.data.labelled_tars import tar_tasks

    if in_tars := tar_tasks(path.absolute(), names):
        return in_tars
    return [_task(path.absolute(), _class_clips(path, ""), test_fraction, seed)]


def _soundworld(spec: str, names: Sequence[str] | None) -> list[LabelledTask]:
    train = soundworld_count(spec, SOUNDWORLD_TRAIN)
    if train < 2:
        raise DataError(f"{spec!r}: tasks need at least 2 training clips.")
    from bestrq2.soundworld import tasks

    return tasks(names=names, train=train, test=train // 2)


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted; hidden ones are left out.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions.") from error


def _task_folders(folder: Path) -> list[Path]:
    """Folders at or below this one that say of themselves that they are a task."""
    if (folder / EVENTS_FILE).is_file() or ((folder / "train").is_dir() and (folder / "test").is_dir()):
        return [folder]
    return [task for below in subfolders(folder) for task in _task_folders(below)]


def _folder_clips(folder: Path) -> list[_Clip]:
    if (folder / EVENTS_FILE).is_file():
        return _event_clips(folder / EVENTS_FILE)
    return [clip for split in ("train", "test") for clip in _class_clips(folder / split, split)]


def _class_clips(folder: Path, split: str) -> list[_Clip]:
    """Files in class subfolders."""
    classes = subfolders(folder)
    if not classes:
        raise DataError(f"{folder} holds no subfolders; expected one with audio for every class.")
    return [_Clip(path, name.name, split) for name in classes for path in audio_files(name)]


def _table_clips(path: Path) -> list[_Clip]:
    rows = read_rows(path, [("path",), ("label",)], optional=("split",))
    return [_Clip(resolved(path, row["path"]), row["label"], _split(path, row["split"])) for row in rows]


def _event_clips(path: Path) -> list[_Clip]:
    """Files with their events; several rows of a file are gathered."""
    events: dict[str, list[tuple[float, float]]] = {}
    splits: dict[str, str] = {}
    for row in read_rows(path, [("path",)], optional=("split",), blank=("onset", "offset")):
        name, split = row["path"], _split(path, row["split"])
        if splits.setdefault(name, split) != split:
            raise DataError(f"{path}: {name} is in both splits; keep its rows in one.")
        events.setdefault(name, [])
        if row["onset"] or row["offset"]:
            events[name].append(_event(path, row))
    return [
        _Clip(resolved(path, name), np.array(sorted(found), np.float64).reshape(-1, 2), splits[name])
        for name, found in events.items()
    ]


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


def _split(path: Path, name: str) -> str:
    if name not in ("train", "test", ""):
        near = difflib.get_close_matches(name.lower(), ("train", "test"), n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"{path} has the split {name!r}; expected 'train' or 'test'{hint}.")
    return name


def _task(origin: Path, clips: list[_Clip], test_fraction: float, seed: int) -> LabelledTask:
    """The task made of these clips, checked and split."""
    check_files(origin, [clip.path for clip in clips])
    framewise = isinstance(clips[0].label, np.ndarray)
    if framewise:
        classes: tuple[str, ...] = PRESENCE
        if not any(len(clip.label) for clip in clips):
            raise DataError(f"{origin} lists no event; expected onsets and offsets in seconds.")
    else:
        classes = tuple(sorted({str(clip.label) for clip in clips}))
        if len(classes) < 2:
            raise DataError(f"{origin} has one class only ({classes[0]!r}); a task needs at least two.")
    train, test = _divided(origin, clips, framewise, test_fraction, seed)
    domain = origin.parent.name if origin.parent.name in DOMAINS else ""
    return LabelledTask(
        name=f"{domain}/{origin.stem}" if domain else origin.stem,
        domain=domain,
        kind="frame" if framewise else "clip",
        classes=classes,
        train=_labelled(train, classes),
        test=_labelled(test, classes),
    )


def check_files(origin: Path, paths: Sequence[Path]) -> None:
    """Pass if files that are listed exist, and each is listed once.

    Raises:
        DataError: a file is missing or listed twice.
    """
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"{origin} lists {path} twice; one label and split for each recording is expected.")
        seen.add(path)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{origin} lists {counted(len(missing), 'file')} of {len(paths)} that cannot be found; first: {missing[0]}."
        )


def _divided(
    origin: Path, clips: list[_Clip], framewise: bool, test_fraction: float, seed: int
) -> tuple[list[_Clip], list[_Clip]]:
    """Training and test clips, by the given split or else drawn class by class."""
    splits = {clip.split for clip in clips}
    if "" in splits:
        if splits != {""}:
            raise DataError(f"{origin} gives the split of some recordings only; give it for all or none.")
        return _drawn(origin, clips, framewise, test_fraction, seed)
    for wanted in ("train", "test"):
        if wanted not in splits:
            raise DataError(f"{origin} has no recordings in the split {wanted!r}; give both, or no split at all.")
    train = [clip for clip in clips if clip.split == "train"]
    test = [clip for clip in clips if clip.split == "test"]
    if not framewise:
        unknown = sorted({str(clip.label) for clip in test} - {str(clip.label) for clip in train})
        if unknown:
            raise DataError(f"{origin}: the class {unknown[0]!r} is tested on but has no training clips.")
    return train, test


def _drawn(
    origin: Path, clips: list[_Clip], framewise: bool, test_fraction: float, seed: int
) -> tuple[list[_Clip], list[_Clip]]:
    groups: dict[str, list[_Clip]] = {}
    for clip in sorted(clips, key=lambda clip: str(clip.path)):
        # Frame tasks: clips with and without events are the two kinds to keep in proportion.
        group = str(bool(len(clip.label))) if framewise else str(clip.label)
        groups.setdefault(group, []).append(clip)
    train: list[_Clip] = []
    test: list[_Clip] = []
    for number, name in enumerate(sorted(groups)):
        group_clips = groups[name]
        if len(group_clips) < 2 and not framewise:
            raise DataError(f"{origin}: the class {name!r} has a single clip; two are needed, to train and to test on.")
        order = generator(SPLIT, seed, number).permutation(len(group_clips))
        tested = min(len(order) - 1, max(1, round(test_fraction * len(order))))
        test += [group_clips[i] for i in sorted(order[:tested])]
        train += [group_clips[i] for i in sorted(order[tested:])]
    if not test:
        raise DataError(f"{origin} has too few clips to train and to test on; expected at least two of a kind.")
    return train, test


def _labelled(clips: list[_Clip], classes: tuple[str, ...]) -> LabelledClips:
    paths = [clip.path for clip in clips]
    if isinstance(clips[0].label, np.ndarray):
        return LabelledClips(paths, [np.asarray(clip.label) for clip in clips])
    index = {name: number for number, name in enumerate(classes)}
    return LabelledClips(paths, np.array([index[str(clip.label)] for clip in clips], np.int64))
