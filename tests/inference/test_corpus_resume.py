"""Embedding and prediction survive kills at any instant, Ctrl-C and full disks, and processes share them."""

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
from bestrq2.data.parts import PartsFolder
from bestrq2.data.spans import SpanReader
from bestrq2.errors import BestRQ2Error, ConfigError

pytestmark = pytest.mark.usefixtures("small_blocks")

# Three parts, the two lists of recordings and the result are each renamed into place; the list of rejected ones and
# the result once more.
RENAMES = 8


@pytest.fixture
def data(recordings) -> str:
    """Six recordings, one of which is broken."""
    (recordings / "aaa.wav").write_bytes(b"this is no audio" * 100)
    return str(recordings)


@pytest.fixture(params=["embed", "predict"])
def run(request, data, embed, predict):
    """One of the two commands with its model and the data: run(output, **options)."""
    return partial({"embed": embed, "predict": predict}[request.param], data)


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


@pytest.mark.parametrize(
    ("renames", "before"),
    [
        pytest.param((1, 6), False),
        pytest.param(range(RENAMES), True, marks=pytest.mark.slow),
        pytest.param(range(RENAMES), False, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_instant_leaves_no_gap_and_no_double(run, rejected, tmp_path, monkeypatch, renames, before):
    whole = run(tmp_path / "whole.parquet")
    for rename in renames:
        output = tmp_path / f"{rename}.parquet"
        killed_at(monkeypatch, rename, before, partial(run, output, num_workers=rename % 2))
        assert output.exists() == (rename == RENAMES - 1 and not before)
        run(output)
        assert output.read_bytes() == whole.read_bytes()
        assert rejected(output) == rejected(whole)
    names = {f"{name}.parquet{end}" for name in ("whole", *renames) for end in ("", ".rejected.csv")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"recordings"}


def test_a_killed_csv_is_resumed_too(predict, data, tmp_path, monkeypatch):
    whole, output = predict(data, tmp_path / "whole.csv"), tmp_path / "p.csv"
    killed_at(monkeypatch, 7, True, partial(predict, data, output))  # its provenance is written, the rows are not
    assert not output.exists()
    assert predict(data, output).read_bytes() == whole.read_bytes()


def test_finished_parts_are_not_done_again(embed, data, tmp_path, monkeypatch):
    output = tmp_path / "e.parquet"
    killed_at(monkeypatch, 1, False, partial(embed, data, output))
    assert PartsFolder(Path(f"{output}.parts")).finished() == {(0, 0): (2, 0), (2, 0): (4, 0)}
    read: list[int] = []
    original = SpanReader.__call__
    monkeypatch.setattr(SpanReader, "__call__", lambda self, task: read.append(task.recording) or original(self, task))
    embed(data, output)
    assert read == [4, 5]


def test_ctrl_c_says_how_to_continue(embed, model, data, tmp_path, monkeypatch, capsys):
    original, calls = PartsFolder.write, []

    def interrupted(self, *arguments):
        original(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    output = tmp_path / "e.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", interrupted)
        assert cli.run(["embed", str(model), data, "--output", str(output), "--device", "cpu"]) == 130
    message = f"interrupted: finished parts stay in {output}.parts; run the same command again to continue"
    assert message in capsys.readouterr().err
    assert len(PartsFolder(Path(f"{output}.parts")).finished()) == 2
    assert embed(data, output).read_bytes() == embed(data, tmp_path / "whole.parquet").read_bytes()


def test_a_full_disk_is_one_sentence_and_the_run_can_continue(embed, data, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetWriter", full)
        with pytest.raises(BestRQ2Error, match="the disk is full; finished files are whole"):
            embed(data, tmp_path / "e.parquet")
    assert embed(data, tmp_path / "e.parquet").exists()


def test_one_run_at_a_time_writes_an_output(embed, data, tmp_path):
    output = tmp_path / "e.parquet"

    def refused() -> None:
        with pytest.raises(ConfigError, match=r"another process is writing to it \(pid \d+\)"):
            embed(data, output)

    with PartsFolder(Path(f"{output}.parts")).held(0):
        assert in_child(refused) == 0


@pytest.mark.parametrize("order", [(3, 1, 0, 2), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)])
def test_processes_share_the_work_and_the_last_one_joins(run, tmp_path, order):
    """Of four processes one has nothing to do, and may begin after everything is done."""
    whole, output = run(tmp_path / "whole.parquet"), tmp_path / "e.parquet"
    for rank in order:
        assert not output.exists() or rank == 3
        assert in_child(partial(run, output), RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank)) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not Path(f"{output}.parts").exists()


def test_another_number_of_processes_continues(embed, data, tmp_path):
    whole, output = embed(data, tmp_path / "whole.parquet"), tmp_path / "e.parquet"
    assert in_child(partial(embed, data, output), RANK="1", WORLD_SIZE="3") == 0
    assert len(PartsFolder(Path(f"{output}.parts")).finished()) == 1
    assert in_child(partial(embed, data, output), RANK="0", WORLD_SIZE="2") == 0
    embed(data, output)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_torchrun_loses_a_process_and_continues(embed, model, data, tmp_path):
    whole, output = embed(data, tmp_path / "whole.parquet"), tmp_path / "e.parquet"
    script = tmp_path / "embed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from bestrq2 import cli\n"
        "from bestrq2.data import parts\n"
        "parts.BLOCK = 2\n"
        "original = parts.PartsFolder.write\n"
        "victim = sys.argv.pop(1)\n"
        "def write(self, *arguments):\n"
        "    if os.environ['RANK'] == victim:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    original(self, *arguments)\n"
        "parts.PartsFolder.write = write\n"
        "cli.main()\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", str(script)]
    arguments = ["embed", str(model), data, "--output", str(output), "--device", "cpu", "--num_workers", "1"]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=120)
    failed = run([sys.executable, *torchrun, "1", *arguments])
    assert failed.returncode != 0
    assert re.search(r"Signal 9|exitcode\s*: -9", failed.stderr)
    assert not output.exists()
    finished = run([sys.executable, *torchrun, "none", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("5 recordings embedded, 1 rejected") == 1
    assert output.read_bytes() == whole.read_bytes()
    assert bestrq2.__version__ == pq.read_schema(output).metadata[b"bestrq2"].decode()
