"""Waveforms in memory: arrays, tensors and lists of samples of any common type as float32."""

from __future__ import annotations

import array
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FULL_SCALE = {"int8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}

LARGEST_SAMPLE = 16.0
"""24 dB over full scale: above any float recording, below nearly all that hold integers as floats."""


def is_array(audio: Any) -> bool:
    """Whether an object is one array of numbers: of numpy, torch, pandas, JAX and others, or a typed buffer."""
    if isinstance(audio, memoryview):
        return audio.format not in ("B", "b", "c")  # these are bytes of a file
    return isinstance(audio, array.array) or (hasattr(audio, "__array__") and not isinstance(audio, np.generic))


def as_array(audio: Any) -> np.ndarray:
    """A waveform as a numpy array of its own type, without a copy where it is in this machine's memory.

    Args:
        audio: array as in `is_array`, on any device, or a list of numbers.

    Raises:
        ValueError: it does not hold floats or integers.
    """
    if not is_array(audio) and (isinstance(audio, str | bytes | Mapping) or not isinstance(audio, Iterable)):
        kind = type(audio).__name__
        raise ValueError(f"a {kind} is not audio; give a waveform, an array or a list of numbers")
    try:
        if hasattr(audio, "detach"):
            tensor = audio.detach().cpu()
            # numpy has no bfloat16.
            samples = (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
        else:
            samples = np.asarray(audio if is_array(audio) else list(audio))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"is not a waveform ({' '.join(str(error).split()).rstrip('.')}).") from error
    if samples.dtype.kind not in "fiu":
        raise ValueError(f"holds values of type {samples.dtype}, expected floats in [-1, 1] or integer samples.")
    return samples


def to_float32(samples: np.ndarray) -> np.ndarray:
    """Samples of any common type as float32: integers scaled to [-1, 1), uint8 centred on 128 as in WAV files.

    Raises:
        ValueError: a dtype without a defined full scale.
    """
    name = samples.dtype.name
    if name == "uint8":
        return (samples.astype(np.float32) - 128.0) / 128.0
    if name in FULL_SCALE:
        return (samples * (1.0 / FULL_SCALE[name])).astype(np.float32)
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):  # infinity is reported by `range_problem`
            return samples.astype(np.float32, copy=False)
    raise ValueError(
        f"samples of type {name} have no defined full scale; give floats in [-1, 1], or int8, int16, int32 or uint8."
    )


def range_problem(samples: np.ndarray) -> str | None:
    """Reason why float samples are not audio, NaN or far outside [-1, 1]; None if they are, and for integers."""
    if samples.dtype.kind != "f" or not samples.size:
        return None
    largest = max(-float(samples.min()), float(samples.max()))
    if largest <= LARGEST_SAMPLE:
        return None
    if not math.isfinite(largest):
        return "holds NaN or infinite samples."
    return f"holds samples of {largest:.4g}, far outside [-1, 1]; divide them by their full scale, 32768 for 16 bits."
