"""A pretraining run small enough for tests, on recordings with structure."""

from __future__ import annotations

import csv
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from bestrq2.commands.pretrain import pretrain
from bestrq2.train import loop

RATE = 16_000
MODEL: dict[str, Any] = {
    "max_seconds": 2.5,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "predictor_hidden_size": 32,
    "predictor_num_layers": 1,
    "predictor_num_attention_heads": 2,
    "predictor_intermediate_size": 64,
    "codebook_size": 64,
    "num_codebooks": 1,
    "drop_path_rate": 0.1,
}
LOADER: dict[str, Any] = {"batch_seconds": 10, "num_workers": 0, "validation_clips": 2, "statistics_clips": 4}
TRAINER: dict[str, Any] = {
    "max_steps": 6,
    "log_every_n_steps": 2,
    "val_every_n_steps": 3,
    "checkpoint_every_n_steps": 2,
    "accelerator": "cpu",
    "report": False,
}
CONFORMER: dict[str, Any] = {
    "encoder_type": "conformer", "position_embedding": "relative", "objective": "one_stage", "mask_fill": "noise",
    "num_mel_bands": 80, "patch_size": [80, 4], "n_fft": 400, "win_length": 400, "hop_length": 160,
    "mask_ratio": [0.6, 0.6], "norm": "layernorm", "activation": "gelu", "use_bias": True,
    "qk_norm": False, "input_normalization": "clip", "conformer_channels": [8, 4], "conformer_kernel_size": 5,
    "conformer_dropout": 0.1,
}  # fmt: skip


def recording(number: int, seconds: float) -> np.ndarray:
    """A gliding tone with a tremolo over faint noise, float32 [samples]."""
    rng = np.random.default_rng(number)
    time = np.arange(round(seconds * RATE)) / RATE
    glide = rng.uniform(150, 2000) * time + rng.uniform(-200, 200) * time**2
    tremolo = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 8) * time)
    return (0.2 * tremolo * np.sin(2 * np.pi * glide) + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


def write_recordings(folder: Path, count: int = 12) -> Path:
    """Recordings of 1 to 4 s as 16-bit wav files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        soundfile.write(folder / f"{number:02d}.wav", recording(number, 1 + number % 4), RATE)
    return folder


def groups_of(changes: dict[str, Any]) -> dict[str, Any]:
    """The groups of settings of a small run, merged with changes, which are taken out."""
    defaults = (("model", MODEL), ("loader", LOADER), ("trainer", TRAINER))
    return {name: {**values, **changes.pop(name, {})} for name, values in defaults}


def small_pretrain(data: Any, output: Path, **changes: Any) -> Path:
    """Pretrain for six steps; `changes` are arguments of `pretrain`, groups are merged."""
    return pretrain(recipe="demo", data=data, output=output, **groups_of(changes), **changes)


def flags(steps: int = 6, **trainer: Any) -> list[str]:
    """The same settings as flags."""
    groups = {"model": MODEL, "loader": LOADER, "trainer": {**TRAINER, "max_steps": steps, **trainer}}
    pairs = [(f"--{group}.{key}", str(value)) for group, values in groups.items() for key, value in values.items()]
    return ["--recipe", "demo", *(word for pair in pairs for word in pair)]


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported tensors."""
    return load_file(run / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs exported the same numbers, bit by bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def same_runs(one: Path, other: Path) -> bool:
    """Weights and metrics are equal to the bit."""
    return same_weights(one, other) and (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def after_steps(monkeypatch: pytest.MonkeyPatch, action: Callable[[loop.Run, int], object]) -> None:
    """Call `action(run, step)` at the end of every step, when all its files are written."""
    original = loop.Run.show

    def acting(run: loop.Run, step: int) -> None:
        original(run, step)
        action(run, step)

    monkeypatch.setattr(loop.Run, "show", acting)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the end of one step."""
    after_steps(monkeypatch, lambda run, now: action() if now == step else None)


def die() -> None:
    raise RuntimeError("killed")


def killed_copy(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, step: int = 5, **changes: Any
) -> Path:
    """A run that ended without warning after that step."""
    with monkeypatch.context() as patch:
        at_step(patch, step, die)
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(recordings, tmp_path / "killed", **changes)
    return tmp_path / "killed"


def free_port() -> int:
    """A port for processes that connect."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
