"""A pretraining run small enough for tests, on recordings with structure."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from bestrq2.train import callbacks
from bestrq2.train.pretraining import pretrain

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
LOADER: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "validation_clips": 2, "statistics_clips": 4}
TRAINER: dict[str, Any] = {
    "max_steps": 6,
    "log_every_n_steps": 2,
    "val_every_n_steps": 3,
    "checkpoint_every_n_steps": 2,
    "accelerator": "cpu",
}


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


def small_pretrain(data: Any, output: Path, **changes: Any) -> Path:
    """Pretrain for six steps; `changes` are arguments of `pretrain`, groups are merged."""
    groups = {
        name: {**defaults, **changes.pop(name, {})}
        for name, defaults in (("model", MODEL), ("loader", LOADER), ("trainer", TRAINER))
    }
    return pretrain(recipe="demo", data=data, output=output, **groups, **changes)


def flags(steps: int = 6) -> list[str]:
    """The same settings as flags."""
    groups = {"model": MODEL, "loader": LOADER, "trainer": {**TRAINER, "max_steps": steps}}
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


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something right after that step was taken care of."""
    original = callbacks.RunKeeper.on_train_batch_end

    def acting(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        original(self, trainer, module, outputs, batch, batch_idx)
        if callbacks.finished_step(module, batch) == step:
            action()

    monkeypatch.setattr(callbacks.RunKeeper, "on_train_batch_end", acting)


def die() -> None:
    raise RuntimeError("killed")


def same_runs(one: Path, other: Path) -> bool:
    """Weights and metrics are equal to the bit."""
    return same_weights(one, other) and (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def killed_copy(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, step: int = 5, **changes: Any
) -> Path:
    """A run that died after that step without a word to anybody."""
    with monkeypatch.context() as patch:
        at_step(patch, step, die)
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(recordings, tmp_path / "killed", **changes)
    return tmp_path / "killed"
