"""Random generators that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")


def generator(*keys: int | str) -> np.random.Generator:
    """Return the random generator that belongs to a tuple of integers and strings.

    The same keys give the same stream in every process and on every platform; Python's own `hash` would not.

    Args:
        *keys: what the numbers are for, e.g. `generator(seed, "task", name, index)`.
    """
    # numpy integers print differently from Python's, yet must name the same stream
    plain = tuple([key if isinstance(key, str) else int(key) for key in keys])
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=32).digest()
    words = np.frombuffer(digest, "<u4").astype(np.uint32, copy=False)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def pick(rng: np.random.Generator, options: tuple[Option, ...]) -> Option:
    """Draw one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]
