"""Online probe: linear probes of the encoder on labelled data during training."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch.distributed.fsdp import FSDPModule

from bestrq2.data.labels import load_labelled
from bestrq2.errors import BestRQ2Error
from bestrq2.evaluate.task_probe import OnlineProbe
from bestrq2.inference.embedder import Embedder
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.train.processes import usable_parts
from bestrq2.train.settings import OnlineProbeConfig


class OnlineProbing:
    """Probes before the first step, every so many steps, and after the last; training is not touched by it.

    Args:
        config: data, tasks and interval.
        seed: random seed of the choice of clips and of the probes.

    Raises:
        BestRQ2Error: the data is missing, has no labels, or lacks a split or a task.
    """

    def __init__(self, config: OnlineProbeConfig, seed: int) -> None:
        assert config.data is not None
        try:
            tasks = load_labelled(config.data, names=config.tasks)
        except BestRQ2Error as error:
            raise type(error)(f"probe.data: {error}") from error
        self.probe = OnlineProbe(tasks, max_train=config.clips, seed=seed)
        self.every_n_steps = config.every_n_steps

    def run(self, model: BestRQ2ForPreTraining, fabric: Fabric, step: int) -> dict[str, float]:
        """Scores of the encoder after a step, by name.

        Args:
            model: pretraining model.
            fabric: device and precision.
            step: steps done.

        Raises:
            BestRQ2Error: a task cannot be scored before the first step; later that is a warning.
        """
        if step == 0:
            _run_whole_once(model, fabric)
        with usable_parts(model):
            encoder = Embedder(model.base_model, fabric.device, name="encoder")
            return self.probe.run(encoder, first=step == 0)


@torch.no_grad()
def _run_whole_once(model: BestRQ2ForPreTraining, fabric: Fabric) -> None:
    """Run a model that is cut into shards on one silent clip: before that, its parts cannot be called alone."""
    if isinstance(model, FSDPModule):
        silence = torch.zeros(1, model.config.max_samples, device=fabric.device)
        with fabric.autocast():
            model.eval()(silence, generator=torch.Generator().manual_seed(0))
