"""A run that was killed, damaged or extended ends where an uninterrupted one does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from small_run import (
    CONFORMER,
    at_step,
    killed_copy,
    metrics,
    recording,
    same_runs,
    small_pretrain,
    weights,
    write_recordings,
)

import bestrq2
from bestrq2 import cli
from bestrq2.errors import BestRQ2Error, CheckpointError, ConfigError
from bestrq2.train import checkpoints, loop
from bestrq2.train.checkpoints import CheckpointStore
from bestrq2.train.optimizer import learning_rate_factor
from bestrq2.train.settings import OptimizerConfig

TESTS = Path(__file__).parent
Undisturbed = Callable[..., Path]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer": {"accumulate_grad_batches": 2, "ema": True}},
        {"trainer": {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}, "optimizer": {"algorithm": "muon"}},
        {"model": CONFORMER},  # noise and dropout
    ],
    ids=["plain", "accumulated-averaged", "clipped-bf16-muon", "conformer"],
)
def test_a_killed_run_resumes_to_identical_weights_and_metrics(
    tmp_path: Path,
    recordings: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, Any]],
):
    killed = killed_copy(tmp_path, recordings, monkeypatch, **changes)
    resumed = small_pretrain(recordings, killed, resume=True, **changes)
    assert same_runs(undisturbed(**changes), resumed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of several formats and rates, and files that are no audio, packed by `bestrq2 prepare`."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(12):
        rate, kind = (16_000, 44_100, 8_000)[number % 3], ("wav", "flac", "mp3")[number % 3]
        clip = recording(number, 1 + number % 4)
        stereo = np.stack([clip, 0.5 * clip], axis=1)
        soundfile.write(folder / f"{number:02d}.{kind}", stereo if number % 2 else clip, rate)
    (folder / "broken.flac").write_bytes((folder / "01.flac").read_bytes()[:5000])
    (folder / "text.mp3").write_text("no audio")
    output = tmp_path_factory.mktemp("prepared") / "shards"
    assert cli.run(["prepare", str(folder), str(output), "--shard_size", "0.4", "--num_workers", "1"]) == 0
    assert len(list(output.glob("*.tar"))) > 1
    return output


TRAIN_ON_SHARDS = """
import sys
from small_run import small_pretrain
output, source, workers = sys.argv[1:]
small_pretrain(source, output, trainer={"max_steps": 8, "val_every_n_steps": 2}, loader={"num_workers": int(workers)},
               resume=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_on_shards_killed_at_random_instants_ends_as_if_nothing_had_happened(
    kills: int, tmp_path: Path, shards: Path, start_python: Callable[..., Any]
):
    def train(run: Path, workers: int, seconds: float) -> int:
        words = ["-c", TRAIN_ON_SHARDS, str(run), str(shards), str(workers)]
        child = start_python(words, env={"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])})
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            return child.wait()

    began = time.monotonic()
    assert train(tmp_path / "whole", 0, 120) == 0
    seconds = time.monotonic() - began
    rng, killed, runs = np.random.default_rng(0), 0, 0
    while killed < kills:
        run, code = tmp_path / f"killed{runs}", -9
        while code == -9:
            # sometimes longer than the whole run, so that it also gets to its end
            limit = 120 if killed >= kills else float(rng.uniform(0.05, 1.2)) * seconds
            code = train(run, runs % 2, limit)
            killed += code == -9
        assert code == 0
        assert same_runs(tmp_path / "whole", run), f"run {runs}, after {killed} kills"
        # a run that was killed after its last step is left alone, with its lock, which the kernel has released
        assert not [path for path in run.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
        runs += 1


KILL_POINTS = ["os.fsync", "os.replace", "pathlib.Path.replace", "pathlib.Path.unlink", "pathlib.Path.write_bytes"]


@pytest.mark.parametrize(
    ("point", "spacing"),
    [("pathlib.Path.replace", 40), *(pytest.param(one, 7, marks=pytest.mark.slow) for one in KILL_POINTS)],
)
def test_a_kill_before_any_file_operation_costs_nothing(
    point: str,
    spacing: int,
    tmp_path: Path,
    recordings: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
):
    module, _, name = point.rpartition(".")
    owner: Any = {"os": os, "pathlib.Path": Path}[module]
    original = getattr(owner, name)

    class Killed(BaseException):
        """Passes through everything, as the death of a process does."""

    def run_until(limit: int | None) -> bool:
        """Whether the run got to its end before so many calls."""
        calls = iter(range(10**6))

        def counting(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == limit:
                raise Killed
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counting)
            try:
                small_pretrain(recordings, tmp_path / "killed", trainer={"max_steps": 4}, resume=True)
            except Killed:
                return False
        return True

    if not any(run_until(number) for number in range(2, 400, spacing)):
        run_until(None)
    assert same_runs(undisturbed(trainer={"max_steps": 4}), tmp_path / "killed")


def test_another_number_of_workers_and_a_clock_that_goes_backwards_change_nothing(
    tmp_path: Path, recordings: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
):
    killed = killed_copy(tmp_path, recordings, monkeypatch)
    for number, path in enumerate(sorted(killed.rglob("*"))):  # every file from another, later, day
        os.utime(path, (4e9 - number, 4e9 - number), follow_symlinks=False)
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert same_runs(undisturbed(), small_pretrain(recordings, killed, loader={"num_workers": 2}, resume=True))


def test_other_settings_and_other_data_are_refused_and_every_difference_is_named(
    tmp_path: Path, finished_run: Path, recordings: Path
):
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.0015 and is now 0.5") as caught:
        small_pretrain(recordings, finished_run, resume=True, optimizer={"lr": 0.5}, seed=3)
    assert "seed was 0 and is now 3" in str(caught.value)
    with pytest.raises(ConfigError, match=r"trainer\.max_steps was 6 and is now 4"):
        small_pretrain(recordings, finished_run, resume=True, trainer={"max_steps": 4})
    fewer = write_recordings(tmp_path / "fewer", 5)
    with pytest.raises(ConfigError, match="its data held 12 recordings and now holds 5"):
        small_pretrain(fewer, finished_run, resume=True, trainer={"max_steps": 8})


def test_an_extended_run_follows_the_learning_rate_of_the_longer_one(
    tmp_path: Path, recordings: Path, caplog: pytest.LogCaptureFixture
):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 4})
    with caplog.at_level("INFO"):
        bestrq2.pretrain(output=run, resume=True, trainer={"max_steps": 8})
    assert "extended from 4 to 8 steps; the learning rate follows the curve of the longer run" in caplog.text
    rates = {int(row["step"]): float(row["train/learning_rate"]) for row in metrics(run) if row["train/learning_rate"]}
    settings = OptimizerConfig(lr=1.5e-3)
    for step in (6, 8):
        expected = settings.lr * learning_rate_factor(step - 1, 8, settings)
        assert rates[step] == pytest.approx(expected, rel=1e-12)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 8
    assert sorted(rates) == [2, 4, 6, 8]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path,
    recordings: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    killed = killed_copy(tmp_path, recordings, monkeypatch)
    newest = killed / "checkpoints" / "step-00000004.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    newest.write_bytes(content)
    small_pretrain(recordings, killed, resume=True)
    assert "step-00000004.ckpt: damaged (its checksum differs); falling back to the state of step 3" in caplog.text
    assert same_runs(undisturbed(), killed)


def test_if_all_checkpoints_are_damaged_the_run_says_so(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 2})
    for path in (run / "checkpoints").glob("step-*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000002\.ckpt: damaged \(its checksum differs\); delete"):
        small_pretrain(recordings, run, resume=True, trainer={"max_steps": 2})


def test_last_best_and_every_nth_checkpoint_are_kept(tmp_path: Path, recordings: Path):
    trainer = {"max_steps": 12, "checkpoint_every_n_steps": 1, "keep_every_n_steps": 5, "keep_last": 3}
    run = small_pretrain(recordings, tmp_path / "run", trainer=trainer)
    best = (run / "checkpoints" / "best.ckpt").resolve().name
    steps = set(CheckpointStore(run / "checkpoints").steps())
    assert steps == {5, 10, 11, 12, int(best[5:13])}
    losses = {int(row["step"]): float(row["validation/loss"]) for row in metrics(run) if row["validation/loss"]}
    assert min(losses, key=losses.__getitem__) == int(best[5:13])


def fill_disk(patch: pytest.MonkeyPatch, file: str) -> None:
    """Let a checkpoint of that name find the disk full."""
    original = checkpoints.whole_file

    def full(path: Path) -> Any:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path)

    patch.setattr(checkpoints, "whole_file", full)


def test_a_full_disk_costs_one_checkpoint_and_at_the_end_is_an_error_that_can_be_resumed_from(
    tmp_path: Path,
    recordings: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    with monkeypatch.context() as patch:
        fill_disk(patch, "step-00000004.ckpt")
        run = small_pretrain(recordings, tmp_path / "run")
    assert "the state of step 4 could not be saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert CheckpointStore(run / "checkpoints").steps() == [3, 6]
    with monkeypatch.context() as patch:
        fill_disk(patch, "step-00000006.ckpt")
        with pytest.raises(BestRQ2Error, match=r"the disk is full: the last state could not be saved .* --resume"):
            small_pretrain(recordings, tmp_path / "other")
    assert same_runs(undisturbed(), small_pretrain(recordings, tmp_path / "other", resume=True))


def test_a_disk_that_is_full_when_the_last_model_is_written_is_an_error_that_can_be_resumed_from(
    tmp_path: Path, recordings: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
):
    def full(folder: Path, step: int) -> None:
        if step == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_exported_step", full)
        with pytest.raises(BestRQ2Error, match=r"the disk is full: .*model.* --resume"):
            small_pretrain(recordings, run)
    assert max(CheckpointStore(run / "checkpoints").steps()) < 6  # no state without its model
    assert same_runs(undisturbed(), small_pretrain(recordings, run, resume=True))


def test_a_loader_process_that_dies_is_one_sentence_and_the_run_can_be_resumed(
    tmp_path: Path, recordings: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
):
    def kill_workers() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    trainer = {"max_steps": 16}
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill_workers)
        with pytest.raises(BestRQ2Error, match=r"a process that reads data ended unexpectedly .* --resume"):
            small_pretrain(recordings, tmp_path / "run", loader={"num_workers": 1}, trainer=trainer)
    assert same_runs(
        undisturbed(trainer=trainer), small_pretrain(recordings, tmp_path / "run", trainer=trainer, resume=True)
    )


def test_two_runs_cannot_write_to_one_folder(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, run_python: Callable[..., Any]
):
    messages = []

    def second() -> None:
        command = "from small_run import small_pretrain; small_pretrain({!r}, {!r}, resume=True)"
        words = ["-c", command.format(str(recordings), str(tmp_path / "run"))]
        messages.append(run_python(words, env={"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}).stderr)

    at_step(monkeypatch, 3, second)
    small_pretrain(recordings, tmp_path / "run")
    assert f"another process is writing to it (pid {os.getpid()})" in messages[0]


@pytest.mark.parametrize("settings", ["data: x\n", "model: a\nlabelled: b\n", "model: {}\ntrainer: 5\n"])
def test_settings_of_another_kind_of_run_are_refused(tmp_path: Path, recordings: Path, settings: str):
    (tmp_path / "config.yaml").write_text(settings)
    with pytest.raises(ConfigError, match="holds another kind of run"):
        small_pretrain(recordings, tmp_path, resume=True)


def test_a_run_is_resumed_with_its_own_data_and_settings(
    tmp_path: Path, recordings: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="holds no run to resume; to start one, name where the audio is"):
        bestrq2.pretrain(output=tmp_path / "killed", resume=True)
    killed = killed_copy(tmp_path, recordings, monkeypatch, seed=3)
    bestrq2.pretrain(output=killed, resume=True)
    assert same_runs(undisturbed(seed=3), killed)


def test_a_finished_run_is_left_alone(finished_run: Path, caplog: pytest.LogCaptureFixture):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    assert cli.run(["pretrain", "--output", str(finished_run), "--resume"]) == 0
    assert f"{finished_run}: finished at step 6; to extend it, add --trainer.max_steps" in caplog.text
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


def test_a_checkpoint_describes_itself_and_loads_without_pickled_objects(finished_run: Path):
    checkpoint = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["bestrq2"]["version"] == bestrq2.__version__
    assert json.loads(json.dumps(checkpoint["bestrq2"]["config"])) == yaml.safe_load(
        (finished_run / "config.yaml").read_text()
    )
    assert checkpoint["global_step"] == 6


def test_settings_that_change_rounding_only_may_change_on_resume_with_a_notice(
    tmp_path: Path, recordings: Path, undisturbed: Undisturbed, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    run = small_pretrain(recordings, tmp_path / "run")
    for name in ("last.ckpt", "step-00000006.ckpt", "step-00000006.ckpt.sha256"):
        (run / "checkpoints" / name).unlink()
    small_pretrain(recordings, run, trainer={"gradient_checkpointing": True}, resume=True)
    notice = "goes on, equal but for rounding: trainer.gradient_checkpointing was False and is now True"
    assert caplog.text.count(notice) == 1
    whole, resumed = weights(undisturbed()), weights(run)
    assert all(torch.allclose(whole[key], resumed[key], atol=1e-6) for key in whole)


def test_a_run_of_a_version_with_other_settings_can_be_resumed(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("encoder_type", "mask_fill", "num_codebooks"):
        del settings["model"][name]
    settings["model"].update(
        mask_shape="uniform", masks_per_clip=1, mask_span_probability=0.15, predictor_context_positions=False
    )
    del settings["logging"], settings["trainer"]["keep_last"]
    settings["probe"]["max_share"] = 0.05
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    small_pretrain(recordings, run, trainer={"max_steps": 8}, resume=True)
    assert metrics(run)[-1]["step"] == "8"
    with pytest.raises(ConfigError, match=r"num_codebooks was 1 and is now 2"):
        small_pretrain(recordings, run, model={"num_codebooks": 2}, trainer={"max_steps": 10}, resume=True)


@pytest.mark.parametrize(
    ("name", "value"), [("mask_shape", "block"), ("masks_per_clip", 2), ("predictor_context_positions", True)]
)
def test_a_run_whose_settings_only_an_earlier_version_has_is_refused(
    name: str, value: Any, tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
):
    run = small_pretrain(recordings, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert cli.run(["pretrain", "--output", str(run), "--resume", "--trainer.max_steps", "8"]) == 2
    assert f"has model.{name} {value}, which this version of bestrq2 no longer knows" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    killed = killed_copy(tmp_path, recordings, monkeypatch)
    path = killed / "checkpoints" / "step-00000004.ckpt"
    state = torch.load(path, weights_only=True)
    heard = state["bestrq2"].pop("heard")
    assert sum(heard.values()) == 16_000 * float(
        next(row for row in metrics(killed) if row["step"] == "4")["audio_seconds"]
    )
    checkpoints.write_state(path, state)
    expected = "was begun by another version of bestrq2, which drew its batches in another order; finish the run with"
    with pytest.raises(CheckpointError, match=expected):
        small_pretrain(recordings, killed, resume=True)
    settings = yaml.safe_load((killed / "config.yaml").read_text())
    settings["loader"]["batch_size"] = int(settings["loader"].pop("batch_seconds") / 2.5)
    (killed / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match=expected):
        small_pretrain(recordings, killed, resume=True)
    assert cli.run(["pretrain", "--config", str(killed / "config.yaml"), "--resume"]) == 2
    assert "there is no setting 'loader.batch_size'; did you mean 'loader.batch_seconds'?" in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_is_refused_in_one_sentence(tmp_path: Path):
    path = tmp_path / "step-00000003.ckpt"
    checkpoints.write_state(path, {"model": {}, "optimizer": {}, "history": []})  # fine-tuning by epochs
    with pytest.raises(CheckpointError, match="was begun by another version of bestrq2"):
        checkpoints.read_checkpoint(path)
