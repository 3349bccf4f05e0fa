"""What an embedder returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of B clips, as numpy arrays; rows follow the order of the input.

    Attributes:
        clip: float32 [B, D], the valid frames of each clip pooled; [B, 2 D] with pooling "mean+max".
        frames: float32 [B, T, D], zero where `frame_mask` is False.
        frame_mask: bool [B, T], True for frames that lie inside the clip.
        timestamps: float64 [B, T], seconds, the centre of each frame (NaN outside the clip).
    """

    clip: np.ndarray
    frames: np.ndarray
    frame_mask: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.clip)
