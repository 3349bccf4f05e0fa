"""The example scripts do what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForAudioClassification

import bestrq2
from bestrq2 import BestRQ2Config
from bestrq2.inference.cost import cost
from bestrq2.train.settings import parse_arguments

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


@pytest.mark.parametrize("arm", ["best-rq-vit-tiny", "best-rq-conformer-tiny", "two-steps-or-one/one-stage.yaml"])
def test_arms_of_an_experiment_get_the_steps_that_cost_the_same(arm: str):
    path = Path(__file__).parent.parent / "benchmarks" / "experiments.py"
    spec = importlib.util.spec_from_file_location("experiments", path)
    assert spec is not None
    assert spec.loader is not None
    experiments = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiments)
    arm = str(SLURM.parent / arm) if arm.endswith("yaml") else arm
    settings = experiments.settings_of(arm, 8000.0, None, 2e-3)
    model = BestRQ2Config(**settings["model"])
    step = cost(model).training_gflops * settings["loader"]["batch_seconds"] / model.max_seconds
    assert abs(settings["trainer"]["max_steps"] * step - 8000) <= step / 2
    assert settings["optimizer"]["lr"] == 2e-3


def test_fine_tuning_with_the_trainer_learns_to_tell_pitches(tiny_config, run_python, tmp_path: Path):
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
    rng = np.random.default_rng(0)
    for label, pitch in (("low", 200.0), ("middle", 900.0), ("high", 3000.0)):
        (tmp_path / "labelled" / label).mkdir(parents=True)
        for number in range(12):
            time = np.arange(16_000 * (1 + number % 2)) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * pitch * (1 + 0.02 * number) * time) + 0.01 * rng.standard_normal(len(time))
            soundfile.write(tmp_path / "labelled" / label / f"{number}.wav", tone, 16_000)
    torch.manual_seed(0)
    encoder = bestrq2.BestRQ2Model(tiny_config(input_normalization="clip", initializer_range=0.06))
    encoder.save_pretrained(tmp_path / "source")
    bestrq2.export(tmp_path / "source", tmp_path / "encoder")
    words = [str(tmp_path / name) for name in ("encoder", "labelled", "tuned")]
    script = SLURM.parent / "finetune_with_transformers.py"
    result = run_python([script, *words, "--lr", "3e-3", "--epochs", "20"], env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    accuracy = float(result.stdout.splitlines()[-1].rpartition(" ")[0].split()[-1])
    assert accuracy >= 75  # chance is 33.3
    tuned = AutoModelForAudioClassification.from_pretrained(tmp_path / "tuned").eval()
    assert tuned.config.id2label == {0: "high", 1: "low", 2: "middle"}
    right = 0
    for label in tuned.config.label2id:
        waveform, _ = soundfile.read(tmp_path / "labelled" / label / "5.wav", dtype="float32")
        found = tuned(torch.from_numpy(waveform)[None]).logits.argmax().item()
        right += tuned.config.id2label[found] == label
    assert right == 3
    assert bestrq2.load(tmp_path / "tuned", "cpu").embed(waveform).clip.shape == (1, 32)


@pytest.mark.slow
def test_an_encoder_of_8_bits_on_one_core_is_small_and_loses_little(run_python, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    script = SLURM.parent / "onnx_on_one_core.py"
    words = ["best-rq-2-plus-tiny", "--train", "24", "--test", "12", "--seconds", "10"]
    result = run_python([script, *words], env={"BESTRQ2_CACHE": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "| " in line]
    float32, int8 = (dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:])
    assert float(int8["MB"]) < 0.5 * float(float32["MB"])
    assert float(float32["minimum"]) == 1.0 >= float(int8["minimum"]) > 0.98
    assert float(int8["times real time"]) > 1
    assert float32["change (points)"] == "+0.0 [+0.0, +0.0]"
