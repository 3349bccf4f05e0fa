"""Figures of embedded clips: a map in two dimensions, and nearest neighbours."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.data.labels import LabelledTask
from bestrq2.inference.embedder import Embedder
from bestrq2.progress import Progress
from bestrq2.report.recordings import Recordings
from bestrq2.report.sounds import HIGHEST_RATE, Sound, cut_seconds, int16, playable
from bestrq2.search.layout import project
from bestrq2.search.neighbours import unit_length

MAP_WIDTH, MAP_HEIGHT, MARGIN = 640, 560, 16
MOST_POINTS = 2000
QUERIES, NEIGHBOURS = 6, 3
# A model of base size takes 8 s for so many clips on two CPU cores, so that the progress moves.
_EMBEDDED_AT_ONCE = 16


@dataclass(frozen=True)
class EmbeddedClip:
    """One labelled clip and its embedding.

    Attributes:
        vector: float [D], the clip embedding.
        domain, task, label: where the clip comes from and what it holds; "" for what is unknown.
        waveform: int16 [S], or None where the clip cannot be played.
        sampling_rate: sampling rate of `waveform` in Hz.
        name: name of the clip; "" for one that goes by its label.
    """

    vector: NDArray[np.floating]
    domain: str
    task: str
    label: str
    waveform: NDArray[np.int16] | None
    sampling_rate: int
    name: str = ""

    @property
    def title(self) -> str:
        """Name or label."""
        return self.name or self.label


def embedded_task_clips(embedder: Embedder, tasks: Sequence[LabelledTask], per_task: int = 40) -> list[EmbeddedClip]:
    """Embed the first test clips of every clip task, with their labels and sound."""
    clips: list[EmbeddedClip] = []
    for task in tasks:
        if task.kind != "clip":
            continue
        audio = list(task.test.audio[:per_task])
        vectors = embedder.embed(audio, task.test.sampling_rate).clip
        for place, vector in enumerate(vectors):
            sound = audio[place]
            waveform = int16(sound) if isinstance(sound, np.ndarray) else None
            label = task.classes[int(task.test.labels[place])]
            rate = task.test.sampling_rate or HIGHEST_RATE
            clips.append(EmbeddedClip(vector, task.domain, task.name, label, waveform, rate))
    return clips


def embedded_recordings(embedder: Embedder, recordings: Recordings) -> list[EmbeddedClip]:
    """Embed recordings under their names, with their groups as domains, in the order of the groups."""
    rate = embedder.config.sampling_rate
    vectors: list[NDArray[np.floating]] = []
    with Progress("report", len(recordings.waveforms), "recordings", leave=False) as progress:
        for start in range(0, len(recordings.waveforms), _EMBEDDED_AT_ONCE):
            vectors += list(embedder.embed(recordings.waveforms[start : start + _EMBEDDED_AT_ONCE], rate).clip)
            progress.show(len(vectors))
    several = len(set(recordings.groups)) > 1
    clips = [
        EmbeddedClip(vector, (group or f"no {recordings.grouped_by}") if several else "", "", "", sound, rate, name)
        for vector, group, sound, name in zip(
            vectors, recordings.groups, recordings.waveforms, recordings.names, strict=True
        )
    ]
    return sorted(clips, key=lambda clip: clip.domain)


def directions(clips: Sequence[EmbeddedClip]) -> NDArray[np.float64]:
    """Unit vectors [N, D] of the clips around their mean; a vector equal to the mean stays zero.

    The mean is subtracted because what all embeddings share says nothing about how they differ.
    """
    vectors = np.stack([np.asarray(clip.vector, dtype=np.float64).reshape(-1) for clip in clips])
    if len(clips) > 1:
        vectors -= vectors.mean(axis=0)
    unit_length(vectors)
    return vectors


# --- map ---


@dataclass(frozen=True)
class MapFigure:
    """Map of `of` clips.

    Attributes:
        points: x and y in a box of MAP_WIDTH × `height`, title, domain, task and label of every clip, and the number
            of its sound, -1 for none, as JSON types.
        height: at most MAP_HEIGHT.
        method: name of the projection.
        tasks: every (domain, task) with labels, in order.
        of: number of clips, of which a part may be shown.
    """

    points: list[dict[str, float | int | str]]
    height: float
    method: str
    tasks: list[tuple[str, str]]
    of: int


def map_figure(clips: Sequence[EmbeddedClip]) -> MapFigure | None:
    """Map of the clips (at most MOST_POINTS, evenly taken); None where there is nothing to lay out."""
    numbers = np.linspace(0, len(clips) - 1, min(len(clips), MOST_POINTS)).astype(int).tolist()
    kept = [clips[number] for number in numbers] if clips else []
    if len(kept) < 2:
        return None
    vectors = directions(kept)
    if not np.any(np.ptp(vectors, axis=0) > 1e-9):
        return None
    flat, method = project(vectors)
    places, height = _fitted(flat)
    points: list[dict[str, float | int | str]] = [
        {
            "x": round(x, 1),
            "y": round(y, 1),
            "title": clip.title,
            "domain": clip.domain,
            "task": clip.task,
            "label": clip.label,
            "sound": -1 if clip.waveform is None or not clip.waveform.size else number,
        }
        for (x, y), clip, number in zip(places.tolist(), kept, numbers, strict=True)
    ]
    tasks = list(dict.fromkeys((clip.domain, clip.task) for clip in kept if clip.label))
    return MapFigure(points, height, method, tasks, len(clips))


def _fitted(flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Points [N, 2] turned so that the longer side lies across and scaled to the box, and the height that they take."""
    if np.ptp(flat[:, 1]) > np.ptp(flat[:, 0]):
        flat = flat[:, ::-1]
    low, span = flat.min(axis=0), np.ptp(flat, axis=0)
    box = np.array([MAP_WIDTH - 2 * MARGIN, MAP_HEIGHT - 2 * MARGIN])
    scale = float(np.min(box / np.maximum(span, 1e-12)))
    height = round(max(MAP_HEIGHT / 2, 2 * MARGIN + float(span[1]) * scale))
    box[1] = height - 2 * MARGIN
    return MARGIN + (box - span * scale) / 2 + (flat - low) * scale, height


# --- nearest neighbours ---


@dataclass(frozen=True)
class Neighbour:
    """A clip in a row; `similarity` is the cosine to the query (1 for the query itself)."""

    clip: EmbeddedClip
    sound: Sound | None
    similarity: float
    same_label: bool
    same_domain: bool


@dataclass(frozen=True)
class NeighbourFigure:
    """Rows of a query and its neighbours, nearest first.

    The shares say how often, over all N clips, the NEIGHBOURS nearest have the domain or the label of their clip, and
    how often random other clips have.
    """

    rows: list[list[Neighbour]]
    clips: int
    same_domain: float
    same_domain_chance: float
    same_label: float
    same_label_chance: float


def neighbour_figure(clips: Sequence[EmbeddedClip]) -> NeighbourFigure | None:
    """Neighbours of up to QUERIES playable clips; None where there are fewer than two clips or none can be played."""
    queries = choose_queries(clips)
    if len(clips) < 2 or not queries:
        return None
    vectors = directions(clips)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(clips) - 1)]
    domains = _numbers([clip.domain for clip in clips])
    # clips without a label agree with none
    labels = _numbers([(clip.domain, clip.task, clip.label) if clip.label else i for i, clip in enumerate(clips)])
    heard: set[int] = set()

    def entry(index: int, query: int) -> Neighbour:
        sound = _sound(clips, index, again=index in heard)
        heard.add(index)
        cosine = 1.0 if index == query else float(similarity[index, query])
        return Neighbour(
            clips[index], sound, cosine, bool(labels[index] == labels[query]), bool(domains[index] == domains[query])
        )

    rows = [[entry(query, query), *(entry(int(i), query) for i in nearest[query])] for query in queries]
    return NeighbourFigure(rows, len(clips), *_agreement(domains, nearest), *_agreement(labels, nearest))


def choose_queries(clips: Sequence[EmbeddedClip], count: int = QUERIES) -> list[int]:
    """Indices of up to `count` playable clips, domains in turn and within each as many tasks as possible."""
    seen: Counter[tuple[str, str]] = Counter()
    by_domain: dict[str, list[tuple[int, int]]] = {}
    for index, clip in enumerate(clips):
        if clip.waveform is not None and clip.waveform.size:
            seen[clip.domain, clip.task] += 1
            # sorting by the number of the clip within its task takes one clip of every task first
            by_domain.setdefault(clip.domain, []).append((seen[clip.domain, clip.task], index))
    largest_first = sorted(by_domain.values(), key=len, reverse=True)
    turns = itertools.zip_longest(*(sorted(own) for own in largest_first))
    chosen = [ranked[1] for turn in turns for ranked in turn if ranked is not None][:count]
    domains = list(by_domain)
    return sorted(chosen, key=lambda index: (domains.index(clips[index].domain), index))


def _numbers(names: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _agreement(groups: NDArray[np.int64], nearest: NDArray[np.intp]) -> tuple[float, float]:
    """Share of neighbours in the group of their clip, and the share among random other clips."""
    sizes = np.bincount(groups)
    chance = float(np.mean((sizes[groups] - 1) / (len(groups) - 1)))
    return float(np.mean(groups[nearest] == groups[:, None])), chance


# --- sounds ---


def map_sounds(
    clips: Sequence[EmbeddedClip], on_map: MapFigure | None, beside: NeighbourFigure | None
) -> dict[str, str]:
    """Number of a clip on the map → its sound as a data URI, without those that the neighbours have already."""
    heard = {entry.sound.name for row in beside.rows for entry in row if entry.sound} if beside else set()
    numbers = [int(point["sound"]) for point in on_map.points] if on_map else []
    sounds = {number: _sound(clips, number) for number in numbers if number >= 0 and f"sound-{number}" not in heard}
    return {str(number): sound.uri for number, sound in sounds.items() if sound}


def _sound(clips: Sequence[EmbeddedClip], number: int, again: bool = False) -> Sound | None:
    clip, longest = clips[number], cut_seconds(len(clips))
    if clip.waveform is None:
        return None
    return playable(clip.waveform, clip.sampling_rate, f"sound-{number}", again, longest)
