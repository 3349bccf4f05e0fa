"""Labels of clips in tars: those of X-ARES (github.com/jimbozhang/xares), of SoundWorld, and other WebDatasets."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from io import FileIO
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import numpy as np

from bestrq2.data.shards import remote
from bestrq2.data.shards.members import BrokenOffError, members
from bestrq2.data.shards.shard_source import ShardSource
from bestrq2.data.splits import split_in
from bestrq2.errors import DataError
from bestrq2.text import counted

logger = logging.getLogger(__name__)

ClipLabel: TypeAlias = "tuple[str, ...] | np.ndarray"
"""Classes of a clip, or its events as float64 [events, 2], onset and offset in seconds."""

MARKER = ".audio_tar_ready"
"""Empty file that X-ARES puts into the folder of a task when all its tars are there."""


def xares_rows() -> list[dict[str, str]]:
    """Rows of xares_tasks.csv, the tasks of xares 0.1.3.

    Tasks with one class per clip have the field of the JSON that holds it under "class_field", others the kind of their
    labels under "other_labels".
    """
    text = (resources.files("bestrq2") / "data" / "xares_tasks.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


XARES_TASKS = {row["name"]: (row["domain"], row["class_field"]) for row in xares_rows() if row["class_field"]}
"""Domain and class field of the tasks of X-ARES with one class per clip."""
OTHER_KINDS = {row["name"]: row["other_labels"] for row in xares_rows() if row["other_labels"]}
"""Labels of the tasks of X-ARES with neither one class per clip nor one kind of event."""

# Bytes of a member KEY.cls that are read.
_MOST_CLASS = 1 << 12
_FOLD = re.compile(r"fold[-_]?(\d+)")
_FORMS: dict[type, str] = {str: "'label'", tuple: "'labels'", np.ndarray: "'events'"}


def tar_labels(place: str, source: ShardSource) -> tuple[np.ndarray, list[ClipLabel], bool]:
    """Labels of the usable clips of some tars; see `json_labels`.

    Without a label in its KEY.json, the class of a clip is the content of KEY.cls. Tasks of X-ARES have their class in
    a field of their own instead of "label".

    Args:
        place: folder or pattern of the tars; the folder's name may be that of an X-ARES task.
        source: clips of the tars.
    """
    field = XARES_TASKS.get(PurePath(place).name, ("", "label"))[1]
    usable = np.flatnonzero(source.index.problem == 0).tolist()
    return json_labels(place, usable, source.json, field, _ClassMembers(source).of)


def json_labels(
    place: str,
    clips: Sequence[int],
    content_of: Callable[[int], Any],
    field: str = "label",
    class_of: Callable[[int], str | None] = lambda clip: None,
) -> tuple[np.ndarray, list[ClipLabel], bool]:
    """Labels of clips that are described by JSON; clips without a label are left out with a warning.

    The JSON of a clip holds one class under "label", a list of classes under "labels", or a list of events with onset
    and offset in seconds under "events" or as the whole JSON.

    Args:
        place: where the clips come from, for messages.
        clips: numbers of the clips.
        content_of: from the number of a clip to its JSON; None where there is none.
        field: name of the field with one class.
        class_of: from the number of a clip without a label in its JSON to its class; None where there is none.

    Returns:
        Numbers of the labelled clips, int64, in their order; their labels, all of one form; and whether these are lists
        of classes.

    Raises:
        DataError: no clip has a label, their forms differ, or there are several kinds of events.
    """
    found: dict[int, str | tuple[str, ...] | np.ndarray] = {}
    kinds: set[str] = set()
    unlabelled = "no JSON"
    for clip in clips:
        content = content_of(clip)
        label = _label(content, field)
        if label is None:
            label = class_of(clip)
        if label is None:
            unlabelled = _fields(content)
            continue
        found[clip] = label
        if isinstance(label, np.ndarray):
            kinds |= {str(event.get("label")) for event in _event_list(content)}
    if not found:
        raise DataError(
            f"{place} has no labels; expected {field!r}, 'labels' or 'events' in the JSON of a clip, or one class in "
            f"KEY.cls (found: {unlabelled})."
        )
    forms = {type(label) for label in found.values()}
    if len(forms) > 1:
        raise DataError(f"{place} mixes {' and '.join(sorted(_FORMS[form] for form in forms))}; use one form.")
    if len(kinds) > 1:
        what = f"{len(kinds)} kinds of events"
        raise DataError(f"{place} has {what}; a task has one class per clip or one kind of event.")
    if len(found) < len(clips):
        missing = len(clips) - len(found)
        logger.warning("%s: left out without a label: %s of %d", place, counted(missing, "clip"), len(clips))
    labels: list[ClipLabel] = [(one,) if isinstance(one, str) else one for one in found.values()]
    return np.array(list(found), np.int64), labels, forms == {tuple}


def tar_groups(source: ShardSource, clips: np.ndarray) -> tuple[list[str], list[str]]:
    """Split and group of clips by the names of their tars.

    Names may mention a split, as in "train-000.tar" or "speech_eval_00.tar". Where all mention a fold, as in
    "fold-1-000.tar", the lowest fold is the test split and the others are groups of the training split.

    Args:
        source: clips of tars.
        clips: int64 [clips], numbers of the wanted ones.

    Returns:
        For each clip its split and its group, "" where there is none.
    """
    tar_of = source.starts.searchsorted(clips, side="right") - 1
    names = [Path(source.tars[tar]).name for tar in tar_of]
    folds = [_FOLD.search(name) for name in names]
    if not all(folds):
        return [split_in(name) for name in names], [""] * len(names)
    numbers = [int(fold[1]) for fold in folds if fold]
    if len(set(numbers)) == 1:  # a single fold: there is none to train on
        return [""] * len(names), [""] * len(names)
    lowest = min(numbers)
    return ["test" if number == lowest else "train" for number in numbers], [str(number) for number in numbers]


def _label(content: Any, field: str) -> str | tuple[str, ...] | np.ndarray | None:
    """The label in the JSON of a clip; None where there is none."""
    if isinstance(content, list) or (isinstance(content, dict) and "events" in content):
        return _events(_event_list(content))
    if not isinstance(content, dict):
        return None
    several, one = content.get("labels"), content.get(field)
    if isinstance(several, list) and all(isinstance(name, str | int) for name in several):
        return tuple(dict.fromkeys(str(name).strip() for name in several))
    return str(one).strip() or None if isinstance(one, str | int) else None


def _event_list(content: Any) -> Any:
    return content["events"] if isinstance(content, dict) else content


def _events(events: Any) -> np.ndarray | None:
    try:
        times = sorted((float(event["onset"]), float(event["offset"])) for event in events)
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return np.array(times, np.float64).reshape(-1, 2)


def _fields(content: Any) -> str:
    if isinstance(content, dict) and content:
        return ", ".join(map(repr, list(content)[:6]))
    return "no JSON" if content is None else f"JSON of type {type(content).__name__}"


class _ClassMembers:
    """Contents of the members KEY.cls; a tar is searched for them when a clip of it has no label otherwise."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self._found: dict[str, dict[str, str]] = {}

    def of(self, clip: int) -> str | None:
        """The class of a clip; None where it has no such member."""
        tar = self.source.tars[int(self.source.starts.searchsorted(clip, side="right")) - 1]
        if tar not in self._found:
            self._found[tar] = self._members(tar)
        key = self.source.describe(clip).removeprefix(f"{tar}/").rpartition(".")[0]
        return self._found[tar].get(key)

    @staticmethod
    def _members(tar: str) -> dict[str, str]:
        found: dict[str, str] = {}
        with remote.open_shard(tar) if remote.is_remote(tar) else FileIO(tar) as file:
            try:
                for member in members(Path(tar), file.fileno()):
                    key, _, suffix = member.name.rpartition(".")
                    if suffix == "cls" and not member.problem:
                        content = os.pread(file.fileno(), min(member.size, _MOST_CLASS), member.offset)
                        found[key] = content.decode("utf-8", "replace").strip()
            except BrokenOffError:
                pass  # the whole clips of a truncated tar are used
        return found
