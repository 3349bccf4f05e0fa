"""The map of embeddings: many dimensions laid out in two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.report.colours import unique
from bestrq2.report.contents import EmbeddedClip

WIDTH, HEIGHT, MARGIN = 640, 520, 16
FEWEST_FOR_TSNE = 10
MOST_POINTS = 2000
SEED = 0


@dataclass(frozen=True)
class MapPoint:
    """One clip on the map, x and y in the map's WIDTH × HEIGHT box."""

    x: float
    y: float
    domain: str
    task: str
    label: str


@dataclass(frozen=True)
class MapFigure:
    """The map; `method` names how it was made, `tasks` has every (domain, task) in order."""

    points: list[MapPoint]
    method: str
    tasks: list[tuple[str, str]]
    of: int


def directions(clips: list[EmbeddedClip]) -> NDArray[np.float64]:
    """Unit vectors [N, D] of the clips around their mean; a vector equal to the mean stays zero.

    The mean is subtracted because what all embeddings share says nothing about how they differ.
    """
    vectors = np.stack([np.asarray(clip.vector, dtype=np.float64).reshape(-1) for clip in clips])
    vectors = vectors - vectors.mean(axis=0) if len(clips) > 1 else vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-12)


def map_figure(clips: list[EmbeddedClip]) -> MapFigure | None:
    """Map of the clips (at most MOST_POINTS, evenly taken), or None where there is nothing to lay out."""
    kept = [clips[i] for i in np.linspace(0, len(clips) - 1, min(len(clips), MOST_POINTS)).astype(int)] if clips else []
    if len(kept) < 2:
        return None
    vectors = directions(kept)
    if not np.any(np.ptp(vectors, axis=0) > 1e-9):
        return None
    flat, method = project(vectors)
    xy = _fitted(flat)
    points = [
        MapPoint(round(float(x), 1), round(float(y), 1), clip.domain, clip.task, clip.label)
        for (x, y), clip in zip(xy, kept, strict=True)
    ]
    tasks = unique((clip.domain, clip.task) for clip in kept)
    return MapFigure(points, method, tasks, len(clips))


def project(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """[N, D] → [N, 2] by t-SNE from a PCA start (PCA alone below FEWEST_FOR_TSNE or under two dimensions), and how.

    The perplexity is 30, or less where there are few clips.
    """
    n, d = vectors.shape
    if n < FEWEST_FOR_TSNE or d < 2:
        from sklearn.decomposition import PCA

        flat = PCA(n_components=min(2, d, n), random_state=SEED).fit_transform(vectors)
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "principal components"
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = float(min(30.0, max(2.0, (n - 1) / 4)))
    with threadpool_limits(1):  # many threads win little here and wait for each other on a busy machine
        flat = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=SEED).fit_transform(vectors)
    return np.asarray(flat, dtype=np.float64), f"t-SNE, perplexity {perplexity:.0f}, from a PCA start"


def _fitted(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [N, 2] turned so that the longer side lies across, each axis filling the box inside its margin."""
    if np.ptp(flat[:, 1]) > np.ptp(flat[:, 0]):
        flat = flat[:, ::-1]
    low, span = flat.min(axis=0), np.ptp(flat, axis=0)
    box = np.array([WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN])
    scale = float(np.min(box / np.maximum(span, 1e-12)))
    return MARGIN + (box - span * scale) / 2 + (flat - low) * scale
