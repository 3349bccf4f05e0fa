"""The interface between the training loop and what it trains: a task gives a loss, figures, and a model to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bestrq2.data.batch import AudioBatch
from bestrq2.model.packing import Packing

Sums = dict[str, Tensor]

# Keeps the random numbers of stochastic depth, dropout and noise apart from all others.
_NOISE = 0xD809


class Inputs:
    """One batch as a model takes it.

    A plain object, no dataclass and no mapping: Fabric and DDP would convert and move the tensors in those.

    Args:
        input_values: float32 [B, S], rows of clips on the device.
        packing: clips of the rows, on the CPU, where counting costs no synchronisation.
        hidden_mask: bool [B, N] on the CPU, patches to hide; None where nothing is hidden.
        labels: targets of a classifier, on the device.
        counts: whether the batch has a clip at all, and so counts.
    """

    def __init__(
        self,
        input_values: Tensor,
        packing: Packing,
        hidden_mask: Tensor | None = None,
        labels: Tensor | None = None,
        counts: bool = True,
    ) -> None:
        self.input_values, self.packing, self.hidden_mask, self.labels = input_values, packing, hidden_mask, labels
        self.counts = counts


class Task(nn.Module, ABC):
    """A model and what it learns; DDP and FSDP wrap the task, and its forward pass gives the loss.

    Attributes:
        model: the model.
        seed: random seed of stochastic depth, dropout and noise.
        label: name of the command, for the progress display.
        exports_best: whether `model/` holds the best model by validation; otherwise it holds the newest.
        saves_frozen: whether checkpoints hold weights that are not trained, too.
        running_sums: names of the sums that go on from the first step; the others start again after they were logged.
    """

    label: str
    exports_best = False
    saves_frozen = True
    running_sums: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model: Any = model
        self.seed = seed

    @abstractmethod
    def forward(self, inputs: Inputs) -> Sums:
        """Sums over the terms of the loss in a batch: "loss" (nats, differentiable), "terms", and diagnostics."""

    @abstractmethod
    def inputs(self, batch: AudioBatch, device: torch.device) -> Inputs:
        """A batch on the device."""

    @abstractmethod
    def terms(self, batch: AudioBatch) -> int:
        """Number of terms of the loss in a batch (hidden patches, or clips), known before the forward pass."""

    @abstractmethod
    def summarise(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor | float]:
        """Values to log, by name, from the sums of several steps over all processes."""

    def train_mode(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    def validate(self, model: nn.Module, fabric: Fabric, step: int, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Values of a validation by name; empty if there is none. Every process must call it.

        Args:
            model: the model to validate: `self.model`, or the average of its weights.
            fabric: processes that share the work, and the precision of the run.
            step: steps done.
            sums: training sums over all processes; only `running_sums` are certain to be there.
        """
        return {}

    def rank(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """Quality of a model by its validation values; the larger of two is the better."""
        return (-values["validation/loss"],)

    def describe(self, values: Mapping[str, float], better: bool) -> str:
        """One line on a validation, to be printed; empty for none."""
        return ""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Write a model folder.

        Args:
            model: the model.
            folder: folder to write; does not exist yet.
            state: its weights where the model itself holds shards of them; else None.
        """


def added(sums: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Sums:
    """Sums with those of one more batch; nothing is synchronised."""
    return {
        name: sums[name] + value.detach() if name in sums else value.detach().clone() for name, value in new.items()
    }


def seed_noise(seed: int, batch: int, rank: int, device: torch.device) -> None:
    """Seed stochastic depth, dropout and noise of a batch from (seed of the run, number of the batch, process).

    So a resumed run repeats them. Only this device's generator and the CPU's are seeded: `torch.manual_seed` also
    stores a stack trace for every kind of accelerator that is not there, which takes longer than all other work of a
    step on the CPU.

    Args:
        seed: random seed of the run.
        batch: number of the batch.
        rank: number of the process.
        device: device of the model.
    """
    state = int(np.random.SeedSequence([seed, _NOISE, batch, rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(state)


def without_empty_rows(batch: AudioBatch) -> AudioBatch:
    """The rows of a batch that hold a clip, since a Conformer takes no others.

    Where there is none the first row stays, as one silent clip: every process needs a gradient, and `Inputs.counts`
    tells that it is zero.
    """
    used = (batch.packing.segments != 0).any(dim=1)
    if bool(used.all()):
        return batch
    packing, mask = Packing(*vars(batch.packing).values()), batch.hidden_mask
    if not bool(used.any()):
        used[0] = True
        packing.segments = torch.ones_like(packing.segments)
        mask = None if mask is None else (torch.arange(mask.shape[-1]) % 2 == 0).expand_as(mask)
    packing = Packing(*(values[used] for values in vars(packing).values()))
    mask = None if mask is None else mask[used]
    return replace(batch, input_values=batch.input_values[used], packing=packing, hidden_mask=mask)
