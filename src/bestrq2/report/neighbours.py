"""Nearest neighbours of a few clips, to be listened to."""

from __future__ import annotations

import base64
import io
import wave
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.report.colours import unique
from bestrq2.report.contents import EmbeddedClip
from bestrq2.report.embedding_map import directions

QUERIES = 6
NEIGHBOURS = 3
SECONDS = 4.0
HIGHEST_RATE = 16_000
OUTLINE_POINTS = 120


@dataclass(frozen=True)
class Sound:
    """A playable cut of a clip: wav data URI, where it starts and how long it is in seconds, and its outline."""

    uri: str
    start: float
    seconds: float
    outline: str


@dataclass(frozen=True)
class Neighbour:
    """A clip in the list; `similarity` is the cosine to the query (1 for the query itself)."""

    clip: EmbeddedClip
    sound: Sound | None
    similarity: float
    same_label: bool
    same_domain: bool


@dataclass(frozen=True)
class NeighbourRow:
    """A query and its neighbours, nearest first."""

    query: Neighbour
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class NeighbourFigure:
    """The rows shown, and over all N clips how often the NEIGHBOURS nearest share the domain, against chance."""

    rows: list[NeighbourRow]
    clips: int
    same_domain: float
    same_domain_chance: float
    same_label: float
    same_label_chance: float


def neighbour_figure(clips: list[EmbeddedClip]) -> NeighbourFigure | None:
    """Neighbours of up to QUERIES playable clips; None where there are fewer than two clips or none can be played."""
    queries = choose_queries(clips)
    if len(clips) < 2 or not queries:
        return None
    vectors = directions(clips)
    count = min(NEIGHBOURS, len(clips) - 1)
    nearest = np.stack([_nearest(vectors, index, count) for index in range(len(clips))])
    domains = _numbers([clip.domain for clip in clips])
    labels = _numbers([(clip.domain, clip.task, clip.label) for clip in clips])
    sounds: dict[int, Sound | None] = {}

    def entry(index: int, query: int) -> Neighbour:
        clip = clips[index]
        if index not in sounds:
            sounds[index] = _sound(clip)
        similarity = 1.0 if index == query else float(vectors[index] @ vectors[query])
        same = bool(labels[index] == labels[query]), bool(domains[index] == domains[query])
        return Neighbour(clip, sounds[index], similarity, *same)

    rows = [NeighbourRow(entry(q, q), [entry(int(i), q) for i in nearest[q]]) for q in queries]
    return NeighbourFigure(rows, len(clips), *_agreement(domains, nearest), *_agreement(labels, nearest))


def choose_queries(clips: list[EmbeddedClip], count: int = QUERIES) -> list[int]:
    """Indices of up to `count` playable clips, domains in turn and within each as many tasks as possible."""
    playable = [i for i, clip in enumerate(clips) if clip.waveform is not None and clip.waveform.size]
    seen: dict[tuple[str, str], int] = {}
    turns: dict[str, int] = {}
    ranked = []
    for index in playable:
        task = (clips[index].domain, clips[index].task)
        seen[task] = seen.get(task, 0) + 1
        ranked.append((seen[task], index))
    keyed = []
    for _, index in sorted(ranked):
        domain = clips[index].domain
        turns[domain] = turns.get(domain, 0) + 1
        keyed.append((turns[domain], index))
    order = {domain: place for place, domain in enumerate(unique(clip.domain for clip in clips))}
    chosen = [index for _, index in sorted(keyed)[:count]]
    return sorted(chosen, key=lambda index: (order[clips[index].domain], index))


def _nearest(vectors: NDArray[np.float64], index: int, count: int) -> NDArray[np.intp]:
    similarity = vectors @ vectors[index]
    similarity[index] = -np.inf
    return np.argsort(-similarity, kind="stable")[:count]


def _numbers(names: list[str] | list[tuple[str, str, str]]) -> NDArray[np.int64]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _agreement(groups: NDArray[np.int64], nearest: NDArray[np.intp]) -> tuple[float, float]:
    """Share of neighbours in the same group as their clip, and the share among random other clips."""
    sizes = np.bincount(groups)
    chance = float(np.mean((sizes[groups] - 1) / (len(groups) - 1)))
    return float(np.mean(groups[nearest] == groups[:, None])), chance


def _sound(clip: EmbeddedClip) -> Sound | None:
    if clip.waveform is None or not clip.waveform.size:
        return None
    samples, rate = _at_most_16_khz(np.asarray(clip.waveform, dtype=np.int16).reshape(-1), clip.sampling_rate)
    start = loudest_start(samples, rate)
    cut = samples[start : start + int(SECONDS * rate)]
    return Sound(wav_uri(cut, rate), start / rate, len(cut) / rate, _outline(cut))


def loudest_start(samples: NDArray[np.int16], rate: int) -> int:
    """First sample of the loudest SECONDS of `samples` [S], on a grid of a quarter of a second."""
    length = int(SECONDS * rate)
    if len(samples) <= length:
        return 0
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    starts = np.arange(0, len(samples) - length + 1, max(rate // 4, 1))
    return int(starts[np.argmax(energy[starts + length] - energy[starts])])


def wav_uri(samples: NDArray[np.int16], rate: int) -> str:
    """A mono 16-bit wav of `samples` [S] at `rate` Hz as a data URI."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _at_most_16_khz(samples: NDArray[np.int16], rate: int) -> tuple[NDArray[np.int16], int]:
    if rate <= HIGHEST_RATE:
        return samples, rate
    import soxr

    return np.asarray(soxr.resample(samples, rate, HIGHEST_RATE), dtype=np.int16), HIGHEST_RATE


def _outline(samples: NDArray[np.int16]) -> str:
    """SVG path of the loudness outline in a box of OUTLINE_POINTS × 100, peaks scaled to fill it."""
    groups = np.array_split(np.abs(samples.astype(np.float64)), min(OUTLINE_POINTS, len(samples)))
    peaks = np.array([group.max() for group in groups])
    heights = np.maximum(46 * peaks / max(float(peaks.max()), 1.0), 1.0)
    width = OUTLINE_POINTS / len(heights)
    return "".join(f"M{(i + 0.5) * width:.1f} {50 - h:.0f}v{2 * h:.0f}" for i, h in enumerate(heights))
