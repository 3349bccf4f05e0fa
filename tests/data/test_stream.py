"""Streams of remote shards: the same batches whatever reads them."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_server import RATE, clip, serving, tar_of
from streams import HASTE, assert_same, batches, names, stream

from bestrq2.data import lanes, transfer
from bestrq2.data.lanes import CropMaker, Lane, LaneCrops, Lanes
from bestrq2.data.loader import training_batches
from bestrq2.data.remote import StreamSource
from bestrq2.data.transfer import Shard
from bestrq2.errors import DataError

pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_batches(server, undisturbed):
    assert [batch.step for batch in undisturbed] == list(range(9))
    assert all(len(batch) == 4 and batch.input_values.shape == (4, 1600) for batch in undisturbed)
    for workers in (1, 2, 3):
        assert_same(batches(stream(server), workers=workers), undisturbed)


def test_a_worker_reads_only_the_lanes_of_its_steps(server):
    """With as many workers as lanes in turn, nothing is fetched twice."""
    alone = batches(stream(server), range(4))
    before = Counter(server.asked)
    server.asked.clear()
    assert_same(batches(stream(server), range(4), workers=2), alone)
    assert Counter(server.asked) == before


def test_processes_share_the_batch_of_one(server, undisturbed):
    for rank in range(2):
        for full, share in zip(undisturbed, batches(stream(server), rank=rank, world=2), strict=True):
            assert share.places.tolist() == [rank, rank + 2]
            assert share.recordings == full.recordings[rank::2]
            assert torch.equal(share.input_values, full.input_values[rank::2])


@pytest.mark.parametrize("start", [1, 4, 6])
def test_a_resumed_stream_continues_where_it_stopped(server, undisturbed, start):
    assert_same(batches(stream(server), range(start, 9)), undisturbed[start:])


def test_known_counts_spare_the_shards_that_are_over(server):
    whole = batches(stream(server), range(40))
    counts = {url: count for batch in whole for url, count in batch.shard_counts.items()}
    sizes = dict(enumerate((9, 5, 1, 12, 4, 8, 7, 6, 5)))
    assert len(counts) > 5
    assert counts == {f"{server.url}/{i}.tar": sizes[i] for i in sizes if f"{server.url}/{i}.tar" in counts}
    server.asked.clear()
    resumed = batches(stream(server, counts=counts), range(38, 40))
    assert_same(resumed, whole[38:])
    assert len(server.asked) <= 8
    assert not any(batch.shard_counts for batch in resumed)


def test_every_epoch_of_all_lanes_holds_every_recording_once(server):
    source = stream(server)
    per_epoch = Counter()
    for number in range(3):
        lane = Lane(source, seed=1, lane=number, lanes=3)
        item = 0
        while lane.window(item) and lane._epoch < 2:
            window = lane.window(item)
            per_epoch.update((lane._epoch, sample.name) for sample in window.samples)
            item = window.first + len(window.samples)
    assert set(per_epoch.values()) == {1}
    assert Counter(epoch for epoch, _ in per_epoch) == {0: 57, 1: 57}


def test_neighbours_in_a_shard_do_not_come_in_their_order(server):
    found = [sample.name for sample in Lane(stream(server, 1), 0, 0, 1).window(0).samples]
    assert len(found) == 4
    assert found != sorted(found)


@settings(max_examples=80, deadline=None)
@given(shards=st.integers(1, 200), batch_size=st.integers(1, 70), start=st.integers(0, 50))
def test_places_and_steps_are_counted_through_lanes_without_gaps(shards, batch_size, start):
    grid = Lanes.of(shards, batch_size)
    assert 1 <= len(grid) <= min(32, shards)
    taken = {}
    for step in range(start, start + 8):
        for place in range(batch_size):
            lane, number = grid.item(step, place)
            taken.setdefault(lane, []).append(number)
    assert all(0 <= lane < len(grid) for lane in taken)
    for numbers in taken.values():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if batch_size >= grid.by_place:
        assert len(taken) == len(grid)


def test_a_bad_sample_is_replaced_by_the_next_of_its_window_and_listed():
    members = {f"{i}.wav": clip(i) for i in range(4)} | {"2.wav": b"no audio" * 99}
    with serving({"0.tar": tar_of(members)}) as server:
        found = batches(stream(server, 1), range(4), batch_size=1)
    order = window_names(members)
    bad = order.index("2.wav")
    expected = [name if name != "2.wav" else order[(bad + 1) % 4] for name in order]
    assert [names(batch)[0] for batch in found] == expected
    assert [batch.rejected for batch in found if batch.rejected] == [
        [(f"{server.url}/0.tar/2.wav", "is not audio that libsndfile or FFmpeg can read.")]
    ]
    own, replacement = found[(bad + 1) % 4], found[bad]
    assert not torch.equal(own.input_values, replacement.input_values)


def window_names(members):
    """The order in which the only lane of the only shard gives its first window."""
    with serving({"0.tar": tar_of(members)}) as server:
        return [sample.name.rpartition("/")[2] for sample in Lane(stream(server, 1), 3, 0, 1).window(0).samples]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_windows_that_end_by_their_bytes_give_the_same_batches_to_all(server, monkeypatch, undisturbed):
    monkeypatch.setattr(lanes, "WINDOW_BYTES", 3 * len(clip(0)) - 1)
    whole = batches(stream(server))
    assert [batch.recordings for batch in whole] != [batch.recordings for batch in undisturbed]
    assert_same(batches(stream(server), workers=2), whole)
    assert_same(batches(stream(server), range(5, 9)), whole[5:])
    for rank in range(2):
        for full, share in zip(whole, batches(stream(server), rank=rank, world=2), strict=True):
            assert share.recordings == full.recordings[rank::2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 12_000), st.data())
def test_a_window_takes_no_more_memory_than_its_bytes_and_one_clip(sizes, limit, data):
    with serving({"0.tar": tar_of({f"{i}.wav": b"x" * size for i, size in enumerate(sizes)})}) as server:
        windows, number = [], 0
        shard = Shard(f"{server.url}/0.tar", HASTE)
        while (window := shard.window(number, 8, limit))[1]:
            windows.append(window)
            number += len(window[1])
        anywhere = data.draw(st.integers(0, len(sizes) - 1))
        resumed = Shard(f"{server.url}/0.tar", HASTE).window(anywhere, 8, limit)
    assert number == len(sizes)
    for first, samples in windows:
        assert len(samples) <= 8
        assert sum(len(sample.content) for sample in samples[:-1]) < limit
        assert first > anywhere or first + len(samples) <= anywhere or (first, samples) == resumed


def test_a_recording_too_large_for_memory_is_rejected_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MEMBER_LIMIT", 1 << 20)
    large = tarfile.TarInfo("large.wav")
    large.size = 32 << 20
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(large.tobuf())
        file.seek(large.size, io.SEEK_CUR)
        file.write(tar_of({f"{i}.wav": clip(i) for i in range(3)}))
    source = StreamSource("test", (f"file://{tmp_path}/0.tar",), patience=HASTE)
    batches(source, range(1), batch_size=1)
    tracemalloc.start()
    found = batches(source, range(4), batch_size=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert {name for batch in found for name in names(batch)} == {"0.wav", "1.wav", "2.wav"}
    rejected = [entry for batch in found for entry in batch.rejected]
    assert rejected == [
        (f"{source.urls[0]}/large.wav", "holds 33,554,432 bytes, 1,048,576 is the most; cut it into parts")
    ]


def test_windows_that_are_bad_throughout_are_fetched_once():
    members = {f"{i:02d}.wav": b"no audio" * 99 if i < 8 else clip(i) for i in range(12)}
    with serving({"0.tar": tar_of(members)}) as server:
        batches(stream(server, 1), range(12), batch_size=1)
        assert len(server.asked) == 1


def test_what_is_wrong_with_a_shard_read_ahead_is_listed():
    bad = tar_of({f"{i}.wav": b"no audio" * 99 for i in range(4)})
    with serving({"0.tar": bad[: 4 * 1536], "1.tar": tar_of({"4.wav": clip(4)})}) as server:
        source = stream(server, 2)
        seed = next(seed for seed in range(99) if "0.tar" in Lane(source, seed, 0, 1).window(0).samples[0].name)
        crops = LaneCrops(Lane(source, seed, 0, 1), CropMaker(RATE, 0.2, 1))
        _, name, rejected = crops(0)
    assert name == f"{source.urls[1]}/4.wav"
    assert len(rejected) == 4
    assert crops.lane.problems == [(source.urls[0], "ends early, after 4 whole recordings")]


def test_the_next_window_stands_in_for_one_that_is_bad_throughout():
    members = {f"{i:02d}.wav": b"no audio" * 99 if i < 8 else clip(i) for i in range(12)}
    with serving({"0.tar": tar_of(members)}) as server:
        found = batches(stream(server, 1), range(12), batch_size=1)
        resumed = batches(stream(server, 1), range(5, 12), batch_size=1)
    assert_same(found[5:], resumed)
    assert {name for batch in found for name in names(batch)} <= {"08.wav", "09.wav", "10.wav", "11.wav"}
    assert len({name for batch in found[:4] for name in names(batch)}) > 1
    assert len({path for batch in found for path, _ in batch.rejected}) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_recording_end_in_one_sentence(monkeypatch, workers):
    monkeypatch.setattr(lanes, "MAX_TRIES", 10)
    with serving({"0.tar": tar_of({f"{i}.wav": b"no audio" for i in range(6)})}) as server:
        loader = training_batches(
            stream(server, 1),
            sampling_rate=RATE,
            max_seconds=0.2,
            seed=0,
            batch_size=1,
            num_workers=workers,
            max_steps=1,
        )
        with pytest.raises(DataError, match=r"^test: 10 recordings in a row were rejected; first: http.*wav: is not"):
            list(loader)
        if workers:
            loader._iterator._shutdown_workers()
