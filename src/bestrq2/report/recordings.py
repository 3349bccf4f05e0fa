"""Recordings that the report of a run shows, with the names and groups they have in the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.data.loader import numbered_crops
from bestrq2.data.sources import Source, common_folder, top_folder
from bestrq2.model.fields import ModelFields
from bestrq2.report.sounds import int16

MOST_RECORDINGS = 400
# Each recording in remote tars may need a tar of its own to be fetched.
MOST_REMOTE = 16


@dataclass(frozen=True)
class Recordings:
    """Crops of recordings, held-out ones first.

    Attributes:
        names: file name of each, with the place of the clip in it where a prepared folder tells.
        groups: its label, or the top folder that it is in; "" for none.
        grouped_by: "label" or "folder".
        waveforms: int16 [samples] each, at the sampling rate of the model.
        held_out: number of recordings that training does not hear.
    """

    names: list[str]
    groups: list[str]
    grouped_by: str
    waveforms: list[NDArray[np.int16]]
    held_out: int


def shown_recordings(
    training: Source, held_out: Source | None, fields: ModelFields, seed: int, most: int = MOST_RECORDINGS
) -> Recordings:
    """Read crops of up to `most` recordings, always the same ones: held-out ones, then some of training.

    Args:
        training: recordings that the run hears.
        held_out: recordings that it does not hear; None for none.
        fields: fields of the model, which say how long crops may be.
        seed: random seed for choice and position.
        most: largest number of recordings.
    """
    paths: list[str] = []
    places: list[str] = []
    labels: list[object] = []
    waveforms: list[NDArray[np.int16]] = []
    unheard = 0
    for source in [held_out, training] if held_out is not None else [training]:
        wanted = min(most, MOST_REMOTE) if source is training and source.is_remote() else most
        for index, crop in numbered_crops(source, max(0, wanted - len(waveforms)), fields, seed=seed):
            known = source.metadata(index)
            # clips of a prepared folder remember the file they are from
            paths.append(str(known.get("path") or source.describe(index)))
            start = known.get("start")
            places.append(f", from {start:g} s" if isinstance(start, float) and start > 0 else "")
            labels.append(known.get("label"))
            waveforms.append(int16(crop))
        unheard = len(waveforms) if source is held_out else unheard
    groups, grouped_by = _groups(paths, labels)
    names = [path.rpartition("/")[2] + place for path, place in zip(paths, places, strict=True)]
    return Recordings(names, groups, grouped_by, waveforms, unheard)


def _groups(paths: Sequence[str], labels: Sequence[object]) -> tuple[list[str], str]:
    """Label of every recording where labels recur, else the top folder; and which of them it is."""
    kinds = {label for label in labels if isinstance(label, str | int)}
    if 1 < len(kinds) <= len(labels) / 2:
        return [str(label) if label in kinds else "" for label in map(_hashable, labels)], "label"
    rooted = ["/" + path.lstrip("/") for path in paths]
    root = common_folder(rooted)
    return [top_folder(path, root) for path in rooted], "folder"


def _hashable(label: object) -> str | int | None:
    return label if isinstance(label, str | int) else None
