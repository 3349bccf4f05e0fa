"""Batches come from workers in memory that is used again, and nobody can tell."""

from __future__ import annotations

import gc
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from recordings import noise
from shard_crops import fields
from shard_crops import loader as any_loader

from bestrq2.data import batch_memory
from bestrq2.data import loader as loading
from bestrq2.data.batch_memory import BatchMemory
from bestrq2.data.sources import ArraySource

RATE, CLIPS = 16_000, 4

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked workers only")


def draw_mask(segments, step, places):
    return (torch.arange(7) + step + places[:, None]) % 3 == 0


def loader(workers: int, dtype: type = np.float32, seconds: float = 0.5, steps: int | None = None):
    waveforms = [noise(0.3 + 0.1 * number, RATE, number) for number in range(9)]
    if dtype is np.int16:
        waveforms = [np.int16(np.clip(waveform, -1, 1) * 32767) for waveform in waveforms]
    return any_loader(ArraySource(waveforms, RATE), workers, steps, fields(seconds), rows=CLIPS, draw_mask=draw_mask)


def memory_of(made) -> BatchMemory:
    return made.worker_init_fn.keywords["memory"]


def taken(memory: BatchMemory) -> int:
    return sum(memory._taken[:])


def lies_in(memory: BatchMemory, tensor: torch.Tensor) -> bool:
    return 0 <= tensor.data_ptr() - memory._begin < len(memory._pages)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_are_never_written_over(workers: int):
    steps = 20  # more than there are blocks
    made = loader(workers, steps=steps)
    kept = list(made)
    inside = [lies_in(memory_of(made), batch.input_values) for batch in kept]
    assert any(inside)
    assert not all(inside)
    for batch, plain in zip(kept, loader(0, steps=steps), strict=True):
        for name in ("input_values", "lengths", "places", "hidden_mask"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)), name
        assert (batch.step, batch.recordings) == (plain.step, plain.recordings)


def test_blocks_are_used_again_once_a_batch_is_forgotten():
    made = loader(1, steps=60)
    places = {batch.input_values.data_ptr() for batch in made if lies_in(memory_of(made), batch.input_values)}
    assert 1 <= len(places) <= memory_of(made).blocks
    gc.collect()
    assert taken(memory_of(made)) == 0


def test_a_block_stays_taken_while_a_part_of_the_batch_is_in_use():
    made = loader(1, steps=40)
    coming = iter(made)
    first = next(coming).input_values
    row, before = first[1, 100:200], first[1, 100:200].clone()
    array = first.numpy()[2]
    assert lies_in(memory_of(made), row)
    del first
    while next(coming, None) is not None:
        pass
    assert torch.equal(row, before)
    assert taken(memory_of(made)) == 1
    del row
    assert taken(memory_of(made)) == 1
    del array
    assert taken(memory_of(made)) == 0


def test_batches_larger_than_planned_go_the_usual_way(monkeypatch: pytest.MonkeyPatch):
    expected = list(loader(0, steps=6))
    monkeypatch.setattr(loading, "memory_for", lambda workers, ahead, size: BatchMemory(workers, ahead, 64))
    made = loader(1, steps=6)
    for batch, plain in zip(made, expected, strict=True):
        assert not lies_in(memory_of(made), batch.input_values)
        assert torch.equal(batch.input_values, plain.input_values)


def test_a_system_without_room_does_without(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(batch_memory, "BatchMemory", full)
    made = loader(1, steps=4)
    assert memory_of(made) is None
    for batch, plain in zip(made, loader(0, steps=4), strict=True):
        assert torch.equal(batch.input_values, plain.input_values)


def test_the_training_process_pickles_batches_as_ever():
    batch = next(iter(loader(1, steps=1)))
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.input_values, batch.input_values)
    assert torch.equal(again.hidden_mask, batch.hidden_mask)


def test_a_block_that_is_not_sent_is_free_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_memory, "_in_use", None)
    memory = BatchMemory(2, 2, 4 * 300)
    memory.use_here(1)
    rows = batch_memory.new_rows((3, 100), np.dtype(np.float32))
    other = batch_memory.new_rows((3, 100), np.dtype(np.int16))
    assert list(memory._taken[:]) == [0, 0, 1, 1]  # those of the second worker
    assert not np.shares_memory(rows, other)
    assert memory.fresh((3, 100), np.dtype(np.float32)) is None
    del rows
    assert list(memory._taken[:]) == [0, 0, 0, 1]
    sent = batch_memory.packed(torch.from_numpy(other))
    other[:] = 7
    del other
    assert list(memory._taken[:]) == [0, 0, 0, 1]
    opened = batch_memory.unpacked(pickle.loads(pickle.dumps(sent)))
    assert opened.shape == (3, 100)
    assert bool((opened == 7).all())
    del opened
    assert taken(memory) == 0


def test_a_process_forked_later_frees_nothing_of_its_parent():
    memory = BatchMemory(1, 1, 4096)
    memory.use_here(0)
    array = memory.fresh((2, 16), np.dtype(np.int16))
    assert array is not None
    child = os.fork()
    if not child:
        del array
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert memory.fresh((2, 16), np.dtype(np.int16)) is None
    del array
    assert memory.fresh((2, 16), np.dtype(np.int16)) is not None
