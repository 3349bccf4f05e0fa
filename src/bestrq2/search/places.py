"""The stretch of a recording that is most like a query, found by the similarities of its frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Place(NamedTuple):
    """A stretch of a recording.

    Attributes:
        start: its beginning (s).
        stop: its end (s).
        similarity: mean cosine of its frames to the query.
    """

    start: float
    stop: float
    similarity: float


def window_means(similarities: NDArray[np.float32], starts: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Mean similarity of the window that begins at each frame, -inf where it would leave its recording.

    Args:
        similarities: similarity of every frame to a query, [T], recordings one after another.
        starts: first frame of every recording, followed by T.
        width: frames of a window; the window of a shorter recording is all of it.
    """
    lengths = np.diff(starts)
    widths = np.repeat(np.minimum(lengths, width), lengths)
    stops = np.arange(len(similarities)) + widths
    inside = stops <= np.repeat(starts[1:], lengths)
    sums = np.concatenate([[0.0], np.cumsum(similarities, dtype=np.float64)])
    means = (sums[np.where(inside, stops, 0)] - sums[:-1]) / widths
    return np.where(inside, means, -np.inf)


def best_place(means: NDArray[np.float64], times: NDArray[np.float64], hop: float, width: int) -> Place:
    """The window of one recording with the largest mean.

    Args:
        means: `window_means` of its frames, [T].
        times: centre of each frame (s), [T] or longer.
        hop: time between frames (s).
        width: frames of a window.
    """
    first = int(means.argmax())
    last = first + min(width, len(means)) - 1
    return Place(max(0.0, float(times[first] - hop / 2)), float(times[last] + hop / 2), float(means[first]))
