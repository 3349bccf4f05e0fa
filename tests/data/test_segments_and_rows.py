"""Segments of recordings and the rows that hold them: each second once an epoch, in rows that are full."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq2.data.order import Parts
from bestrq2.data.rows import Crops, Segment, SegmentRows, Segments, columns_of, row_templates
from bestrq2.model.configuration_bestrq2 import BestRQ2Config

RATE = 16_000


def fields(max_seconds, hop=160, **others):
    return BestRQ2Config(max_seconds=max_seconds, hop_length=hop, n_fft=512, win_length=512, **others)


def of_epoch(segments, epoch):
    return [segments(number, epoch) for number in range(len(segments))]


def test_a_recording_is_cut_into_whole_segments_and_a_rest_that_moves():
    segments = Segments(np.array([25, 0, 4]), longest=10, shortest=3, seed=1)
    assert segments.counts().tolist() == [10, 10, 5, 4]
    assert segments.recordings().tolist() == [0, 0, 0, 2]
    cuts = {tuple(sorted(one[1:] for one in of_epoch(segments, epoch)[:3])) for epoch in range(30)}
    assert cuts == {((0, 5), (5, 10), (15, 10)), ((0, 10), (10, 5), (15, 10)), ((0, 10), (10, 10), (20, 5))}
    assert of_epoch(segments, 7)[3] == Segment(2, 0, 4)


def test_a_rest_that_is_too_short_is_left_out_but_not_always_at_the_end():
    segments = Segments(np.array([22, 2]), longest=10, shortest=3, seed=0)
    assert len(segments) == 2
    assert {tuple(one.start for one in of_epoch(segments, epoch)) for epoch in range(30)} == {(0, 10), (2, 12), (0, 12)}


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=20),
    longest=st.integers(1, 20),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
)
def test_segments_cover_every_sample_once_an_epoch(lengths, longest, seed, epoch):
    segments = Segments(np.array(lengths), longest, 1, seed)
    heard = [np.zeros(length, int) for length in lengths]
    cut = of_epoch(segments, epoch)
    for recording, start, samples in cut:
        heard[recording][start : start + samples] += 1
        assert 0 < samples <= longest
    assert all((one == 1).all() for one in heard)
    assert [one.samples for one in cut] == segments.counts().tolist()
    assert of_epoch(Segments(np.array(lengths), longest, 1, seed), epoch) == cut


def test_row_templates_of_hand_computed_cases():
    def templates(capacity, **numbers):
        counts = np.zeros(capacity + 1, int)
        for width, number in numbers.items():
            counts[int(width[1:])] = number
        return sorted(row_templates(counts, capacity))

    assert templates(10, _10=3) == [((10,), 3)]
    # The 3 goes to a 7, not to the 6, and what is left of the 6 takes a 2.
    assert templates(10, _7=1, _6=1, _3=1, _2=1) == [((6, 2), 1), ((7, 3), 1)]
    assert templates(10, _4=5, _1=3) == [((4,), 1), ((4, 4, 1), 1), ((4, 4, 1, 1), 1)]
    assert templates(10, _3=1_000_000) == [((3,), 1), ((3, 3, 3), 333_333)]
    assert templates(10) == []


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=2, max_size=12))
def test_row_templates_place_every_clip_as_best_fit_decreasing_does_one_by_one(counts):
    capacity = len(counts) - 1
    rooms = []
    for width in range(capacity, 0, -1):
        for _ in range(counts[width]):
            fitting = [room for room in rooms if room >= width]
            best = min(fitting, default=capacity)
            if fitting:
                rooms.remove(best)
            rooms.append(best - width)
    found = row_templates(counts, capacity)
    placed = np.zeros(len(counts), int)
    for template, number in found:
        np.add.at(placed, list(template), number)
    assert placed[1:].tolist() == counts[1:]
    assert sorted(rooms) == sorted(capacity - sum(template) for template, number in found for _ in range(number))


def uneven(recordings):
    """Lengths in samples: median 1.5 s, and one recording in 170 longer than 20 s; these hold 30 % of the hours."""
    rng = np.random.default_rng(0)
    seconds = np.exp(rng.normal(np.log(1.5), 0.55, recordings))
    long = np.arange(recordings) % 170 == 0
    mean = 3 / 7 * seconds[~long].sum() / long.sum()
    seconds[long] = 20 + rng.exponential(mean - 20, long.sum())
    assert abs(np.median(seconds) - 1.5) < 0.05
    assert 0.25 < seconds[seconds > 20].sum() / seconds.sum() < 0.35
    return np.round(seconds * RATE).astype(np.int64)


@pytest.mark.parametrize("max_seconds", [4.0, 10.0])
def test_rows_of_an_uneven_corpus_are_full_and_the_same_in_every_epoch(max_seconds):
    config = fields(max_seconds)
    lengths = uneven(17_000)
    segments = Segments(lengths, config.max_samples, config.min_training_samples, 5)
    rows = SegmentRows(segments, config, 5)
    widths = [rows.widths(row) for row in range(len(rows))]
    assert max(map(sum, widths)) <= rows.capacity == config.columns(config.max_samples)
    assert rows.fill == sum(map(sum, widths)) / (len(rows) * rows.capacity) > 0.99
    assert rows.seconds == pytest.approx(lengths.sum() / RATE, rel=0.01)
    seen = []
    for epoch in (0, 3):
        found = [rows.segments(epoch, row) for row in range(len(rows))]
        assert [[config.columns(one.samples) for one in row] for row in found] == widths
        assert sorted(one for row in found for one in row) == sorted(of_epoch(segments, epoch))
        seen.append(found)
    assert seen[0] != seen[1]
    again = SegmentRows(Segments(lengths, config.max_samples, config.min_training_samples, 5), config, 5)
    assert again.segments(3, 77) == seen[1][77]


def test_rows_of_a_million_recordings_are_made_in_seconds():
    config, lengths = fields(10.0), uneven(1_000_000)
    begun = time.process_time()
    rows = SegmentRows(Segments(lengths, config.max_samples, config.min_training_samples, 5), config, 5)
    assert len(rows.segments(1, 5))
    assert time.process_time() - begun < 10
    assert len(rows) < 250_000


def test_clips_of_large_shards_share_rows_with_their_shard_only():
    config = fields(1.0)
    parts = Parts(np.array([0, 30, 30, 50]), np.array([3, 1, 3]) * 10**9)
    segments = Segments(np.full(50, RATE // 4), config.max_samples, 1, 0)
    rows = SegmentRows(segments, config, 0, parts)
    shards = [{one.recording >= 30 for one in rows.segments(2, row)} for row in range(len(rows))]
    assert all(len(one) == 1 for one in shards)
    number = rows._parts.starts
    assert [one.pop() for one in shards] == [False] * number[1] + [True] * (number[3] - number[1])
    # Shards of one window are shuffled as a whole.
    small = SegmentRows(segments, config, 0, Parts(parts.starts, parts.sizes // 10))
    assert any(len({one.recording >= 30 for one in small.segments(2, row)}) == 2 for row in range(len(small)))


def test_rows_of_a_conformer_hold_one_clip_each():
    config = BestRQ2Config(
        max_seconds=1.0, hop_length=160, patch_size=(128, 4), encoder_type="conformer", objective="one_stage",
        position_embedding="relative", mask_fill="noise",
        input_normalization="clip",
    )  # fmt: skip
    segments = Segments(np.array([RATE // 4, 5 * RATE // 2]), config.max_samples, 1, 0)
    rows = SegmentRows(segments, config, 0)
    found = [rows.segments(4, row) for row in range(len(rows))]
    assert [len(one) for one in found] == [1] * 4
    assert rows.by_length
    assert sorted(one for (one,) in found) == sorted(of_epoch(segments, 4))
    assert [rows.widths(row) for row in range(4)] == [[config.columns(one.samples)] for (one,) in found]


def test_recordings_of_unknown_length_have_a_row_each():
    rows = SegmentRows(Crops(3, RATE), fields(1.0), 0)
    order = rows.order()
    assert sorted(order(number)[1] for number in range(3)) == [0, 1, 2]
    assert sorted(rows.segments(0, row)[0] for row in range(3)) == [Segment(index, None, RATE) for index in range(3)]
    assert rows.seconds is rows.fill is None
    assert rows.widths(2) == [6]


def test_columns_are_those_of_the_model():
    config = fields(10.0)
    samples = np.arange(1, 60_000, 37)
    assert columns_of(samples, config).tolist() == [config.columns(int(one)) for one in samples]
