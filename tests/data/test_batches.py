"""Batches: the same ones whatever makes them, and what was rejected on the way."""

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
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import announce, noise, write

from bestrq2.data import order
from bestrq2.data.audio import read_audio
from bestrq2.data.batch import Crop, collate
from bestrq2.data.loader import AllRejectedError, CropDataset, end_workers, fixed_crops, training_batches
from bestrq2.data.open_source import open_source
from bestrq2.data.order import BatchSchedule, CropKey, EpochOrder, Parts, epoch_order
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.sources import ArraySource, FileSource
from bestrq2.errors import ConfigError, DataError

RATE = 16_000


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


BROKEN = {
    "empty.wav": "the file is empty (0 bytes).",
    "text.mp3": "is not audio that libsndfile or FFmpeg can read.",
    "silent.wav": "is silent: no sample exceeds 0.0001 of full scale.",
    "nan.float.wav": "holds NaN or infinite samples.",
}


def test_recordings_that_end_early_are_in_batches_and_fixed_crops_and_listed_once(tmp_path):
    announce(write(tmp_path / "early.wav", noise(0.5, RATE), RATE), RATE)
    write(tmp_path / "whole.wav", noise(0.5, RATE, 1), RATE)
    source = open_source(tmp_path)
    expected = (str(tmp_path / "early.wav"), 1.0, 0.5)
    batches = training_batches(source, sampling_rate=RATE, max_seconds=1.0, seed=0, batch_size=2, max_steps=3)
    log = RejectionLog(tmp_path / "rejected.csv")
    for batch in batches:
        assert batch.shorter == [expected]
        log.shorter.add(batch.shorter)
    found = []
    fixed_crops(source, 2, seed=0, sampling_rate=RATE, max_seconds=1.0, shorter=found)
    assert found == [expected]
    again = RejectionLog(tmp_path / "rejected.csv")
    assert again.shorter.add(found) == 0
    assert (tmp_path / "shorter.csv").read_text() == f"path,announced,found\n{expected[0]},1.000,0.500\n"
    assert not (tmp_path / "rejected.csv").exists()


def dataset(root, seed=5):
    return CropDataset(open_source(root), RATE, max_seconds=1.0, seed=seed)


def draw_mask(lengths, step, places):
    rows = [torch.rand(7, generator=torch.Generator().manual_seed(1000 * step + int(place))) for place in places]
    return torch.stack(rows) < 0.5


def batches(root, workers, steps=4, start=0, rank=0, world=1):
    loader = training_batches(
        open_source(root),
        sampling_rate=RATE,
        max_seconds=1.0,
        seed=5,
        batch_size=6,
        start_step=start,
        num_workers=workers,
        draw_mask=draw_mask,
        max_steps=steps,
        rank=rank,
        world_size=world,
    )
    return list(loader)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.step == b.step
        for name in ("input_values", "lengths", "places", "hidden_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.rejected == b.rejected


def test_any_number_of_workers_gives_the_same_batches(mixed):
    alone = batches(mixed, 0)
    assert [batch.step for batch in alone] == [0, 1, 2, 3]
    assert {len(batch) for batch in alone} == {6}
    assert any(batch.rejected for batch in alone)
    for workers in (1, 2):
        assert_same(alone, batches(mixed, workers))


def test_a_resumed_schedule_continues_where_it_stopped(mixed):
    assert_same(batches(mixed, 0)[2:], batches(mixed, 0, start=2))


def test_processes_share_the_batch_of_one(mixed):
    whole = batches(mixed, 0, steps=2)
    for rank in range(3):
        for full, share in zip(whole, batches(mixed, 0, steps=2, rank=rank, world=3), strict=True):
            assert share.places.tolist() == [rank, rank + 3]
            for row, place in enumerate(share.places.tolist()):
                length = int(share.lengths[row])
                assert length == full.lengths[place]
                assert torch.equal(share.input_values[row, :length], full.input_values[place, :length])
                assert torch.equal(share.hidden_mask[row], full.hidden_mask[place])


def test_items_do_not_depend_on_what_was_read_before(mixed):
    """The memory of bad files saves work and changes nothing."""
    keys = [key for batch in itertools.islice(BatchSchedule(EpochOrder(len(dataset(mixed)), 5), 6), 5) for key in batch]
    warm = dataset(mixed)
    for key in [*keys[::-1], *keys]:
        fresh, again = dataset(mixed)[key], warm[key]
        np.testing.assert_array_equal(fresh.waveform, again.waveform)
        assert fresh.rejected == again.rejected


def test_bad_files_are_replaced_by_the_next_of_the_epoch_and_listed(mixed):
    data = dataset(mixed)
    names = [data.source.describe(i).rpartition("/")[2] for i in range(len(data))]
    row = [names[i] for i in epoch_order(len(data), 5, 0)]
    bad = set(BROKEN)
    for position, name in enumerate(row):
        crop = data[CropKey(0, names.index(name), 0, position)]
        walked = list(itertools.takewhile(lambda n: n in bad, row[position:] + row))
        assert [path.rpartition("/")[2] for path, _ in crop.rejected] == walked
        for path, reason in crop.rejected:
            assert BROKEN.get(path.rpartition("/")[2], reason) == reason
    short = data.__getitem__(CropKey(0, names.index("d.ogg"), 0, 0)).waveform
    assert len(short) == pytest.approx(3200, abs=2 * 256)  # a packet, which FFmpeg does not trim in so short a file


def test_a_replacement_is_not_the_crop_its_own_turn_gives(tmp_path):
    good = write(tmp_path / "good.wav", noise(9, 16_000), 16_000)
    (tmp_path / "bad.wav").touch()
    data = CropDataset(FileSource("x", [good, tmp_path / "bad.wav"]), RATE, 1.0, seed=0)
    own, replacement = data[CropKey(0, 0, 0, 0)], data[CropKey(0, 1, 0, 1)]
    assert len(replacement.rejected) == 1
    assert not np.array_equal(own.waveform, replacement.waveform)


@pytest.mark.parametrize("workers", [0, 1])
def test_if_all_are_rejected_one_sentence_says_so(tmp_path, workers):
    for name in ("a.wav", "b.wav", "c.wav"):
        (tmp_path / name).write_text("text")
    settings = {"sampling_rate": RATE, "max_seconds": 1.0, "seed": 5, "batch_size": 2, "max_steps": 1}
    loader = training_batches(open_source(tmp_path), num_workers=workers, **settings)
    with pytest.raises(DataError) as error:
        list(loader)
    if workers:
        # The stack trace holds on to the iterator; at its own time, ending the worker takes the collector five seconds.
        end_workers(loader)
    assert isinstance(error.value, AllRejectedError)
    assert str(error.value).startswith(f"{tmp_path}: all 3 recordings were rejected; first: {tmp_path}/")
    assert str(error.value).endswith(": is not audio that libsndfile or FFmpeg can read.")
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_the_search_for_a_usable_recording_ends():
    data = CropDataset(ArraySource(np.zeros((1500, 10), np.float32), RATE), RATE, 1.0, seed=0)
    with pytest.raises(
        AllRejectedError, match="1,000 recordings in a row were rejected; first: array clip 7: is silent"
    ):
        data[CropKey(0, 7, 0, 0)]


def test_crops_differ_between_epochs_and_seeds():
    data = CropDataset(ArraySource([noise(9, RATE)], RATE), RATE, 1.0, seed=0)
    other = CropDataset(data.source, RATE, 1.0, seed=1)
    crops = [data[CropKey(e, 0, 0, 0)].waveform for e in range(3)] + [other[CropKey(0, 0, 0, 0)].waveform]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(crops, 2))


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
        visited = [key.recording for key in keys[epoch * length : (epoch + 1) * length]]
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
    assert 0 <= keys[0].recording < 1_000_000
    with pytest.raises(TypeError):
        len(schedule)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch_size": 7, "world_size": 2}, "7 is not divisible by the 2 processes; use 8"),
        ({"batch_size": 0}, "batches of 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2 processes"),
    ],
)
def test_impossible_schedules_are_refused(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        BatchSchedule(**{"order": EpochOrder(10, 0), "batch_size": 4, **arguments})


def test_impossible_datasets_are_refused():
    source = ArraySource(np.ones((2, 10)), RATE)
    for rate, seconds in [(0, 1.0), (16_000, 0.0), (16_000, float("nan"))]:
        with pytest.raises(ConfigError, match="impossible; both must be positive"):
            CropDataset(source, rate, seconds, seed=0)
    with pytest.raises(DataError, match="holds no recordings"):
        CropDataset(ArraySource([], RATE), RATE, 1.0, seed=0)


def test_batches_are_padded_with_zeros_and_keep_lengths():
    waveforms = [noise(s, RATE, i) for i, s in enumerate((0.5, 1.0, 0.1))]
    items = [Crop(CropKey(0, i, 9, 2 * i), w, (("x", "bad"),) * i) for i, w in enumerate(waveforms)]
    batch = collate(items)
    assert batch.input_values.shape == (3, 16_000)
    assert batch.input_values.dtype == torch.float32
    assert batch.lengths.tolist() == [8000, 16_000, 1600]
    assert batch.places.tolist() == [0, 2, 4]
    assert (batch.step, len(batch.rejected), batch.hidden_mask) == (9, 3, None)
    for row, waveform in zip(batch.input_values, waveforms, strict=True):
        np.testing.assert_array_equal(row[: len(waveform)].numpy(), waveform)
        assert not row[len(waveform) :].any()
    moved = batch.to("meta")
    assert moved.input_values.device.type == "meta"
    assert moved.lengths.device.type == "cpu"


def test_sixteen_bit_audio_travels_as_it_is_and_becomes_float_where_it_arrives():
    stored = [np.arange(-5, 5, dtype=np.int16) * 3000, np.arange(8, dtype=np.int16)]
    batch = collate([Crop(CropKey(0, i, 0, i), waveform) for i, waveform in enumerate(stored)])
    assert batch.input_values.dtype == torch.int16
    moved = batch.to("cpu").input_values
    assert moved.dtype == torch.float32
    np.testing.assert_array_equal(moved[0].numpy(), stored[0] / np.float32(32768))
    assert not moved[1, 8:].any()


def test_a_batch_becomes_float_with_its_first_crop_that_is():
    class Mixed(ArraySource):
        def read(self, index, *arguments):
            waveform = super().read(index, *arguments)
            return waveform if index == 2 else np.int16(waveform * 32768)

    clips = np.stack([np.int16(noise(0.1, RATE, i) * 30000) for i in range(4)])
    dataset = CropDataset(Mixed(clips, RATE), RATE, 0.1, seed=0)
    keys = [CropKey(0, i, 0, i) for i in range(4)]
    batch = collate(dataset.__getitems__(keys))
    assert batch.input_values.dtype == torch.float32
    np.testing.assert_array_equal(batch.input_values.numpy(), clips / np.float32(32768))
    assert collate(dataset.__getitems__(keys[:2])).input_values.dtype == torch.int16


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
    crops = fixed_crops(source, 4, seed=3, sampling_rate=RATE, max_seconds=1.0)
    assert len(crops) == 4
    for first, second in zip(crops, fixed_crops(source, 4, seed=3, sampling_rate=RATE, max_seconds=1.0), strict=True):
        np.testing.assert_array_equal(first, second)
    assert len(fixed_crops(source, 99, seed=3, sampling_rate=RATE, max_seconds=1.0)) == 6
    whole = read_audio(mixed / "d.ogg", RATE)
    assert any(
        np.array_equal(crop, whole) for crop in fixed_crops(source, 99, seed=3, sampling_rate=RATE, max_seconds=1.0)
    )


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
    loader = training_batches(
        ArraySource(np.ones((9, 100), np.float32), RATE),
        sampling_rate=RATE,
        max_seconds=1.0,
        seed=0,
        batch_size=2,
        num_workers=2,
    )
    coming = iter(loader)
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
