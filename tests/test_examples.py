"""The example scripts do what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from bestrq2 import BestRQ2Config
from bestrq2.inference.cost import cost
from bestrq2.train.config import parse_arguments

SLURM = Path(__file__).parent.parent / "examples" / "slurm.sh"


@pytest.mark.parametrize(("code", "ends", "requeued"), [(0, 0, False), (138, 0, True), (143, 0, True), (2, 2, False)])
def test_a_preempted_slurm_job_is_requeued_and_a_failed_one_is_not(
    code: int, ends: int, requeued: bool, tmp_path: Path
):
    for name, body in {
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/srun.txt; exit {code}',
        "scontrol": "echo $@",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    words = [str(SLURM), "some shards", str(tmp_path / "run"), "--recipe", "best-rq-2-small"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == ends, result.stderr
    assert ("requeue 17" in result.stdout) == requeued
    command = (tmp_path / "srun.txt").read_text().splitlines()
    assert command[:3] == ["--kill-on-bad-exit=1", "bestrq2", "pretrain"]
    config, resume = parse_arguments(command[3:])
    assert (config.data, config.recipe, resume) == ("some shards", "best-rq-2-small", True)


@pytest.mark.parametrize("arm", ["best-rq-vit-tiny", "best-rq-conformer-tiny", "best-rq-2-plus-tiny"])
def test_arms_of_an_experiment_get_the_steps_that_cost_the_same(arm: str):
    path = Path(__file__).parent.parent / "benchmarks" / "experiments.py"
    spec = importlib.util.spec_from_file_location("experiments", path)
    assert spec is not None
    assert spec.loader is not None
    experiments = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiments)
    budget = str(SLURM.parent / "ablations" / "_budget.yaml")
    settings = experiments.settings_of(arm, budget, 8000.0, None)
    step = cost(BestRQ2Config(**settings["model"])).training_gflops * settings["loader"]["batch_size"]
    assert abs(settings["trainer"]["max_steps"] * step - 8000) <= step / 2
    assert settings["model"]["max_seconds"] == 5.0  # the budget lies over the recipe
