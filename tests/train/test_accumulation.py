"""A step has one gradient, whether its clips go through the model in one batch or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CONFORMER, MODEL, TRAINER, recording, small_pretrain, weights
from torch import Tensor

from bestrq2.data.sources import ArraySource
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.train.guard import Guard

# Without dropout, and with noise that is a function of the clip: their random numbers depend on how a batch is cut.
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {**MODEL, "drop_path_rate": 0.0},
    "vit-ratios": {**MODEL, "drop_path_rate": 0.0, "mask_ratio": [0.3, 0.6]},
    "conformer": {**MODEL, **CONFORMER, "conformer_dropout": 0.0},
}


def gradients(output: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], **trainer: Any) -> list[Tensor]:
    """Gradients of the first step of a run on clips of 0.4 to 2.5 s."""
    found: list[Tensor] = []
    judge = Guard.judge

    def judging(guard: Guard, parameters: Any, optimizer: Any) -> Tensor:
        parameters = list(parameters)
        found.extend(parameter.grad.clone() for parameter in parameters if parameter.grad is not None)
        return judge(guard, parameters, optimizer)

    clips = [recording(number, 0.4 + 2.1 * (number % 5) / 4) for number in range(10)]
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "judge", judging)
        small_pretrain(
            ArraySource(clips, 16_000, "unequal"),
            output,
            model=model,
            loader={"batch_seconds": 20, "validation_clips": 0},
            trainer={**TRAINER, "max_steps": 1, "val_every_n_steps": 0, **trainer},
        )
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_accumulated_batches_have_the_gradient_of_the_whole_batch(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def with_noise(model: Any, values: Tensor, is_hidden: Tensor) -> Tensor:
        return torch.where(is_hidden[..., None], torch.sin(3 * values), values)

    monkeypatch.setattr(BestRQ2ForPreTraining, "_with_noise", with_noise)
    whole = gradients(tmp_path / "whole", monkeypatch, NETWORKS[network])
    norm = torch.stack([gradient.norm() for gradient in whole]).norm()
    for batches in (2, 4, 8):
        parts = gradients(tmp_path / f"{batches}", monkeypatch, NETWORKS[network], accumulate_grad_batches=batches)
        assert len(parts) == len(whole)
        difference = torch.stack([(a - b).norm() for a, b in zip(whole, parts, strict=True)]).norm()
        assert difference / norm < 1e-5


def test_accumulated_batches_train_to_the_same_weights(tmp_path: Path):
    clips = ArraySource([recording(number, 0.4 + 0.3 * (number % 7)) for number in range(14)], 16_000, "unequal")
    runs = [
        small_pretrain(
            clips, tmp_path / f"{batches}", model=NETWORKS["vit"], trainer={"accumulate_grad_batches": batches}
        )
        for batches in (1, 4)
    ]
    whole, parts = map(weights, runs)
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5) for key in whole)
