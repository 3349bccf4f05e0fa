"""The example scripts do what they say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
