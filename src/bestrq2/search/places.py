"""The stretch of a recording that is most like a query, found among the means of its frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Place(NamedTuple):
    """A stretch of a recording.

    Attributes:
        start: its beginning (s).
        stop: its end (s).
        similarity: cosine of the mean of its frames to that of the query.
    """

    start: float
    stop: float
    similarity: float


def window_similarities(
    frames: NDArray[np.float32], starts: NDArray[np.int64], width: int, query: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Similarity of the window that begins at each frame, [T], -inf where it would leave its recording.

    Args:
        frames: [T, D], relative to the mean of the corpus, recordings one after another.
        starts: first frame of every recording, followed by T.
        width: frames of a window; the window of a shorter recording is all of it.
        query: [D], of length 1.
    """
    lengths = np.diff(starts)
    stops = np.arange(len(frames)) + np.repeat(np.minimum(lengths, width), lengths)
    inside = stops <= np.repeat(starts[1:], lengths)
    # float64, because the sum over a window is the difference of two sums over many frames.
    sums = np.concatenate([np.zeros((1, frames.shape[1])), np.cumsum(frames, axis=0, dtype=np.float64)])
    windows = sums[stops[inside]] - sums[:-1][inside]
    norms = np.sqrt(np.einsum("td,td->t", windows, windows))
    similarities = np.full(len(frames), -np.inf)
    similarities[inside] = windows @ query.astype(np.float64) / np.maximum(norms, 1e-12)
    return similarities


def best_place(similarities: NDArray[np.float64], times: NDArray[np.float64], hop: float, width: int) -> Place:
    """The most similar window of one recording.

    Args:
        similarities: `window_similarities` of its frames, [T].
        times: centre of each frame (s), [T] or longer.
        hop: duration of a frame (s).
        width: frames of a window.
    """
    first = int(similarities.argmax())
    last = first + min(width, len(similarities)) - 1
    return Place(max(0.0, float(times[first] - hop / 2)), float(times[last] + hop / 2), float(similarities[first]))
