"""Signals: a run stops after the step with its state saved, or at once where there is nothing to save."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import at_step, flags, recording, same_runs, small_pretrain

import bestrq2
from bestrq2.errors import StoppedBySignal
from bestrq2.train.checkpoints import CheckpointStore
from bestrq2.train.stopping import StopRequest

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


@pytest.mark.parametrize("number", [number for number, _ in SIGNALS])
def test_a_signal_ends_after_the_step_with_whole_files_and_the_run_can_be_resumed(
    number: signal.Signals,
    tmp_path: Path,
    recordings: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(number))
        with pytest.raises(StoppedBySignal, match="stopped after step 3") as caught:
            small_pretrain(recordings, tmp_path / "run")
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step-00000003.ckpt"
    assert bestrq2.load(tmp_path / "run").embed(recording(1, 2.0)).clip.shape == (1, 32)
    assert same_runs(undisturbed(), small_pretrain(recordings, tmp_path / "run", resume=True))


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    stop = StopRequest()
    with stop.listening(), stop.between_steps():
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed()
        with pytest.raises(StoppedBySignal, match="at once"):
            signal.raise_signal(signal.SIGINT)


def test_before_the_first_step_a_signal_ends_the_run_at_once():
    stop = StopRequest()
    with stop.listening(), pytest.raises(StoppedBySignal) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signal == signal.SIGTERM


def test_a_signal_whose_exception_was_lost_in_a_destructor_stops_the_run_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
):
    class Destructed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    stop = StopRequest()
    with stop.listening():
        monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)
        del [Destructed()][0]
        with pytest.raises(StoppedBySignal, match="before the first step"), stop.between_steps():
            pass


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("after", ["start", "step"])
def test_the_command_ends_with_the_code_of_the_signal_and_one_line(
    number: signal.Signals,
    code: int,
    after: str,
    tmp_path: Path,
    recordings: Path,
    start_cli: Callable[..., Any],
):
    output = tmp_path / "run"
    words = ["pretrain", "--data", str(recordings), "--output", str(output), *flags(steps=100_000)]
    child = start_cli([*words, "--loader.num_workers", "1"])
    awaited = output / {"start": "config.yaml", "step": "checkpoints/last.ckpt"}[after]
    child.wait_until(awaited.exists)
    os.killpg(child.pid, number)  # as schedulers do: the workers that read data receive it, too
    finished = child.finish()
    assert finished.returncode == code
    assert "Traceback" not in finished.stderr
    assert finished.stderr.strip().splitlines()[-1].startswith("bestrq2 pretrain: interrupted")
    assert not list(tmp_path.rglob("*.tmp"))
    if after == "step":
        assert finished.stderr.count(f"{number.name}: stopping after this step") == 1
        step, path = CheckpointStore(output / "checkpoints").newest()
        assert path is not None
        assert f"stopped after step {step} of" in finished.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_sigterm_at_any_instant_ends_an_unfinished_run_with_143(
    tmp_path: Path, recordings: Path, start_cli: Callable[..., Any]
):
    for number in range(40):
        words = ["pretrain", "--data", str(recordings), "--output", str(tmp_path / f"run{number}")]
        child = start_cli([*words, *flags(steps=100_000), "--loader.num_workers", "1"])
        time.sleep(0.05 * number)
        child.send_signal(signal.SIGTERM)
        finished = child.finish()
        assert finished.returncode in (143, -signal.SIGTERM), finished.stderr
        assert "Traceback" not in finished.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_workers_never_outlive_a_killed_main_process(
    kills: int, tmp_path: Path, recordings: Path, start_cli: Callable[..., Any]
):
    for number in range(kills):
        output = tmp_path / f"run{number}"
        words = ["pretrain", "--data", str(recordings), "--output", str(output), *flags(steps=100_000)]
        child = start_cli([*words, "--loader.num_workers", "2"])
        workers = child.wait_until(lambda child=child: _children(child.pid))
        child.wait_until((output / "checkpoints" / "last.ckpt").exists)
        workers = _children(child.pid) or workers
        child.send_signal(signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + 5
        while any(_running(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
