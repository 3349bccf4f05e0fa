"""Crops and batches of a source, for tests."""

from __future__ import annotations

import numpy as np

from bestrq2.data.loader import CropDataset, make_loader
from bestrq2.data.order import BatchSchedule

RATE = 16_000


def crop(source, index=0, seed=0, seconds=1.0, rate=RATE):
    return source.read(index, rate, np.random.default_rng(seed), seconds)


def described(source, root):
    return [source.describe(i).removeprefix(f"{root}/") for i in range(len(source))]


def batches(source, workers=0, steps=4):
    data = CropDataset(source, RATE, 1.0, seed=5)
    return list(make_loader(data, BatchSchedule(data.order, 4, max_steps=steps), workers))
