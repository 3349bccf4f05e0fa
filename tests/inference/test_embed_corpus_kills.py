"""Embedding a corpus survives kills at any instant, Ctrl-C, full disks, and processes that share it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import bestrq2
from bestrq2 import cli
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.inference.corpus import reading
from bestrq2.inference.corpus.command import embed_corpus
from bestrq2.inference.corpus.parts import PartsFolder

pytestmark = pytest.mark.usefixtures("small_blocks")

# Three parts, the list of rejected recordings and the result are each renamed into place, the last two once more.
RENAMES = 7


@pytest.fixture
def corpus(recordings) -> Path:
    (recordings / "aaa.wav").write_bytes(b"this is no audio" * 100)
    return recordings


@pytest.fixture
def embed(model, corpus):
    return partial(embed_corpus, str(model), str(corpus), device="cpu")


def in_child(action, **environment: str) -> int:
    """Do something in a forked process; its exit code."""

    def act() -> None:
        torch.set_num_threads(1)
        os.environ.update(environment)
        action()

    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def killed_at(monkeypatch, rename: int, before: bool, action) -> None:
    """Do something in a process that is killed right before or after it renames a file for that time."""
    original, count = Path.replace, iter(range(1000))

    def replace(self, target):
        last = next(count) == rename
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert in_child(action) == -signal.SIGKILL


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_at_any_instant_leaves_no_gap_and_no_double(embed, rejected, tmp_path, monkeypatch, before):
    whole = embed(output=tmp_path / "whole.parquet")
    for rename in range(RENAMES):
        output = tmp_path / f"{rename}.parquet"
        killed_at(monkeypatch, rename, before, partial(embed, output=output, num_workers=rename % 2))
        assert output.exists() == (rename == RENAMES - 1 and not before)
        embed(output=output)
        assert output.read_bytes() == whole.read_bytes()
        assert rejected(output) == rejected(whole)
    names = {f"{name}.parquet{end}" for name in ("whole", *range(RENAMES)) for end in ("", ".rejected.csv")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"recordings"}


def test_what_is_done_is_not_done_again(embed, tmp_path, monkeypatch):
    output = tmp_path / "e.parquet"
    killed_at(monkeypatch, 1, False, partial(embed, output=output))
    done = sorted(path.name for path in PartsFolder(output).path.glob("part*"))
    assert done == [f"part-000000-{start:012d}-{start + 2:012d}.parquet" for start in (0, 2)]
    decoded = []
    original = reading.decode_span
    monkeypatch.setattr(
        reading, "decode_span", lambda source, rate, task: decoded.append(task.number) or original(source, rate, task)
    )
    embed(output=output, num_workers=0)
    assert decoded == [4, 5]


def test_ctrl_c_says_how_to_continue(embed, model, corpus, tmp_path, monkeypatch, capsys):
    original, calls = PartsFolder.write, []

    def interrupted(self, *arguments):
        original(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    output = tmp_path / "e.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", interrupted)
        assert cli.run(["embed", str(model), str(corpus), "--output", str(output), "--device", "cpu"]) == 130
    assert f"interrupted: what is done stays in {output}.parts; run the same command again" in capsys.readouterr().err
    assert len(list(PartsFolder(output).path.iterdir())) == 2
    assert embed(output=output).read_bytes() == embed(output=tmp_path / "whole.parquet").read_bytes()


def test_a_full_disk_is_one_sentence_and_goes_on_later(embed, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetWriter", full)
        with pytest.raises(BestRQ2Error, match="the disk is full; what was written before is whole"):
            embed(output=tmp_path / "e.parquet")
    embed(output=tmp_path / "e.parquet")


def test_a_worker_that_dies_ends_the_run_with_a_sentence(embed, tmp_path, monkeypatch):
    original = reading.decode_span

    def dying(source, rate, task):
        if task.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(source, rate, task)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "decode_span", dying)
        with pytest.raises(BestRQ2Error, match=r"a worker process died \(SIGKILL\) while it read .*clip4.wav"):
            embed(output=tmp_path / "e.parquet", num_workers=1)
    assert embed(output=tmp_path / "e.parquet").exists()


def test_one_run_at_a_time_writes_an_output(embed, tmp_path):
    output = tmp_path / "e.parquet"
    with PartsFolder(output).held(0):
        assert in_child(partial(refused, partial(embed, output=output))) == 0


def refused(action) -> None:
    with pytest.raises(ConfigError, match=r"another process is writing to it \(pid \d+\)"):
        action()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_processes_share_the_work_and_the_last_one_joins(embed, tmp_path, order):
    """Of four processes one has nothing to do, and may begin after all is over."""
    whole, output = embed(output=tmp_path / "whole.parquet"), tmp_path / "e.parquet"
    for rank in order:
        assert not output.exists() or rank == 3
        assert in_child(partial(embed, output=output), RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank)) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not PartsFolder(output).path.exists()


def test_another_number_of_processes_goes_on(embed, tmp_path):
    whole, output = embed(output=tmp_path / "whole.parquet"), tmp_path / "e.parquet"
    assert in_child(partial(embed, output=output), RANK="1", WORLD_SIZE="3") == 0
    assert len(list(PartsFolder(output).path.glob("part*"))) == 1
    assert in_child(partial(embed, output=output), RANK="0", WORLD_SIZE="2") == 0
    embed(output=output)
    assert output.read_bytes() == whole.read_bytes()


def test_impossible_ranks_are_refused(embed, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"RANK=2 WORLD_SIZE=2: expected numbers, RANK < WORLD_SIZE"):
        embed(output=tmp_path / "e.parquet")


@pytest.mark.slow
def test_torchrun_loses_a_process_and_goes_on(embed, model, corpus, tmp_path):
    whole, output = embed(output=tmp_path / "whole.parquet"), tmp_path / "e.parquet"
    script = tmp_path / "embed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from bestrq2 import cli\n"
        "from bestrq2.inference.corpus import parts, sharing, work\n"
        "sharing.BLOCK = work.BLOCK = 2\n"
        "original = parts.PartsFolder.write\n"
        "victim = sys.argv.pop(1)\n"
        "def write(self, *arguments):\n"
        "    if os.environ['RANK'] == victim:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    original(self, *arguments)\n"
        "parts.PartsFolder.write = write\n"
        "cli.main()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        str(script),
    ]
    arguments = ["embed", str(model), str(corpus), "--output", str(output), "--device", "cpu", "--num_workers", "1"]
    failed = subprocess.run([*command, "1", *arguments], capture_output=True, text=True, timeout=120)
    assert failed.returncode != 0
    assert re.search(r"Signal 9|exitcode\s*: -9", failed.stderr)
    assert not output.exists()
    finished = subprocess.run([*command, "none", *arguments], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("5 recordings embedded, 1 rejected") == 1
    assert output.read_bytes() == whole.read_bytes()
    assert bestrq2.__version__ == pq.read_schema(output).metadata[b"bestrq2"].decode()
