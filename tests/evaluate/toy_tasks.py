"""Features and tasks with a known answer, so that probes can be checked without an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.errors import AudioError
from bestrq2.inference.embedder import Embeddings

FRAME_SECONDS = 0.5


@dataclass
class WaveformFeatures:
    """Takes a waveform for its own embedding: [frames * width] samples at 16 kHz become frames [frames, width].

    A waveform that starts with NaN is rejected. `batches` records how many clips each call got.
    """

    width: int
    name: str = "waveform"
    batches: list[int] = field(default_factory=list)

    def embed(self, audio: list[np.ndarray | Path], sampling_rate: int | None = None) -> Embeddings:
        self.batches.append(len(audio))
        clips = [np.asarray(one).reshape(-1, self.width) for one in audio]
        for clip in clips:
            if np.isnan(clip[0, 0]):
                raise AudioError("the waveform holds NaN")
        longest = max(len(clip) for clip in clips)
        frames = np.zeros((len(clips), longest, self.width), dtype=np.float32)
        mask = np.zeros((len(clips), longest), dtype=bool)
        for row, clip in enumerate(clips):
            frames[row, : len(clip)], mask[row, : len(clip)] = clip, True
        timestamps = np.where(mask, (np.arange(longest) + 0.5) * FRAME_SECONDS, np.nan)
        means = np.array([clip.mean(axis=0) for clip in clips], dtype=np.float32)
        return Embeddings(means, frames, mask, timestamps)


def clip_split(generator: np.random.Generator, centres: np.ndarray, n: int, noise: float, even: bool) -> LabelledClips:
    """Clips of one to three frames around the centre of their class; classes are uneven unless `even`."""
    classes, width = centres.shape
    weights = np.ones(classes) if even else np.arange(1, classes + 1)
    labels = generator.choice(classes, n, p=weights / weights.sum())
    audio = []
    for label in labels:
        vector = centres[label] + noise * generator.normal(size=width)
        audio.append(np.tile(vector, generator.integers(1, 4)).astype(np.float32))
    return LabelledClips(audio, labels, 16_000)


def make_clip_task(
    seed: int = 0,
    *,
    classes: int = 4,
    width: int = 12,
    train: int = 160,
    test: int = 120,
    noise: float = 1.0,
    even: bool = True,
) -> LabelledTask:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, width))
    names = tuple(f"class {label}" for label in range(classes))
    splits = [clip_split(generator, centres, n, noise, even) for n in (train, test)]
    return LabelledTask("music/toy", "music", "clip", names, *splits)


def make_frame_task(
    seed: int = 0, *, width: int = 6, train: int = 40, test: int = 30, noise: float = 1.0
) -> LabelledTask:
    """Clips of 4 to 12 frames, in most of which an event lasts a while and moves the frames along one direction."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=width)

    def split(n: int) -> LabelledClips:
        audio, labels = [], []
        for _ in range(n):
            count = generator.integers(4, 13)
            onset, length = generator.integers(0, count), generator.integers(0, 4)
            present = (np.arange(count) >= onset) & (np.arange(count) < onset + length)
            frames = noise * generator.normal(size=(count, width)) + present[:, None] * direction
            audio.append(frames.ravel().astype(np.float32))
            events = [[onset * FRAME_SECONDS, (onset + length) * FRAME_SECONDS]] if length else []
            labels.append(np.array(events, dtype=np.float64).reshape(-1, 2))
        return LabelledClips(audio, labels, 16_000)

    return LabelledTask("environment/present", "environment", "frame", ("absent", "present"), split(train), split(test))
