"""Order and schedule of rows, lists of rejections, validation crops, and workers that end."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import announce, noise, write
from shard_crops import RATE, batches, fields, loader

from bestrq2.data import order
from bestrq2.data.audio import read_audio
from bestrq2.data.loader import AllRejectedError, end_workers, fixed_crops
from bestrq2.data.open_source import open_source
from bestrq2.data.order import BatchSchedule, EpochOrder, Parts, epoch_order
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.sources import ArraySource
from bestrq2.errors import DataError


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of many formats and lengths, and one of every way to be broken."""
    root = tmp_path_factory.mktemp("mixed")
    write(root / "a.wav", noise(3, 16_000, 1), 16_000)
    write(root / "b.flac", np.stack([noise(3, 44_100, 2), noise(3, 44_100, 3)]), 44_100)
    write(root / "c.mp3", noise(4, 16_000, 4), 16_000)
    write(root / "d.ogg", noise(0.2, 8_000, 5), 8_000)
    write(root / "e.m4a", noise(3, 44_100, 6), 44_100)
    write(root / "f.webm", noise(3, 48_000, 7), 48_000)
    (root / "empty.wav").touch()
    (root / "text.mp3").write_text("no audio " * 99)
    write(root / "silent.wav", np.zeros(20_000), 8_000)
    write(root / "nan.float.wav", np.full(20_000, np.nan, np.float32), 8_000)
    return root


def test_recordings_that_end_early_are_in_batches_and_fixed_crops_and_listed_once(tmp_path):
    announce(write(tmp_path / "early.wav", noise(0.5, RATE), RATE), RATE)
    write(tmp_path / "whole.wav", noise(0.5, RATE, 1), RATE)
    source = open_source(tmp_path)
    expected = (str(tmp_path / "early.wav"), 1.0, 0.5)
    log = RejectionLog(tmp_path / "rejected.csv")
    for batch in batches(source, rows=2):
        assert set(batch.shorter) == {expected}
        log.shorter.add(batch.shorter)
    found = []
    fixed_crops(source, 2, fields(), seed=0, shorter=found)
    assert found == [expected]
    again = RejectionLog(tmp_path / "rejected.csv")
    assert again.shorter.add(found) == 0
    assert (tmp_path / "shorter.csv").read_text() == f"path,announced,found\n{expected[0]},1.000,0.500\n"
    assert not (tmp_path / "rejected.csv").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_if_all_are_rejected_one_sentence_says_so(tmp_path, workers):
    for name in ("a.wav", "b.wav", "c.wav"):
        write(tmp_path / name, np.zeros(RATE), RATE)
    made = loader(open_source(tmp_path), workers)
    with pytest.raises(DataError) as error:
        list(made)
    if workers:
        # The stack trace holds on to the iterator; at its own time, ending the worker takes the collector five seconds.
        end_workers(made)
    assert isinstance(error.value, AllRejectedError)
    assert str(error.value).startswith(f"{tmp_path}: all 3 recordings were rejected; first: {tmp_path}/")
    assert str(error.value).endswith(": is silent: no sample exceeds 0.0001 of full scale.")
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    share=st.integers(1, 5),
    world=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 9),
)
def test_every_epoch_visits_every_recording_once(length, share, world, seed, start):
    size, steps = share * world, 12
    whole = list(BatchSchedule(EpochOrder(length, seed), size, max_steps=steps))
    keys = [key for batch in whole for key in batch]
    for number, key in enumerate(keys):
        assert key.epoch == number // length
        assert (key.step, key.place) == divmod(number, size)
    for epoch in range(len(keys) // length):
        visited = [key.row for key in keys[epoch * length : (epoch + 1) * length]]
        assert sorted(visited) == list(range(length))
        assert visited == epoch_order(length, seed, epoch).tolist()
    ranks = [list(BatchSchedule(EpochOrder(length, seed), size, start, steps, rank, world)) for rank in range(world)]
    for step, shares in enumerate(zip(*ranks, strict=True), start):
        assert sorted(itertools.chain(*shares), key=lambda key: key.place) == whole[step]
    assert len(BatchSchedule(EpochOrder(length, seed), size, start, steps)) == steps - start


def test_an_endless_schedule_is_quick_for_a_million_recordings():
    schedule = BatchSchedule(EpochOrder(1_000_000, 0), 256, start_step=100_000)
    keys = next(iter(schedule))
    assert keys[0].epoch == 25
    assert 0 <= keys[0].row < 1_000_000
    with pytest.raises(TypeError):
        len(schedule)


def test_rejections_are_listed_once_and_survive(tmp_path):
    path = tmp_path / "rejected.csv"
    log = RejectionLog(path)
    assert not path.exists()
    assert log.add([("a,1.wav", 'has "quotes"'), ("b.wav", "two\nlines"), ("a,1.wav", "again")]) == 2
    assert log.add([("b.wav", "again"), ("-d\n.wav", "=1+1")]) == 1
    path.write_bytes(path.read_bytes() + b'half.wav,"is sil')  # killed while writing
    resumed = RejectionLog(path)
    assert len(resumed) == 3
    assert resumed.add([("b.wav", "again"), ("-d\n.wav", "again"), ("c\udcff.wav", "odd name")]) == 1
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "reason"],
        ["a,1.wav", 'has "quotes"'],
        ["b.wav", "two lines"],
        ["'-d\\x0a.wav", "'=1+1"],
        ["c\udcff.wav", "odd name"],
    ]
    assert len(RejectionLog(path)) == 4


def test_a_file_called_path_is_an_entry_like_others(tmp_path):
    RejectionLog(tmp_path / "r.csv").add([("path", "is a folder")])
    assert len(RejectionLog(tmp_path / "r.csv")) == 1


def test_validation_crops_are_fixed_and_skip_bad_files(mixed):
    source = open_source(mixed)
    crops = fixed_crops(source, 4, fields(), seed=3)
    assert len(crops) == 4
    for first, second in zip(crops, fixed_crops(source, 4, fields(), seed=3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert len(fixed_crops(source, 99, fields(), seed=3)) == 6
    whole = read_audio(mixed / "d.ogg", RATE)
    assert any(np.array_equal(crop, whole) for crop in fixed_crops(source, 99, fields(), seed=3))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_shards_are_read_window_by_window_and_every_recording_once(parts, seed, epoch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_BYTES", 100)
        counts, sizes = zip(*parts, strict=True)
        shards = Parts(np.cumsum([0, *counts]), np.array(sizes))
        found = epoch_order(sum(counts), seed, epoch, shards)
    assert sorted(found.tolist()) == list(range(sum(counts)))
    if sum(sizes) <= 100:
        assert found.tolist() == epoch_order(sum(counts), seed, epoch).tolist()
        return
    shard_of = np.repeat(np.arange(len(counts)), counts)[found]
    first = {shard: place for place, shard in reversed(list(enumerate(shard_of)))}
    for place, shard in enumerate(shard_of):
        # Shards that are open at once, begun and not finished, fit into a window.
        begun = {other for other in first if first[other] <= place and other in shard_of[place:]}
        assert shard not in begun or sum(sizes[other] for other in begun) <= max(100, *sizes)


def workers_of_a_loader(pipe):
    waveforms = np.random.default_rng(0).normal(0, 0.1, (9, 1000))
    coming = iter(loader(ArraySource(waveforms, RATE), 2, None))
    pipe.send([worker.pid for worker in coming._workers])
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the end of the parent is Linux's")
def test_workers_end_with_a_killed_main_process():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=workers_of_a_loader, args=(theirs,))
    process.start()
    workers = ours.recv()
    process.kill()
    process.join()
    deadline = time.monotonic() + 5
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(worker) for worker in workers)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
