"""Streams of remote shards: the same batches whatever reads them, and networks that fail."""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import os
import socket
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import wait
from urllib.error import URLError

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_server import RATE, clip, serving, shards, tar_of

from bestrq2.data import lanes, transfer
from bestrq2.data.feeding import fixed_crops, make_feed, split_any
from bestrq2.data.lanes import CropMaker, Lane, LaneCrops, Lanes, UnreachableError
from bestrq2.data.opening import open_recordings, open_source
from bestrq2.data.remote import StreamSource, open_stream
from bestrq2.data.transfer import Patience, Shard
from bestrq2.errors import ConfigError, DataError

HASTE = Patience(waits=(0.0, 0.0), timeout=10.0)
# Bytes of a clip in a tar: header and content, in blocks of 512.
MEMBER = 512 + -(-len(clip(0)) // 512) * 512
PADDING = -len(clip(0)) % 512


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(lanes, "WINDOW", 4)


@pytest.fixture
def server():
    """Nine shards of unequal length, 57 clips."""
    with serving(shards(9, 5, 1, 12, 4, 8, 7, 6, 5)) as running:
        yield running


def stream(server, count=9, **changes):
    return StreamSource("test", tuple(f"{server.url}/{i}.tar" for i in range(count)), patience=HASTE, **changes)


def batches(source, steps=range(9), workers=0, batch_size=4, rank=0, world=1):
    feed = make_feed(source, RATE, 0.2, seed=3)
    loader = feed.loader(batch_size, steps.start, workers, max_steps=steps.stop, rank=rank, world_size=world)
    return list(loader)


def names(batch):
    return [name.rpartition("/")[2] for name in batch.recordings]


def assert_same(first, second):
    assert [batch.step for batch in first] == [batch.step for batch in second]
    for a, b in zip(first, second, strict=True):
        assert a.recordings == b.recordings
        assert torch.equal(a.input_values, b.input_values)
        assert torch.equal(a.places, b.places)


@pytest.fixture
def undisturbed(server):
    return batches(stream(server))


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
        loader = make_feed(stream(server, 1), RATE, 0.2, 0).loader(1, num_workers=workers, max_steps=1)
        with pytest.raises(DataError, match=r"^test: 10 recordings in a row were rejected; first: http.*wav: is not"):
            list(loader)
        if workers:
            loader._iterator._shutdown_workers()


def test_a_connection_that_breaks_is_made_again_and_changes_nothing(server, undisturbed, caplog):
    sizes = {name: len(content) for name, content in server.files.items()}
    server.breaks = {name: [size // 2, size // 3, size - 2000] for name, size in sizes.items()}
    server.answers = {"3.tar": [503, 429]}
    with caplog.at_level(logging.WARNING):
        assert_same(batches(stream(server)), undisturbed)
    assert "trying again in 0 s" in caplog.text
    assert "the connection broke after" in caplog.text
    assert not any(batch.rejected for batch in undisturbed)


def test_a_shard_that_is_gone_in_mid_run_is_skipped_and_listed(server, caplog):
    del server.files["4.tar"]
    server.answers["6.tar"] = [500] * 99
    with caplog.at_level(logging.WARNING):
        found = batches(stream(server), range(30))
    rejected = {path.rpartition("/")[2]: reason for batch in found for path, reason in batch.rejected}
    assert rejected == {
        "4.tar": "could not be fetched: 404 Not Found",
        "6.tar": "could not be fetched: 500 Internal Server Error",
    }
    assert "what follows differs from a run that can fetch all of it" in caplog.text
    assert "skipped after 0 of its recordings" in caplog.text
    visits = Counter(name for batch in found for name in names(batch))
    assert len(visits) > 40
    # 404 is final, 500 is tried three times.
    assert Counter(server.asked)["6.tar"] % 3 == 0


def test_a_network_that_stays_away_stops_the_run(server):
    source = stream(server)
    server.answers = {name: [503] * 99 for name in server.files}
    with pytest.raises(
        UnreachableError, match=r"3 shards in a row could not be fetched, the last was http.*Service Unav"
    ):
        batches(source)


@pytest.mark.parametrize("end", [0.5, 0.6])
def test_of_a_truncated_tar_the_whole_members_are_used(end):
    content = tar_of({f"{i}.wav": clip(i) for i in range(8)})
    cut = content[: int(len(content) * end)]
    with serving({"0.tar": cut}) as server:
        found = batches(stream(server, 1), range(12), batch_size=1)
    whole = len(cut) // MEMBER
    visits = Counter(name for batch in found for name in names(batch))
    assert set(visits) == {f"{i}.wav" for i in range(whole)}
    assert {count for batch in found for count in batch.shard_counts.values()} == {whole}
    assert {reason for batch in found for _, reason in batch.rejected} == {
        f"is damaged after {whole} whole recordings (unexpected end of data)"
    }


def test_a_tar_that_ends_between_two_members_is_noticed():
    content = tar_of({f"{i}.wav": clip(i) for i in range(8)})
    for length in (3 * MEMBER, 3 * MEMBER + 300):
        with serving({"0.tar": content[:length]}) as server:
            found = batches(stream(server, 1), range(4), batch_size=1)
        reasons = {reason for batch in found for _, reason in batch.rejected}
        assert reasons == {"ends early, after 3 whole recordings"}


def quiet_start(number):
    """A clip behind 0.56 s of digital silence, more than a block of the tar."""
    waveform = np.concatenate([np.zeros(round(0.56 * RATE)), soundfile.read(io.BytesIO(clip(number)))[0]])
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"\xff" * 300, "is damaged after 2 whole recordings (no header at byte {start:,})"),
        (bytes(512), "goes on behind its end mark, after 2 recordings: damaged, or several tars joined by cat"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_damaged_header_is_not_taken_for_the_end(broken, reason, mode):
    content = bytearray(tar_of({f"{i}.wav": quiet_start(i) for i in range(8)}))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        start = tar.getmembers()[2].offset
    content[start : start + len(broken)] = broken
    packed = {"w": bytes, "w:gz": gzip.compress, "w:xz": lzma.compress}[mode](bytes(content))
    with serving({"0.tar": packed}) as server:
        found = batches(stream(server, 1), range(8), batch_size=1)
        resumed = batches(stream(server, 1), range(3, 8), batch_size=1)
        server.breaks["0.tar"] = [len(packed) // 5, len(packed) // 4]
        broke_off = batches(stream(server, 1), range(8), batch_size=1)
    assert_same(found[3:], resumed)
    assert_same(found, broke_off)
    for run in (found, resumed, broke_off):
        assert {count for batch in run for count in batch.shard_counts.values()} == {2}
        assert {why for batch in run for _, why in batch.rejected} == {reason.format(start=start)}


def test_tars_joined_by_cat_are_listed_as_damaged():
    first, second = (tar_of({f"{i}.wav": clip(i) for i in numbers}) for numbers in ((0, 1), (2, 3)))
    with serving({"0.tar": first + second}) as server:
        found = batches(stream(server, 1), range(3), batch_size=1)
    assert {why for batch in found for _, why in batch.rejected} == {
        "goes on behind its end mark, after 2 recordings: damaged, or several tars joined by cat"
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(513, 4 * MEMBER + 1024), st.integers(0, 3 * MEMBER))
def test_a_truncated_tar_counts_the_same_however_it_was_read(length, broken_at):
    content = tar_of({f"{i}.wav": clip(i) for i in range(4)})[:length]
    with serving({"0.tar": content}) as server:
        undisturbed, disturbed = (Shard(f"{server.url}/0.tar", HASTE) for _ in range(2))
        assert [len(undisturbed.window(number, 1)[1]) for number in range(5)][-1] == 0
        server.breaks["0.tar"] = [min(broken_at, length - 1)]
        assert disturbed.window(9, 4)[1] == []
    assert (undisturbed.whole, undisturbed.damage) == (disturbed.whole, disturbed.damage)
    assert undisturbed.whole == sum(MEMBER * (i + 1) - PADDING <= length for i in range(4))
    assert (undisturbed.damage is None) == (length >= 4 * MEMBER + 512)


def test_compressed_tars_are_read_too():
    members = {f"{i}.wav": clip(i) for i in range(8)}
    with serving({"0.tar": tar_of(members), "1.tar": tar_of(members, "w:gz")}) as server:
        plain = StreamSource("test", (f"{server.url}/0.tar",), patience=HASTE)
        packed = replace(plain, urls=(f"{server.url}/1.tar",))
        first, second = batches(plain, range(3)), batches(packed, range(3))
        for a, b in zip(first, second, strict=True):
            assert names(a) == names(b)
            assert not b.rejected


def test_commands_and_files_stream_as_servers_do(tmp_path, server, undisturbed):
    for name, content in server.files.items():
        (tmp_path / name).write_bytes(content)
    for pattern in (f"pipe:cat {tmp_path}/{{0..8}}.tar", f"file://{tmp_path}/{{0..8}}.tar"):
        source = open_source(pattern)
        assert isinstance(source, StreamSource)
        assert len(source.urls) == 9
        for a, b in zip(batches(source), undisturbed, strict=True):
            assert names(a) == names(b)
            assert torch.equal(a.input_values, b.input_values)


def test_a_command_that_fails_is_an_error_and_no_short_tar(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.wav": clip(i) for i in range(9)}))
    source = StreamSource("test", (f"pipe:head -c 20000 {tmp_path}/0.tar; exit 7",), patience=HASTE)
    with pytest.raises(UnreachableError, match=r"\(the command ended with exit code 7\)"):
        batches(source, range(12), batch_size=1)


@pytest.fixture
def alive(tmp_path):
    """A pipe that commands open as descriptor 9; it can be read without waiting once all of them are gone."""
    os.mkfifo(tmp_path / "alive")
    handle = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    yield handle
    os.close(handle)


@pytest.mark.parametrize("stall", ["sleep 600", "sleep 600 | cat", "exec >&-; sleep 600"])
def test_a_command_that_stalls_is_ended_and_run_again(tmp_path, alive, stall):
    (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.wav": clip(i) for i in range(9)}))
    command = f"echo >> {tmp_path}/runs; exec 9>{tmp_path}/alive; head -c {3 * MEMBER} {tmp_path}/0.tar; {stall}"
    shard = Shard(f"pipe:{command}", Patience(waits=(0.0,), timeout=0.5))
    assert len(shard.window(0, 4)[1]) == 3
    assert str(shard.failure) == "no answer in time"
    assert (tmp_path / "runs").read_text() == "\n" * 2
    assert wait([alive], 5)


@pytest.mark.parametrize(("url", "program"), [("s3://b/0.tar", "aws"), ("gs://b/0.tar", "gsutil")])
def test_programs_for_buckets_are_ended_too(tmp_path, alive, monkeypatch, url, program):
    (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.wav": clip(i) for i in range(9)}))
    script = f"#!/bin/sh\nexec 9>{tmp_path}/alive\nhead -c {3 * MEMBER} {tmp_path}/0.tar\nexec sleep 600\n"
    (tmp_path / program).write_text(script)
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shard = Shard(url, Patience(waits=(), timeout=0.5))
    assert len(shard.window(0, 4)[1]) == 3
    assert str(shard.failure) == "no answer in time"
    assert wait([alive], 5)


def test_closing_ends_a_command_that_stalls_or_writes(tmp_path, alive):
    (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.wav": clip(i) for i in range(9)}))
    for then in ("sleep 600", "cat /dev/zero"):
        shard = Shard(f"pipe:exec 9>{tmp_path}/alive; cat {tmp_path}/0.tar; {then}", HASTE)
        assert len(shard.window(0, 2)[1]) == 2
        shard.close()
        assert wait([alive], 5)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone.tar", r"gone.tar cannot be fetched: 404 Not Found\.$"),
        ("page.tar", "page.tar is no tar with audio in it: it is damaged after 0 whole recordings"),
        ("empty.tar", r"empty.tar is no tar with audio in it: it is damaged after 0 whole recordings \(empty file"),
        ("images.tar", r"images.tar holds no audio \(found: .jpg, none; expected .wav"),
        ("busy.tar", "busy.tar cannot be fetched: 503 Service Unavailable"),
    ],
)
def test_what_is_wrong_with_the_first_shard_is_said_at_once(path, reason):
    files = {"page.tar": b"<html>" * 999, "empty.tar": b"", "images.tar": tar_of({"a.jpg": b"x", "b": b"y"})}
    with serving({**files, "busy.tar": b""}) as server:
        server.answers["busy.tar"] = [503] * 99
        with pytest.raises(DataError, match=reason) as error:
            open_stream(f"{server.url}/{path}", HASTE)
        assert "\n" not in str(error.value)
        assert len(server.asked) == (3 if path == "busy.tar" else 1)


def test_a_server_that_is_not_there_is_named():
    with serving({}) as server:
        url = server.url
    with pytest.raises(DataError, match=f"{url}/a.tar cannot be fetched: Connection refused"):
        open_stream(f"{url}/a.tar", HASTE)
    with pytest.raises(DataError, match=r"nowhere\.tar is not there"):
        open_stream("file:///nowhere.tar", HASTE)
    with pytest.raises(DataError, match="the command ended with exit code 127"):
        open_stream("pipe:no-such-command-here 2>/dev/null", HASTE)


@pytest.mark.parametrize("reason", [ConnectionRefusedError(111, "Connection refused"), socket.gaierror(-2, "No name")])
def test_a_mistyped_address_is_told_at_once_and_a_server_that_went_away_is_waited_for(monkeypatch, reason):
    waited = []
    monkeypatch.setattr(transfer.time, "sleep", waited.append)
    monkeypatch.setattr(transfer, "urlopen", lambda *_, **__: (_ for _ in ()).throw(URLError(reason)))
    with pytest.raises(DataError, match=r"a\.tar cannot be fetched: .*; check the address, and that its server runs\."):
        open_stream("http://somewhere/a.tar")
    assert waited == []
    Shard("http://somewhere/a.tar", Patience()).window(0, 1)
    assert waited == [1.0, 2.0, 4.0, 8.0]


def test_urls_that_mean_nothing_are_refused():
    with pytest.raises(
        ConfigError, match=r"gopher://x/a.tar: there is no way to fetch from it; known are .*https.* s3"
    ):
        open_source("gopher://x/a.tar")
    with pytest.raises(ConfigError, match="a brace is not closed"):
        open_source("https://x/{000..099.tar")


def test_urls_may_hold_any_letter():
    with serving({"caf%C3%A9%20a%2Bb.tar": tar_of({"0.wav": clip(0)})}) as server:
        source = open_stream(f"{server.url}/café a%2Bb.tar", HASTE)
        assert batches(source, range(1), batch_size=1)[0].recordings == [f"{server.url}/café a%2Bb.tar/0.wav"]
    assert server.asked == ["caf%C3%A9%20a%2Bb.tar"] * 2


def test_s3_without_its_program_is_refused_before_anything_is_tried(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"s3://b/0.tar: s3:// needs the program 'aws' .*install it"):
        open_source("s3://b/{0..3}.tar")


@pytest.mark.parametrize("url", ["https://host/a.tar", "s3://bucket/a.flac", "pipe:cat a.tar"])
def test_a_list_of_urls_is_refused_with_the_way_to_give_them(tmp_path, url):
    (tmp_path / "list.txt").write_text(f"a.wav\n{url}\n")
    with pytest.raises(DataError, match=rf"lists hold local paths, and {url} is none; give remote tars as a pattern"):
        open_source(tmp_path / "list.txt")


def test_what_needs_every_recording_at_hand_refuses_streams(server):
    with pytest.raises(DataError, match="is a stream, which only pretraining reads; download"):
        open_recordings(f"{server.url}/0.tar")


def test_a_split_holds_out_one_shard(server):
    source = stream(server)
    training, held_out = split_any(source, 5, seed=1)
    assert sorted(training.urls + held_out.urls) == sorted(source.urls)
    assert len(held_out.urls) == 1
    assert {split_any(source, 5, seed)[1].urls for seed in range(9)} != {held_out.urls}
    assert split_any(source, 0, seed=1) == (source, None)
    assert split_any(stream(server, 1), 5, seed=1)[1] is None


def test_damage_of_the_shard_for_validation_is_listed():
    with serving({"0.tar": tar_of({f"{i}.wav": clip(i) for i in range(4)})[: 2 * MEMBER]}) as server:
        source, rejected = stream(server, 1), []
        assert len(fixed_crops(source, 9, 0, RATE, 0.2, rejected=rejected)) == 2
    assert rejected == [(source.urls[0], "ends early, after 2 whole recordings")]


def test_validation_crops_are_the_first_usable_ones_and_fixed():
    members = {f"{i}.wav": clip(i) for i in range(5)} | {"1.wav": b"no audio" * 99}
    with serving({"0.tar": tar_of(members)}) as server:
        source, rejected = stream(server, 1), []
        crops = fixed_crops(source, 3, 0, RATE, 0.2, rejected=rejected)
        again = fixed_crops(source, 99, 0, RATE, 0.2)
    assert [len(crop) for crop in crops] == [1600] * 3
    assert [path.rpartition("/")[2] for path, _ in rejected] == ["1.wav"]
    assert len(again) == 4
    for first, second in zip(crops, again, strict=False):
        np.testing.assert_array_equal(first, second)
