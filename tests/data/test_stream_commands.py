"""Streams of remote shards: what other programs fetch."""

from __future__ import annotations

import os
from multiprocessing.connection import wait

import pytest
import torch
from shard_server import clip, tar_of
from streams import HASTE, MEMBER, batches, names

from bestrq2.data.lanes import UnreachableError
from bestrq2.data.open_source import open_source
from bestrq2.data.remote import StreamSource
from bestrq2.data.transfer import Patience, Shard

pytestmark = pytest.mark.usefixtures("small_windows")


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
