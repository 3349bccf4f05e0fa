"""Streams of shards from a server in this process, for tests."""

from __future__ import annotations

import torch
from shard_server import RATE, clip

from bestrq2.data.loader import training_batches
from bestrq2.data.remote import StreamSource
from bestrq2.data.transfer import Patience

HASTE = Patience(waits=(0.0, 0.0), timeout=10.0)


# Bytes of a clip in a tar: header and content, in blocks of 512.
MEMBER = 512 + -(-len(clip(0)) // 512) * 512


def stream(server, count=9, **changes):
    return StreamSource("test", tuple(f"{server.url}/{i}.tar" for i in range(count)), patience=HASTE, **changes)


def batches(source, steps=range(9), workers=0, batch_size=4, rank=0, world=1):
    loader = training_batches(
        source,
        sampling_rate=RATE,
        max_seconds=0.2,
        seed=3,
        batch_size=batch_size,
        start_step=steps.start,
        num_workers=workers,
        max_steps=steps.stop,
        rank=rank,
        world_size=world,
    )
    return list(loader)


def names(batch):
    return [name.rpartition("/")[2] for name in batch.recordings]


def assert_same(first, second):
    assert [batch.step for batch in first] == [batch.step for batch in second]
    for a, b in zip(first, second, strict=True):
        assert a.recordings == b.recordings
        assert torch.equal(a.input_values, b.input_values)
        assert torch.equal(a.places, b.places)
