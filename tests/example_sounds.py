"""Sounds with structure in time and frequency, so that no two patches are alike and no band is empty."""

from __future__ import annotations

import numpy as np
import torch

RATE = 16_000


def chirp(samples: int, low: float = 120.0, high: float = 7000.0) -> np.ndarray:
    """Exponential sweep that takes 4 s from `low` to `high` and begins again, float64 [samples]."""
    seconds = np.arange(samples) / RATE % 4.0
    growth = np.log(high / low) / 4.0
    return 0.3 * np.sin(2 * np.pi * low * np.expm1(growth * seconds) / growth)


def tones(samples: int, *hertz: float) -> np.ndarray:
    """Steady tones that swell twice a second, float64 [samples]."""
    seconds = np.arange(samples) / RATE
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * 2.0 * seconds)
    return swell * sum(0.15 * np.sin(2 * np.pi * one * seconds) for one in hertz)


def bursts(samples: int, seed: int = 0) -> np.ndarray:
    """Noise bursts of 50 ms at random moments over a faint hiss, float64 [samples]."""
    rng = np.random.default_rng(seed)
    level = np.full(samples, 1e-3)
    for start in rng.integers(0, max(1, samples), size=1 + samples // 4000):
        level[start : start + RATE // 20] = rng.uniform(0.05, 0.3)
    return level * rng.standard_normal(samples)


def scene(samples: int, seed: int = 0) -> np.ndarray:
    """Sweep, tones and bursts together, different for every seed, float32 [samples] within [-1, 1]."""
    rng = np.random.default_rng([seed, 1])
    pitches = rng.uniform(150, 3000, size=3)
    mix = chirp(samples, low=rng.uniform(80, 300)) + tones(samples, *pitches) + bursts(samples, seed)
    return np.clip(rng.uniform(0.3, 0.8) * mix, -1, 1).astype(np.float32)


def scenes(count: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Several scenes of equal length, float32 [count, samples]."""
    return torch.from_numpy(np.stack([scene(samples, seed + index) for index in range(count)]))


def padded_batch(
    lengths: list[int], behind: float = 0.0, total: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of unequal length with `behind` after their ends: float32 [B, S] and int64 mask [B, S]."""
    total = max(lengths) if total is None else total
    waveforms = torch.full((len(lengths), total), behind)
    mask = torch.zeros(len(lengths), total, dtype=torch.int64)
    for index, length in enumerate(lengths):
        waveforms[index, :length] = torch.from_numpy(scene(length, index))
        mask[index, :length] = 1
    return waveforms, mask
