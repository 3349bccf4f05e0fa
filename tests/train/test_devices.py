"""Several processes learn what one does, stop together, and do not wait for the dead. On the CPU, over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from one_of_several import stop_at
from small_run import MODEL, free_port, metrics, small_pretrain, weights, write_recordings

from bestrq2.errors import ConfigError, StoppedBySignal
from bestrq2.train.checkpoints import CheckpointStore
from bestrq2.train.processes import launch, launched_shape
from bestrq2.train.settings import TrainerConfig, resolve
from bestrq2.train.step_cost import StepMeter

STEPS = {"max_steps": 20, "log_every_n_steps": 1, "val_every_n_steps": 5, "checkpoint_every_n_steps": 10}
SCRIPT = Path(__file__).with_name("one_of_several.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Several:
    """Starts small runs of two processes.

    As SLURM's srun would start them, they are forked in milliseconds; Fabric and torchrun start fresh interpreters.
    """

    def __init__(self, start_python: Callable[..., Any]) -> None:
        self.start_python = start_python

    def start(
        self,
        launcher: str,
        output: Path,
        source: Path,
        stop: list[int] | None = None,
        resume: bool = False,
        probe: dict[str, Any] | None = None,
        memory: list[float] | None = None,
        **trainer: Any,
    ) -> list[Any]:
        """The processes: one command for Fabric or torchrun, two for SLURM."""
        trainer = {**STEPS, "devices": 2 if launcher == "fabric" else 1, **trainer}
        settings = {"trainer": trainer, "stop": stop, "resume": resume, "probe": probe or {}, "memory": memory}
        words = [str(SCRIPT), str(output), str(source), json.dumps(settings)]
        paths = os.pathsep.join([str(SCRIPT.parent), *sys.path])
        if launcher == "slurm":
            job = {
                "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pretrain", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()), "PYTHONPATH": paths,
            }  # fmt: skip
            ranks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
            return [self.start_python(words, env=rank) for rank in ranks]
        command = [*TORCHRUN, *words] if launcher == "torchrun" else [sys.executable, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        return [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)]

    def run(self, *arguments: Any, **settings: Any) -> str:
        """Output of a run of several processes that must succeed."""
        said, codes = "", []
        for process in self.start(*arguments, **settings):
            if isinstance(process, subprocess.Popen):
                said += process.communicate(timeout=240)[0]
                codes.append(process.returncode)
            else:
                finished = process.finish(240)
                said += finished.stdout + finished.stderr
                codes.append(finished.returncode)
        assert set(codes) == {0}, said
        return said


@pytest.fixture
def several(start_python: Callable[..., Any]) -> Several:
    return Several(start_python)


def assert_close(one: Path, other: Path) -> None:
    """Weights and every logged number agree to 1e-5."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.allclose(first[key], second[key], atol=1e-5, rtol=1e-5), key
    rows = list(zip(metrics(one), metrics(other), strict=True))
    assert len(rows) == STEPS["max_steps"]
    for row, twin in rows:
        assert row.keys() == twin.keys()
        assert row["audio_seconds"] == twin["audio_seconds"]
        for name, value in row.items():
            assert (value == "") == (twin[name] == "")
            if value:
                assert float(value) == pytest.approx(float(twin[name]), rel=1e-5, abs=1e-5), (row["step"], name)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of unequal length, so that processes hide unequally many patches; one is broken."""
    folder = write_recordings(tmp_path_factory.mktemp("sounds") / "audio", 14)
    (folder / "broken.wav").write_text("not audio")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sounds: Path) -> Path:
    """The same run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return small_pretrain(sounds, run, trainer=STEPS, model={"drop_path_rate": 0.0})


@pytest.mark.parametrize(
    "launcher",
    ["slurm", pytest.param("fabric", marks=pytest.mark.slow), pytest.param("torchrun", marks=pytest.mark.slow)],
)
def test_two_processes_learn_what_one_does_with_all_their_clips(
    launcher: str, tmp_path: Path, sounds: Path, alone: Path, several: Several
):
    several.run(launcher, tmp_path / "run", sounds)
    assert_close(alone, tmp_path / "run")
    assert "broken.wav" in (tmp_path / "run" / "rejected.csv").read_text()


@pytest.mark.slow
def test_processes_agree_on_the_batch_that_fits_all_of_them(tmp_path: Path, sounds: Path, several: Several):
    config = resolve({"recipe": "demo", "data": "x", "output": "y", "model": {**MODEL, "drop_path_rate": 0.0}})
    line = StepMeter(config, launch(TrainerConfig(accelerator="cpu"))).memory()
    # half of it may be used, and is divided among two
    several.run("slurm", tmp_path / "run", sounds, memory=[4 * line.at(rows) + 1 for rows in (9, 3)], max_steps=2)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["loader"]["batch_seconds"] == 2 * 3 * 2.5


@pytest.mark.slow
def test_accumulation_over_two_processes_learns_what_one_batch_does(
    tmp_path: Path, sounds: Path, alone: Path, several: Several
):
    several.run("slurm", tmp_path / "run", sounds, accumulate_grad_batches=2)
    assert_close(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_processes_probe_at_the_steps_and_with_the_scores_of_one(
    strategy: str, tmp_path: Path, sounds: Path, several: Several
):
    for number, file in enumerate(sorted(sounds.glob("[0-9]*.wav"))):
        copy = tmp_path / "labelled" / "ab"[number % 2] / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    probe = {"data": str(tmp_path / "labelled"), "every_n_steps": 1}
    steps = {"max_steps": 2, "checkpoint_every_n_steps": 2, "val_every_n_steps": 2}
    several.run("slurm", tmp_path / "two", sounds, probe=probe, strategy=strategy, **steps)
    one = small_pretrain(sounds, tmp_path / "one", trainer=STEPS | steps, model={"drop_path_rate": 0.0}, probe=probe)
    scores = [[(row["step"], row["probe/mean"]) for row in metrics(run)] for run in (one, tmp_path / "two")]
    assert scores[0] == scores[1]
    assert [step for step, _ in scores[0]] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_run_goes_from_two_processes_to_one_and_back(
    tmp_path: Path, sounds: Path, alone: Path, several: Several, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    # Only the second process gets the signal; both stop, one step later.
    assert "stopped after step 8" in several.run("slurm", run, sounds, stop=[1, 7])
    with monkeypatch.context() as patch:
        stop_at(patch, rank=0, step=13)
        with pytest.raises(StoppedBySignal, match="stopped after step 13"):
            small_pretrain(sounds, run, trainer=STEPS, model={"drop_path_rate": 0.0}, resume=True)
    several.run("slurm", run, sounds, resume=True)
    assert_close(alone, run)


@pytest.mark.slow
def test_a_model_cut_into_shards_learns_the_same_and_its_state_is_whole(
    tmp_path: Path, sounds: Path, alone: Path, several: Several
):
    run = tmp_path / "run"
    several.run("slurm", run, sounds, stop=[0, 11], strategy="fsdp")
    assert CheckpointStore(run / "checkpoints").steps() == [10, 12]
    several.run("slurm", run, sounds, resume=True, strategy="fsdp")
    assert_close(alone, run)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "victim"), [("fabric", "first"), ("fabric", "second"), ("torchrun", "first")])
def test_killing_one_process_ends_the_job_with_a_clear_message(
    launcher: str, victim: str, tmp_path: Path, sounds: Path, several: Several
):
    run = tmp_path / "run"
    (process,) = several.start(launcher, run, sounds, max_steps=100_000)
    pids = []
    assert process.stdout is not None
    while len(pids) < 2:
        if found := re.search(r"process (\d+)", process.stdout.readline()):
            pids.append(int(found[1]))
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Fabric's first process is the command itself; torchrun's are told apart by their environment.
    ranks = {int(rank_of(pid)): pid for pid in pids}
    os.kill(ranks[{"first": 0, "second": 1}[victim]], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    if (launcher, victim) != ("fabric", "first"):  # processes that the first one launched end with it, without a word
        assert "lost another one, which ended or was killed" in said or "SIGKILL" in said
    for pid in pids:
        while running(pid):
            assert time.monotonic() < deadline + 60
            time.sleep(0.1)


def rank_of(pid: int) -> str:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    values = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
    return values.get(b"RANK", values.get(b"LOCAL_RANK", b"0")).decode()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_launcher_s_own_number_of_processes_counts(monkeypatch: pytest.MonkeyPatch):
    assert launched_shape(TrainerConfig(devices=4, num_nodes=3)) == (4, 3)
    for name, value in {"RANK": 5, "GROUP_RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launched_shape(TrainerConfig()) == (4, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="start equally many everywhere"):
        launched_shape(TrainerConfig())


def test_a_batch_that_cannot_be_shared_equally_is_refused(tmp_path: Path, sounds: Path):
    with pytest.raises(ConfigError, match=r"trainer\.devices must be above 0 or -1, got 0"):
        small_pretrain(sounds, tmp_path / "run", trainer={"devices": 0})
    with pytest.raises(ConfigError, match=r"trainer\.ema does not work with trainer\.strategy fsdp"):
        small_pretrain(sounds, tmp_path / "run", trainer={"strategy": "fsdp", "ema": True})
