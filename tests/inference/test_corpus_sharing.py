"""Shares of a corpus: together they are what is missing, each recording once, whatever is done and by how many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestrq2.data.remote import StreamSource
from bestrq2.data.sources import ArraySource
from bestrq2.inference.corpus.sharing import BLOCK, Process, own_count, own_stretches
from bestrq2.inference.corpus.tasks import Stretch


@given(st.integers(0, 400), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90)), max_size=8))
def test_shares_cover_what_is_missing_once(count, world_size, lengths):
    source = ArraySource(np.zeros((count, 1)), 16_000)
    done = sorted({(start, min(start + length, count)) for start, length in lengths if start < count})
    missing = set(range(count)) - {number for start, stop in done for number in range(start, stop)}
    found, counted = [], 0
    for rank in range(world_size):
        process = Process(rank, world_size)
        counted += own_count(source, process)
        for lane, start, stop in own_stretches(source, {0: done}, process):
            assert lane == 0
            assert start // BLOCK == (stop - 1) // BLOCK
            assert start // BLOCK % world_size == rank
            found += range(start, stop)
    assert counted == count
    assert sorted(found) == sorted(missing)
    assert len(found) == len(missing)


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ({}, [Stretch(1, 0, None)]),
        ({1: [(0, 64), (64, 70)]}, [Stretch(1, 70, None)]),
        ({1: [(0, 64), (70, 80)]}, [Stretch(1, 64, None)]),  # behind a gap all is done again
        ({1: [(0, 64), (64, 64)]}, []),
        ({1: [(0, 0)]}, []),
        ({1: [(64, 64)]}, [Stretch(1, 0, None)]),  # the end alone is not enough
        ({0: [(0, 10)], 2: [(0, 10)]}, [Stretch(1, 0, None)]),
    ],
)
def test_a_shard_goes_on_behind_what_is_done_without_a_gap(done, expected):
    source = StreamSource("three", ("a", "b", "c"))
    assert own_stretches(source, done, Process(1, 3)) == expected
