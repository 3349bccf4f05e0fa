"""Remote tars: a cache of whole shards, the same batches as from local ones, and failures of the network."""

from __future__ import annotations

import errno
import gzip
import io
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import soundfile
import torch
from shard_crops import batches as any_batches
from shard_crops import fields, loader

from bestrq2.data import order
from bestrq2.data.loader import end_workers, fixed_crops, training_rows
from bestrq2.data.open_source import open_source
from bestrq2.data.shards import files, remote
from bestrq2.data.shards.index import index_path, load_index
from bestrq2.data.shards.remote import UnreachableError, cached_path, fetch, open_shard
from bestrq2.data.sources import split_source
from bestrq2.errors import ConfigError, DataError
from shard_server import RATE, clip, serving, shards, tar_of

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = fields(0.3, sampling_rate=RATE, mel_max_hz=RATE / 2)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))


def batches(source, workers=0, steps=9, seed=3, **settings):
    return any_batches(source, workers, steps, CONFIG, seed, **settings)


def pattern(server, last=8):
    return f"{server.url}/{{0..{last}}}.tar"


def write_shards(folder, tars):
    folder.mkdir()
    for name, content in tars.items():
        (folder / name).write_bytes(content)
    return folder


def evict_all():
    """Remove every cached tar; indexes stay."""
    files.OPEN_CACHED.files.clear()
    for path in remote.cache_folder().glob("remote/*.tar"):
        path.unlink()


def assert_same(first, second):
    assert [batch.step for batch in first] == [batch.step for batch in second]
    for a, b in zip(first, second, strict=True):
        assert [name.rpartition("/")[2] for name in a.recordings] == [n.rpartition("/")[2] for n in b.recordings]
        assert torch.equal(a.to("cpu").input_values, b.to("cpu").input_values)
        assert torch.equal(a.places, b.places)


def test_remote_tars_give_the_batches_of_the_same_local_ones(server, tmp_path):
    local = batches(open_source(write_shards(tmp_path / "shards", server.files)))
    source = open_source(pattern(server))
    assert len(source) == 57
    assert_same(batches(source), local)
    assert_same(batches(source, workers=2), local)


def test_a_large_corpus_is_shuffled_by_shards_and_then_in_windows_alike_remote_and_local(server, tmp_path, monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", 130_000)
    local = open_source(write_shards(tmp_path / "shards", server.files))
    evict_all()
    source = open_source(pattern(server))
    whole = batches(source, steps=30)
    assert_same(whole, batches(local, steps=30))
    assert_same(whole[11:], batches(source, steps=30, start_step=11))
    for rank in range(2):
        for full, share in zip(whole, batches(source, 0, 30, rank=rank, world_size=2), strict=True):
            assert share.recordings == full.recordings[rank::2]
    evict_all()
    assert_same(batches(source, workers=2, steps=30), whole)


def test_each_shard_is_fetched_once_and_indexed_once(server):
    source = open_source(pattern(server))
    batches(source, workers=2)
    tars = [f"{number}.tar" for number in range(9)]
    assert sorted(path for path in server.asked if path.endswith(".tar")) == tars
    server.asked.clear()
    assert len(open_source(pattern(server))) == 57
    assert server.asked == []
    evict_all()
    assert len(open_source(pattern(server))) == 57
    assert server.asked == []  # indexes outlive the tars
    batches(source)
    assert {path for path in server.asked if path.endswith(".tar")} <= set(tars)


def test_with_indexes_beside_the_shards_only_what_is_read_is_fetched(server, tmp_path):
    folder = write_shards(tmp_path / "shards", server.files)
    for name in list(server.files):
        load_index(folder / name)
        server.files[f"{name}.index.parquet"] = index_path(folder / name).read_bytes()
    source = open_source(pattern(server))
    assert len(source) == 57
    assert not any(path.endswith(".tar") for path in server.asked)
    assert source.metadata(0) == {"label": "tone"}
    assert [path for path in server.asked if path.endswith(".tar")] == ["0.tar"]


def test_an_index_that_does_not_fit_its_shard_is_noticed(server, tmp_path):
    folder = write_shards(tmp_path / "shards", {"0.tar": server.files["1.tar"]})
    load_index(folder / "0.tar")
    server.files["0.tar.index.parquet"] = index_path(folder / "0.tar").read_bytes()
    source = open_source(f"{server.url}/0.tar")
    with pytest.raises(DataError, match=r"rejected; first: http.*0\.tar/.*: its tar changed since it was indexed"):
        batches(source, steps=1)


def test_the_cache_keeps_within_its_limit_and_drops_what_was_not_used_for_longest(server, monkeypatch):
    sizes = [len(server.files[f"{number}.tar"]) for number in range(9)]
    monkeypatch.setenv("BESTRQ2_SHARD_CACHE_GB", str((sizes[0] + sizes[1] + sizes[2]) / 1e9))
    urls = [f"{server.url}/{number}.tar" for number in (0, 1, 2, 4)]
    for url in (urls[0], urls[1], urls[2], urls[0], urls[3]):
        fetch(url)
    assert [cached_path(url).exists() for url in urls] == [True, False, True, True]
    assert sum(cached_path(url).stat().st_size for url in urls if cached_path(url).exists()) <= sum(sizes[:3])


def test_a_shard_that_another_user_has_fetched_is_used(server, monkeypatch):
    url = f"{server.url}/0.tar"
    fetch(url)
    server.asked.clear()

    def refused(path, ns):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refused)
    with open_shard(url) as file:
        assert file.read() == server.files["0.tar"]
    assert server.asked == []


def test_a_shard_in_use_is_not_evicted(server, monkeypatch):
    monkeypatch.setenv("BESTRQ2_SHARD_CACHE_GB", "1e-9")
    first, second = f"{server.url}/0.tar", f"{server.url}/1.tar"
    file = open_shard(first)
    fetch(second)
    assert cached_path(first).exists()
    file.close()
    fetch(f"{server.url}/2.tar")
    assert not cached_path(first).exists()
    assert not cached_path(second).exists()


def test_a_corpus_larger_than_the_cache_is_read_all_the_same(server, monkeypatch):
    wanted = batches(open_source(pattern(server)))
    monkeypatch.setenv("BESTRQ2_SHARD_CACHE_GB", "0.0001")
    monkeypatch.setattr(remote, "_unused", lambda path: True)
    assert_same(batches(open_source(pattern(server)), workers=1), wanted)


def fetched(url, queue):
    queue.put(fetch(url).stat().st_size)


def test_processes_and_threads_fetch_a_shard_once(server):
    url = f"{server.url}/3.tar"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=fetched, args=(url, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(3) as pool:
        sizes = [path.stat().st_size for path in pool.map(fetch, [url] * 3)]
    sizes += [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert set(sizes) == {len(server.files["3.tar"])}
    assert server.asked.count("3.tar") == 1


def test_a_transfer_that_fails_is_tried_again(server, caplog):
    server.answers["0.tar"] = [503]
    server.breaks["0.tar"] = [20_000]
    source = open_source(f"{server.url}/{{1,0}}.tar")
    assert len(source) == 14
    assert server.asked.count("0.tar") == 3
    assert "503 Service Unavailable; trying again" in caplog.text
    assert "the connection broke; trying again" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_stays_unreachable_stops_the_run_with_one_sentence(server, workers):
    source = open_source(pattern(server))
    whole = batches(source)
    server.answers["3.tar"] = [500] * 99  # before the eviction: a thread may still fetch ahead
    evict_all()
    made = loader(source, workers, 9, CONFIG, 3)
    found = []
    message = r"^http://[^ ]*/3\.tar cannot be fetched: 500 Internal Server Error\.$"
    with pytest.raises(UnreachableError, match=message) as error:
        found.extend(made)
    assert error.value.exit_code == 1  # nothing is wrong with the input
    end_workers(made)
    assert_same(found, whole[: len(found)])
    server.answers.clear()
    assert_same(batches(source, start_step=len(found)), whole[len(found) :])


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone.tar", r"gone\.tar cannot be fetched: 404 Not Found\.$"),
        ("page.tar", r"page\.tar: is not a tar"),
        ("texts.tar", r"texts\.tar: the tar holds 1 member and none with an audio suffix"),
        ("packed.tar", r"packed\.tar: is compressed by zstd; unpack it"),
    ],
)
def test_what_is_not_a_tar_of_audio_is_named_by_its_url(path, reason):
    members = {"a.txt": b"text"}
    tars = {"page.tar": b"<html>" * 999, "texts.tar": tar_of(members), "packed.tar": b"\x28\xb5\x2f\xfd" * 9}
    with serving(tars) as server, pytest.raises(DataError, match=rf"^{server.url}/{reason}") as error:
        open_source(f"{server.url}/{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_unpacked_into_the_cache(mode):
    members = {f"{number}.wav": clip(number) for number in range(4)}
    with serving({"a.tar": tar_of(members), "b.tar": tar_of(members, mode)}) as server:
        plain, packed = (batches(open_source(f"{server.url}/{name}.tar"), steps=3) for name in "ab")
    assert_same(plain, packed)
    assert not list(remote.cache_folder().glob("remote/.*.tmp"))


def test_of_a_remote_tar_that_breaks_off_the_whole_clips_are_used(server, caplog):
    server.files["0.tar"] = server.files["0.tar"][:40_000]
    source = open_source(f"{server.url}/{{0,1}}.tar")
    assert f"1 of 2 tars left out, whole or in part; first: {server.url}/0.tar: the tar is truncated" in caplog.text
    assert len(fixed_crops(source, 99, CONFIG, seed=0)) == len(source) - 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/{0..3}.tar", r"s3://bucket/0\.tar: s3:// needs a package .*; pip install s3fs$"),
        ("nope://host/0.tar", "there is no way to fetch from nope://"),
        ("http://host/{0..3.tar", "a brace is not closed"),
    ],
)
def test_urls_that_cannot_be_fetched_here_are_refused_with_the_remedy(url, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=reason):
        open_source(url)


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_a_shard_that_is_lost_in_the_middle_of_a_clip_stops_the_run(kind):
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.random.default_rng(0).standard_normal(60 * RATE), RATE, format=kind)
    with serving({"0.tar": tar_of({f"0.{kind.lower()}": file.getvalue()})}) as server:
        source = open_source(f"{server.url}/0.tar")

        def read_while_it_is_lost():
            with source.opened(0) as decoder:
                server.files.clear()
                evict_all()
                decoder.read(50 * RATE, RATE)

        with pytest.raises(UnreachableError, match=r"0\.tar cannot be fetched: 404") as error:
            read_while_it_is_lost()
        assert error.value.exit_code == 2


def test_a_host_that_does_not_answer_is_named_at_once(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (1000.0,))
    with pytest.raises(UnreachableError, match="Connection refused; check the address, and that its server runs"):
        open_source("http://127.0.0.1:9/0.tar")


def answer_for_ever(block, pause=0.0, start=b"HTTP/1.0 200 OK\r\n\r\n"):
    """An answer that begins with `start` and goes on with the same block until the client leaves."""

    def answer(request):
        request.wfile.write(start)
        while True:
            request.wfile.write(block)
            time.sleep(pause)

    return answer


def redirect_to(place):
    def answer(request):
        request.send_response(302)
        request.send_header("Location", place)
        request.end_headers()

    return answer


ODD_ANSWERS = {
    "zeros": (answer_for_ever(bytes(1 << 16)), "zeros.tar: the tar holds no members"),
    "text": (answer_for_ever(b"hello" * 9999), "text.tar: is not a tar"),
    "endless": (answer_for_ever(tar_of({"0.wav": clip(0)})), r"has more than 0.001 GB; raise BESTRQ2_SHARD_CACHE_GB"),
    "bomb": (redirect_to("packed.tar"), r"bomb.tar cannot be fetched: it has more than 0.001 GB"),
    "silent": (answer_for_ever(b"", 0.05, b""), "silent.tar cannot be fetched: no answer in time"),
    "slow-body": (answer_for_ever(b"x", 0.05), "slow-body.tar cannot be fetched: no answer in time"),
    "slow-header": (answer_for_ever(b"x", 0.05, b"HTTP/1.0 200 OK\r\nA: "), "header.tar cannot be fetched: no answer"),
    "file": (redirect_to("file:///etc/passwd"), r"its server redirects to 'file:///etc/passwd', which is not http\.$"),
    "ftp": (redirect_to("ftp://host/0.tar"), "its server redirects to 'ftp://host/0.tar', which is not http"),
    "circle": (redirect_to("circle.tar"), "circle.tar cannot be fetched: "),
}


@pytest.mark.parametrize("kind", ODD_ANSWERS)
def test_a_server_that_does_not_serve_is_given_up_with_one_sentence(monkeypatch, kind):
    monkeypatch.setattr(remote, "READ_SECONDS", 0.4)
    monkeypatch.setattr(remote, "DEFAULT_GB", 0.001)
    monkeypatch.setenv("BESTRQ2_SHARD_CACHE_GB", "0.001")
    answer, reason = ODD_ANSWERS[kind]
    with serving({"packed.tar": gzip.compress(tar_of({"0.wav": bytes(2_000_000)}))}) as server:
        server.odd = {f"{kind}.tar": answer, f"{kind}.tar.index.parquet": answer}
        start = time.monotonic()
        with pytest.raises(DataError, match=reason) as error:
            open_source(f"{server.url}/{kind}.tar")
        assert time.monotonic() - start < 5
    assert str(error.value).startswith(server.url)
    assert "\n" not in str(error.value)
    assert not list(remote.cache_folder().glob("remote/.*.tmp"))


@pytest.mark.parametrize(
    ("url", "location", "is_followed"),
    [
        ("https://host/0.tar", "http://host/0.tar", False),
        ("https://host/0.tar", "s3://bucket/0.tar", False),
        ("https://host/0.tar", "https://other/0.tar", True),
        ("https://host/0.tar", "//other/0.tar", True),
        ("http://host/0.tar", "HTTPS://host/0.tar", True),
        ("http://host/0.tar", "/1.tar", True),
    ],
)
def test_redirects_stay_with_their_kind_of_url_or_go_to_https(url, location, is_followed):
    with nullcontext() if is_followed else pytest.raises(ValueError, match=f"redirects to '{location}', which is not"):
        remote.check_redirect(url, location)


def test_urls_may_hold_any_letter():
    with serving({"caf%C3%A9%20a%2Bb.tar": tar_of({"0.wav": clip(0)})}) as server:
        source = open_source(f"{server.url}/café a%2Bb.tar")
        assert source.describe(0) == f"{server.url}/café a%2Bb.tar/0.wav"


def test_file_urls_are_local_paths(server, tmp_path):
    folder = write_shards(tmp_path / "my shards", server.files)
    source = open_source(f"{folder.as_uri()}/{{0..8}}.tar")
    assert len(source) == 57
    assert not source.is_remote()


def test_a_list_may_name_remote_tars_beside_local_ones(server, tmp_path):
    (tmp_path / "local.tar").write_bytes(server.files["1.tar"])
    (tmp_path / "list.txt").write_text(f"local.tar\n{server.url}/0.tar\n")
    source = open_source(tmp_path / "list.txt")
    assert [source.describe(i).rpartition("/")[0] for i in (0, 5)] == [f"{tmp_path}/local.tar", f"{server.url}/0.tar"]


def test_held_out_clips_of_a_large_corpus_are_in_the_shards_that_training_begins_with(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", 130_000)
    with serving(shards(*[6] * 12)) as server:
        source = open_source(f"{server.url}/{{0..11}}.tar")
        training, held_out = split_source(source, 5, seed=7)
        assert (len(training), len(held_out)) == (67, 5)
        names = {held_out.describe(i) for i in range(5)}
        assert not names & {training.describe(i) for i in range(67)}
        evict_all()
        server.asked.clear()
        assert len(fixed_crops(held_out, 5, CONFIG, seed=7)) == 5
        first_window = int(130_000 // len(server.files["0.tar"]))
        assert len(server.asked) <= first_window
        fetched_before = set(server.asked)
        batches(training, steps=2, seed=7)
        assert set(server.asked[:first_window]) >= fetched_before


def test_shards_are_fetched_before_they_are_needed(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", 130_000)
    monkeypatch.setattr(remote, "WINDOW_BYTES", 130_000)
    with serving(shards(*[6] * 12)) as server:
        source = open_source(f"{server.url}/{{0..11}}.tar")
        evict_all()
        server.asked.clear()
        coming = iter(loader(source, 0, 100, CONFIG, 3))
        read = [name.rpartition("/")[0] for _ in range(4) for name in next(coming).recordings]
        deadline = time.monotonic() + 10
        while len(server.asked) < len(set(read)) + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(server.asked) >= len(set(read)) + 2
        rows = training_rows(source, CONFIG, 3)
        coming = [one for place in range(16, 72) for one in rows.segments(*rows.order()(place))]
        following = [source.remote_shard(one.recording).url for one in coming]
        wanted = [url for url in dict.fromkeys(following) if url not in read]
        assert {f"{server.url}/{path}" for path in server.asked} - set(read) <= set(wanted[:5])


def test_recordings_read_in_order_fetch_the_next_shard_and_random_crops_do_not(server, monkeypatch):
    source, asked = open_source(pattern(server)), []
    monkeypatch.setattr(remote, "fetch_soon", asked.append)
    source.read(0, RATE // 2, np.random.default_rng(0), 0.1)
    assert asked == []
    with source.opened(0):
        assert asked == [source.tars[1]]


def test_a_shard_on_its_way_is_fetched_by_one_thread(monkeypatch):
    asked, may_end, url = [], threading.Event(), "http://host/0.tar"

    def slow(url):
        asked.append(url)
        may_end.wait(10)

    monkeypatch.setattr(remote, "fetch", slow)
    for _ in range(50):
        remote.fetch_soon(url)
    may_end.set()
    assert asked.count(url) == 1


def test_a_limit_that_is_no_number_is_refused(server, monkeypatch):
    monkeypatch.setenv("BESTRQ2_SHARD_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="BESTRQ2_SHARD_CACHE_GB is 'much'; it must be a positive number of GB"):
        open_source(f"{server.url}/0.tar")


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "file"))
    with pytest.raises(UnreachableError, match=r"the cache of remote shards cannot be written .* set BESTRQ2_CACHE"):
        open_source(f"{server.url}/0.tar")


def test_what_a_killed_process_left_is_removed(server):
    url = f"{server.url}/0.tar"
    path = cached_path(url)
    path.parent.mkdir(parents=True)
    half = path.with_name(f".{path.name}.99.tmp")
    half.write_bytes(b"half")
    fetch(url)
    assert not half.exists()
    assert path.stat().st_size == len(server.files["0.tar"])


def test_a_recording_has_no_waveform_but_its_own(server):
    """A cached shard that was evicted and fetched again gives the same samples."""
    source = open_source(f"{server.url}/0.tar")
    before = [source.read(clip, RATE, np.random.default_rng(0), 0.2) for clip in range(9)]
    evict_all()
    again = open_source(f"{server.url}/0.tar")
    for number, waveform in enumerate(before):
        np.testing.assert_array_equal(again.read(number, RATE, np.random.default_rng(0), 0.2), waveform)
    assert os.listdir(cached_path("x://y").parent)
