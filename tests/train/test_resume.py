"""A run that was stopped, killed or damaged ends where an uninterrupted one does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from small_run import (
    at_step,
    killed_copy,
    metrics,
    recording,
    same_runs,
    small_pretrain,
    write_recordings,
)

import bestrq2
from bestrq2 import cli
from bestrq2.errors import BestRQ2Error, CheckpointError, ConfigError, StoppedBySignal
from bestrq2.train import checkpoints
from bestrq2.train.checkpoints import CheckpointStore
from bestrq2.train.optimizer import learning_rate_factor
from bestrq2.train.settings import OptimizerConfig


@pytest.mark.parametrize(
    "trainer",
    [{}, {"accumulate_grad_batches": 2}, {"ema": True}, {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}],
    ids=["plain", "accumulated", "averaged", "clipped-bf16"],
)
def test_a_killed_run_resumes_to_identical_weights_and_metrics(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, trainer: dict[str, object]
):
    whole = small_pretrain(recordings, tmp_path / "whole", trainer=trainer)
    killed = killed_copy(tmp_path, recordings, monkeypatch, trainer=trainer)
    assert same_runs(whole, small_pretrain(recordings, killed, trainer=trainer, resume=True))


# Forks children that pretrain, and kills each after the delay read from standard input: a fork takes milliseconds where
# a new interpreter takes seconds, and the parent has started no threads that a fork would lose.
FORK_AND_KILL = """
import os, signal, sys, time
from small_run import small_pretrain
trainer = {"max_steps": 8, "val_every_n_steps": 2}
for line in sys.stdin:
    delay, output, source, workers = line.split()
    started, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            small_pretrain(source, output, trainer=trainer, loader={"num_workers": int(workers)}, resume=True)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    code = None
    while code is None and time.monotonic() < started + float(delay):
        pid, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.002)
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, time.monotonic() - started, flush=True)
"""


@pytest.fixture
def killer():
    """Runs a small pretraining for at most so many seconds; returns its exit code (-9: killed) and how long it took."""
    server = subprocess.Popen(
        [sys.executable, "-c", FORK_AND_KILL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(seconds: float, output: Path, source: Path, workers: int = 0) -> tuple[int, float]:
        server.stdin.write(f"{seconds} {output} {source} {workers}\n")
        server.stdin.flush()
        code, taken = server.stdout.readline().split()
        return int(code), float(taken)

    yield run
    server.stdin.close()
    server.wait(timeout=60)
    server.stdout.close()
    server.stderr.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of several formats and rates, and what is none, packed by `bestrq2 prepare`."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(12):
        clip, rate, kind = (
            recording(number, 1 + number % 4),
            (16_000, 44_100, 8_000)[number % 3],
            ("wav", "flac", "mp3"),
        )
        stereo = np.stack([clip, 0.5 * clip], axis=1)
        soundfile.write(folder / f"{number:02d}.{kind[number % 3]}", stereo if number % 2 else clip, rate)
    (folder / "broken.flac").write_bytes((folder / "01.flac").read_bytes()[:5000])
    (folder / "text.mp3").write_text("no audio")
    output = tmp_path_factory.mktemp("prepared") / "shards"
    assert cli.run(["prepare", str(folder), str(output), "--shard_size", "0.4", "--num_workers", "1"]) == 0
    assert len(list(output.glob("*.tar"))) > 1
    return output


@pytest.mark.slow
def test_a_run_on_shards_killed_at_random_instants_ends_as_if_nothing_had_happened(
    tmp_path: Path, shards: Path, killer
):
    code, seconds = killer(600, tmp_path / "whole", shards)
    assert code == 0
    rng = np.random.default_rng(0)
    kills, runs = 0, 0
    while kills < 20 or runs < 3:
        run = tmp_path / f"killed{runs}"
        code, wait = -9, 0.0
        while code == -9:
            # Now and then longer than the whole run, so that it also gets on to its end.
            wait = float(rng.uniform(0.05, 1.2)) * seconds
            code, _ = killer(wait, run, shards, workers=runs % 2)
            kills += code == -9
        assert code == 0
        assert same_runs(tmp_path / "whole", run), f"run {runs}, after {kills} kills"
        hidden = [path for path in run.rglob("*") if path.name.startswith(".")]
        assert not hidden
        runs += 1


KILL_POINTS = ["os.fsync", "os.replace", "pathlib.Path.replace", "pathlib.Path.unlink", "pathlib.Path.write_bytes"]


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_before_any_file_operation_costs_nothing(
    point: str, tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = small_pretrain(recordings, tmp_path / "whole", trainer={"max_steps": 4})
    module, _, name = point.rpartition(".")
    owner = {"os": os, "pathlib.Path": Path}[module]
    original = getattr(owner, name)
    calls = iter(range(10**6))

    class Killed(BaseException):
        """Passes through everything, as the death of a process does."""

    def run_until(limit: int | None) -> None:
        def counting(*arguments, **keywords):
            if limit is not None and next(calls) == limit:
                raise Killed
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counting)
            small_pretrain(recordings, tmp_path / "killed", trainer={"max_steps": 4}, resume=True)

    for number in range(2, 400, 7):
        calls = iter(range(10**6))
        try:
            run_until(number)
        except Killed:
            continue
        break
    run_until(None)
    assert same_runs(whole, tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_after_the_step_with_whole_files_and_the_run_can_be_resumed(
    number: signal.Signals, tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = small_pretrain(recordings, tmp_path / "whole")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(number))
        with pytest.raises(StoppedBySignal, match="stopped after step 3") as caught:
            small_pretrain(recordings, tmp_path / "run")
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step-00000003.ckpt"
    assert bestrq2.load(tmp_path / "run").embed(recording(1, 2.0)).clip.shape == (1, 32)
    assert same_runs(whole, small_pretrain(recordings, tmp_path / "run", resume=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_preemption_of_the_command_saves_and_tells_by_its_exit_code(
    number: signal.Signals, code: int, tmp_path: Path, recordings: Path
):
    from small_run import flags

    output = tmp_path / "run"
    words = ["pretrain", "--data", str(recordings), "--output", str(output), *flags(steps=100_000)]
    command = [sys.executable, "-c", "from bestrq2.cli import main; main()", *words, "--loader.num_workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 90
    while process.poll() is None and not (output / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as schedulers do: the workers that read data hear it, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert errors.count(f"{number.name}: stopping after this step") == 1
    step, path = CheckpointStore(output / "checkpoints").newest()
    assert path is not None
    assert f"stopped after step {step} of" in errors.strip().splitlines()[-1]


def test_resuming_with_another_number_of_workers_changes_nothing(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = small_pretrain(recordings, tmp_path / "whole")
    killed = killed_copy(tmp_path, recordings, monkeypatch)
    assert same_runs(whole, small_pretrain(recordings, killed, loader={"num_workers": 2}, resume=True))


def test_other_settings_are_refused_and_every_difference_is_named(finished_run: Path, recordings: Path):
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.0015 and is now 0.5") as caught:
        small_pretrain(recordings, finished_run, resume=True, optimizer={"lr": 0.5}, seed=3)
    assert "seed was 0 and is now 3" in str(caught.value)
    with pytest.raises(ConfigError, match=r"trainer\.max_steps was 6 and is now 4"):
        small_pretrain(recordings, finished_run, resume=True, trainer={"max_steps": 4})


def test_other_data_is_refused(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 2})
    fewer = write_recordings(tmp_path / "fewer", 5)
    with pytest.raises(ConfigError, match="data held 12 recordings and now holds 5"):
        small_pretrain(fewer, run, resume=True, trainer={"max_steps": 4})


def test_an_extended_run_follows_the_learning_rate_of_the_longer_one(
    tmp_path: Path, recordings: Path, caplog: pytest.LogCaptureFixture
):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 4})
    with caplog.at_level("INFO"):
        small_pretrain(recordings, run, resume=True, trainer={"max_steps": 8})
    assert "extended from 4 to 8 steps; the learning rate follows the curve of the longer run" in caplog.text
    rates = {int(row["step"]): float(row["train/learning_rate"]) for row in metrics(run) if row["train/learning_rate"]}
    settings = OptimizerConfig(lr=1.5e-3)
    for step in (6, 8):
        expected = settings.lr * learning_rate_factor(step - 1, 8, settings)
        assert rates[step] == pytest.approx(expected, rel=1e-12)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 8
    # A resumed extension is that extension: nothing depends on where the interruption fell.
    assert sorted(rates) == [2, 4, 6, 8]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    whole = small_pretrain(recordings, tmp_path / "whole")
    killed = killed_copy(tmp_path, recordings, monkeypatch)
    newest = killed / "checkpoints" / "step-00000004.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    newest.write_bytes(content)
    small_pretrain(recordings, killed, resume=True)
    assert "step-00000004.ckpt: damaged (its checksum differs); falling back to the state of step 3" in caplog.text
    assert same_runs(whole, killed)


def test_if_all_checkpoints_are_damaged_the_run_says_so(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 2})
    for path in (run / "checkpoints").glob("step-*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000002\.ckpt: damaged \(its checksum differs\); delete"):
        small_pretrain(recordings, run, resume=True, trainer={"max_steps": 2})


def test_the_last_the_best_and_every_so_manieth_checkpoint_are_kept(tmp_path: Path, recordings: Path):
    trainer = {"max_steps": 12, "checkpoint_every_n_steps": 1, "keep_every_n_steps": 5, "keep_last": 3}
    run = small_pretrain(recordings, tmp_path / "run", trainer=trainer)
    best = (run / "checkpoints" / "best.ckpt").resolve().name
    steps = set(CheckpointStore(run / "checkpoints").steps())
    assert steps == {5, 10, 11, 12, int(best[5:13])}
    losses = {int(row["step"]): float(row["validation/loss"]) for row in metrics(run) if row["validation/loss"]}
    assert min(losses, key=losses.__getitem__) == int(best[5:13])


def test_a_full_disk_while_saving_costs_only_that_checkpoint(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    original = checkpoints.whole_file

    def full(path: Path):
        if path.name == "step-00000004.ckpt":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path)

    monkeypatch.setattr(checkpoints, "whole_file", full)
    run = small_pretrain(recordings, tmp_path / "run")
    assert "the state of step 4 could not be saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert CheckpointStore(run / "checkpoints").steps() == [3, 6]


def test_a_disk_that_is_full_at_the_end_is_an_error_that_can_be_resumed_from(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = small_pretrain(recordings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        original = checkpoints.whole_file

        def full(path: Path):
            if path.name == "step-00000006.ckpt":
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(path)

        patch.setattr(checkpoints, "whole_file", full)
        with pytest.raises(BestRQ2Error, match=r"the disk is full: the last state could not be saved .* --resume"):
            small_pretrain(recordings, tmp_path / "run")
    assert same_runs(whole, small_pretrain(recordings, tmp_path / "run", resume=True))


def test_a_loader_process_that_dies_is_one_sentence_and_the_run_can_be_resumed(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill_workers() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    changes = {"loader": {"num_workers": 1}, "trainer": {"max_steps": 40}}
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill_workers)
        with pytest.raises(BestRQ2Error, match=r"a process that reads data ended unexpectedly .* --resume"):
            small_pretrain(recordings, tmp_path / "run", **changes)
    whole = small_pretrain(recordings, tmp_path / "whole", **changes)
    assert same_runs(whole, small_pretrain(recordings, tmp_path / "run", **changes, resume=True))


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    messages = []

    def second() -> None:
        command = "from small_run import small_pretrain; small_pretrain({!r}, {!r}, resume=True)"
        words = [sys.executable, "-c", command.format(str(recordings), str(tmp_path / "run"))]
        result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        messages.append(result.stderr)

    with monkeypatch.context() as patch:
        at_step(patch, 3, second)
        small_pretrain(recordings, tmp_path / "run")
    assert f"another process is writing to it (pid {os.getpid()})" in messages[0]


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    whole = small_pretrain(recordings, tmp_path / "whole")
    killed = killed_copy(tmp_path, recordings, monkeypatch)
    for number, path in enumerate(sorted(killed.rglob("*"))):  # every file from another, later, day
        os.utime(path, (4e9 - number, 4e9 - number), follow_symlinks=False)
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert same_runs(whole, small_pretrain(recordings, killed, resume=True))


def test_a_finished_run_is_left_alone(finished_run: Path, recordings: Path):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    small_pretrain(recordings, finished_run, resume=True)
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


def test_a_checkpoint_describes_itself_and_loads_without_pickled_objects(finished_run: Path):
    checkpoint = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["bestrq2"]["version"] == bestrq2.__version__
    assert json.loads(json.dumps(checkpoint["bestrq2"]["config"])) == yaml.safe_load(
        (finished_run / "config.yaml").read_text()
    )
    assert checkpoint["global_step"] == 6


def test_a_run_of_a_version_that_knew_fewer_settings_can_be_resumed(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("encoder_type", "mask_fill", "masks_per_clip", "mask_span_probability"):
        del settings["model"][name]
    del settings["logging"], settings["trainer"]["keep_last"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    small_pretrain(recordings, run, trainer={"max_steps": 8}, resume=True)
    assert metrics(run)[-1]["step"] == "8"
    with pytest.raises(ConfigError, match=r"masks_per_clip was 1 and is now 2"):
        small_pretrain(recordings, run, model={"masks_per_clip": 2}, trainer={"max_steps": 10}, resume=True)
