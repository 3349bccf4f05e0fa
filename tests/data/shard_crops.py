"""Crops and batches of a source, for tests."""

from __future__ import annotations

import numpy as np

from bestrq2.data.loader import training_batches

RATE = 16_000


def crop(source, index=0, seed=0, seconds=1.0, rate=RATE):
    return source.read(index, rate, np.random.default_rng(seed), seconds)


def described(source, root):
    return [source.describe(i).removeprefix(f"{root}/") for i in range(len(source))]


def batches(source, workers=0, steps=4, **settings):
    settings = {"sampling_rate": RATE, "max_seconds": 1.0, "seed": 5, "batch_size": 4, **settings}
    return list(training_batches(source, num_workers=workers, max_steps=steps, **settings))
