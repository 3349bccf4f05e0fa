"""Crops and batches of a source, for tests."""

from __future__ import annotations

import numpy as np

from bestrq2.data.loader import training_batches, training_rows
from bestrq2.model.configuration_bestrq2 import BestRQ2Config

RATE = 16_000


def fields(max_seconds=1.0, **others):
    """A model whose columns have 40 ms."""
    small = {"hop_length": 160, "n_fft": 512, "win_length": 512, "patch_size": (32, 4)}
    return BestRQ2Config(max_seconds=max_seconds, **{**small, **others})


def crop(source, index=0, seed=0, seconds=1.0, rate=RATE):
    return source.read(index, rate, np.random.default_rng(seed), seconds)


def described(source, root):
    return [source.describe(i).removeprefix(f"{root}/") for i in range(len(source))]


def loader(source, workers=0, steps=4, config=None, seed=5, rows=4, **settings):
    config = config or fields()
    plan = training_rows(source, config, seed)
    return training_batches(
        source, plan, config, seed=seed, batch_rows=rows, num_workers=workers, max_steps=steps, **settings
    )


def batches(source, *arguments, **settings):
    return list(loader(source, *arguments, **settings))


def clips(batch, config):
    """(name, samples as far as the model sees them, length) of each clip of a batch, found by its packing."""
    found, names, lengths = [], iter(batch.recordings), iter(batch.lengths.tolist())
    values = batch.to("cpu").input_values.numpy()
    for row, numbers in enumerate(batch.packing.segments):
        for number in range(1, int(numbers.max()) + 1):
            (own,) = np.nonzero(numbers.numpy() == number)
            length = next(lengths)
            assert len(own) == config.columns(length)
            assert batch.packing.positions[row, own].tolist() == list(range(len(own)))
            frames = batch.packing.frames[row, own].tolist()
            assert frames == [frames[0] + config.patch_size[1] * place for place in range(len(own))]
            begin = frames[0] * config.hop_length + config.n_fft // 2
            seen = min(length, (len(own) * config.patch_size[1] - 1) * config.hop_length + config.n_fft // 2)
            found.append((next(names, ""), values[row, begin : begin + seen], length))
    assert next(names, None) is next(lengths, None) is None
    return found


def rejections(source, config=None):
    """(name, reason) of everything that an epoch cannot use."""
    rows = training_rows(source, config or fields(), 5)
    made = batches(source, steps=len(rows), config=config, rows=1)
    return rows.rejected + [entry for batch in made for entry in batch.rejected]
