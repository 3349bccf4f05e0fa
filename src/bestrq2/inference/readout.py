"""Readout of an encoder: which hidden layers are averaged, and how frames are pooled to one vector per clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from bestrq2.errors import ConfigError

Layers: TypeAlias = "int | Sequence[int] | str | None"
POOLINGS = ("mean", "mean+max", "attention")


def layer_indices(layers: Layers, blocks: int) -> list[int] | None:
    """Indices into the model's `hidden_states`; None for its final output.

    Args:
        layers: 0 for the input of the first block, n for the output of block n, negative numbers count from the last
            block; several are averaged; "mean" averages all blocks; None is the output after the final norm.
        blocks: number of blocks of the encoder.

    Raises:
        ConfigError: the encoder has no such layer.
    """
    if layers is None:
        return None
    if isinstance(layers, str) and layers == "mean":
        return list(range(1, blocks + 1))
    wanted = [layers] if isinstance(layers, int) else layers
    whole = isinstance(wanted, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in wanted)
    if not whole or isinstance(wanted, str) or not wanted or not all(-blocks - 1 <= int(n) <= blocks for n in wanted):
        raise ConfigError(
            f"layers must be None, 'mean', or whole numbers from {-blocks - 1} to {blocks} "
            f"(0 is the input of the first of {blocks} blocks), got {layers!r}"
        )
    return [int(n) % (blocks + 1) for n in wanted]


def mean_frames(hidden_states: Sequence[Tensor], layers: Sequence[int], rows: int) -> Tensor:
    """Average layers and frequency rows.

    Args:
        hidden_states: [B, N, D] per layer, N = rows * columns patches, padding included.
        layers: which of them.
        rows: patches per column.

    Returns:
        float32 [B, T', D]; frames of padding are not blanked.
    """
    total = hidden_states[layers[0]].float()
    for layer in layers[1:]:
        total = total + hidden_states[layer].float()
    return total.unflatten(1, (rows, -1)).mean(dim=1) / len(layers)


def check_pooling(pooling: str) -> None:
    """Check the name of a pooling.

    Raises:
        ConfigError: unknown; the known names are listed.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def pooled_width(width: int, pooling: str) -> int:
    """Width of a clip vector for frames of this width: twice as wide for "mean+max"."""
    return 2 * width if pooling == "mean+max" else width


def pool(frames: np.ndarray, pooling: str) -> np.ndarray:
    """Pool the frames of one clip.

    "mean" averages them. "mean+max" appends the maximum of each dimension to the mean. "attention" averages with the
    weights softmax(sqrt(D) cos(frame, mean frame)), which is scaled dot-product attention of the mean frame to all
    frames after normalisation to root mean square 1; frames unlike the rest of the clip count less.

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
        norms = _norms(frames) * np.linalg.norm(centre)
        scores = np.sqrt(frames.shape[1]) * (frames @ centre) / np.maximum(norms, 1e-12)
        weights = np.exp(scores - scores.max())  # the maximum cancels and prevents overflow
        return (weights / weights.sum()).astype(np.float32) @ frames
    return mean.astype(np.float32)


def unit_length(vectors: np.ndarray) -> None:
    """Scale [..., D] in place to Euclidean length 1; zero vectors stay zero."""
    vectors /= np.maximum(_norms(vectors), 1e-12)[..., None]


def _norms(vectors: np.ndarray) -> np.ndarray:
    # einsum, because an array of squares would double the memory of hours of frames.
    return np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
