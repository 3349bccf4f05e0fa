"""Streams of remote shards: what is said of them before a run, and what is held out."""

from __future__ import annotations

import socket
from urllib.error import URLError

import numpy as np
import pytest
from shard_server import RATE, clip, serving, tar_of
from streams import HASTE, MEMBER, batches, stream

from bestrq2.data import transfer
from bestrq2.data.loader import fixed_crops, split_source
from bestrq2.data.open_source import open_recordings, open_source
from bestrq2.data.remote import open_stream
from bestrq2.data.transfer import Patience, Shard
from bestrq2.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("small_windows")


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
    training, held_out = split_source(source, 5, seed=1)
    assert sorted(training.urls + held_out.urls) == sorted(source.urls)
    assert len(held_out.urls) == 1
    assert {split_source(source, 5, seed)[1].urls for seed in range(9)} != {held_out.urls}
    assert split_source(source, 0, seed=1) == (source, None)
    assert split_source(stream(server, 1), 5, seed=1)[1] is None


def test_damage_of_the_shard_for_validation_is_listed():
    with serving({"0.tar": tar_of({f"{i}.wav": clip(i) for i in range(4)})[: 2 * MEMBER]}) as server:
        source, rejected = stream(server, 1), []
        assert len(fixed_crops(source, 9, seed=0, sampling_rate=RATE, max_seconds=0.2, rejected=rejected)) == 2
    assert rejected == [(source.urls[0], "ends early, after 2 whole recordings")]


def test_validation_crops_are_the_first_usable_ones_and_fixed():
    members = {f"{i}.wav": clip(i) for i in range(5)} | {"1.wav": b"no audio" * 99}
    with serving({"0.tar": tar_of(members)}) as server:
        source, rejected = stream(server, 1), []
        crops = fixed_crops(source, 3, seed=0, sampling_rate=RATE, max_seconds=0.2, rejected=rejected)
        again = fixed_crops(source, 99, seed=0, sampling_rate=RATE, max_seconds=0.2)
    assert [len(crop) for crop in crops] == [1600] * 3
    assert [path.rpartition("/")[2] for path, _ in rejected] == ["1.wav"]
    assert len(again) == 4
    for first, second in zip(crops, again, strict=False):
        np.testing.assert_array_equal(first, second)
