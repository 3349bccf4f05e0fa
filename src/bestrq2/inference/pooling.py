"""One vector for a clip from its frames."""

from __future__ import annotations

import numpy as np

from bestrq2.errors import ConfigError

POOLINGS = ("mean", "mean+max", "attention")


def check_pooling(pooling: str) -> None:
    """Pass if there is such a pooling.

    Raises:
        ConfigError: with the names there are.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def pooled_width(width: int, pooling: str) -> int:
    """Width of a clip's vector whose frames have that width: twice as much for "mean+max"."""
    return 2 * width if pooling == "mean+max" else width


def pool(frames: np.ndarray, pooling: str) -> np.ndarray:
    """Pool the frames of one clip.

    "mean": their mean. "mean+max": their mean, and behind it the largest value of each dimension. "attention": their
    mean weighted by softmax(sqrt(D) cos(frame, mean frame)), which is scaled dot-product attention of the mean frame to
    all of them, each brought to root mean square 1; frames unlike the rest of the clip count less.

    Args:
        frames: float32 [T, D], T at least 1.
        pooling: one of `POOLINGS`.

    Returns:
        float32 [D], for "mean+max" [2 D].
    """
    mean = frames.mean(axis=0, dtype=np.float64)
    if pooling == "mean+max":
        return np.concatenate([mean, frames.max(axis=0)]).astype(np.float32)
    if pooling == "attention":
        centre = mean.astype(np.float32)
        sizes = _lengths(frames) * np.linalg.norm(centre)
        scores = np.sqrt(frames.shape[1]) * (frames @ centre) / np.maximum(sizes, 1e-12)
        weights = np.exp(scores - scores.max())
        return (weights / weights.sum()).astype(np.float32) @ frames
    return mean.astype(np.float32)


def unit_length(vectors: np.ndarray) -> None:
    """Scale [..., D] in place to Euclidean length 1; zeros stay zeros."""
    vectors /= np.maximum(_lengths(vectors), 1e-12)[..., None]


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length of [..., D], without an array of squares: the frames of hours are large enough once."""
    return np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
