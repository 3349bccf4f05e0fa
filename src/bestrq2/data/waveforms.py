"""Samples of any common type as mono float32."""

from __future__ import annotations

import numpy as np

from bestrq2.data.places import UnreadableAudioError
from bestrq2.model import waveforms

LOWEST_RATE, HIGHEST_RATE = 100, 10_000_000
"""Lowest and highest sampling rate in Hz; a header that states another one is wrong."""


def check_rate(rate: float) -> None:
    """Check a sampling rate in Hz.

    Raises:
        UnreadableAudioError: below `LOWEST_RATE` or above `HIGHEST_RATE`.
    """
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UnreadableAudioError(
            f"A sampling rate of {rate} Hz is impossible, expected {LOWEST_RATE} to {HIGHEST_RATE} Hz."
        )


def to_float32(samples: np.ndarray) -> np.ndarray:
    """Samples of any common type as float32: integers scaled to [-1, 1), uint8 centred on 128 as in WAV files.

    Raises:
        UnreadableAudioError: a dtype without a defined full scale.
    """
    try:
        return waveforms.to_float32(samples)
    except ValueError as error:
        raise UnreadableAudioError(str(error)) from error


def put_samples(samples: np.ndarray, row: np.ndarray) -> None:
    """Write [samples] into a row [samples], int16 as it is or float32 as by `to_float32`; int16 is not copied first."""
    if samples.dtype == row.dtype == np.int16:
        row[:] = samples
    elif samples.dtype == np.int16:
        # Two plain loops are faster than one multiplication that converts as it goes.
        row[:] = samples
        row *= np.float32(1 / waveforms.FULL_SCALE["int16"])
    else:
        row[:] = to_float32(samples)


def mixed_down(samples: np.ndarray) -> np.ndarray:
    """Mean over channels of [samples] or [channels, samples], as float32 [samples]; integers as in `to_float32`."""
    samples = to_float32(samples)
    if samples.ndim == 2:
        return samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
    return samples
