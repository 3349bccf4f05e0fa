"""The online probe in the course of training: when it comes, and that it costs no more than its share of the time.

When scores are taken must not hang on how long each step takes, or an interrupted run would not log what an
uninterrupted one does. So the cost is measured once, before the first step, the spacing is settled once, at the first
step that a probe may follow, and both are kept in the run folder.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.fsdp import FSDPModule

from bestrq2.data.labels import load_labelled
from bestrq2.errors import BestRQ2Error
from bestrq2.evaluate.online import OnlineProbe
from bestrq2.files import write_text
from bestrq2.inference.embedder import Embedder
from bestrq2.train.callbacks import finished_step, model_in_use, usable_parts
from bestrq2.train.module import PretrainingModule
from bestrq2.train.settings import OnlineProbeConfig, PretrainConfig
from bestrq2.train.timing import Timing

logger = logging.getLogger(__name__)


def open_probe(config: PretrainConfig) -> OnlineProbe | None:
    """The online probe that a run asks for; None for none.

    Raises:
        BestRQ2Error: its data is missing, has no labels, or lacks a split or a task.
    """
    probe = config.probe
    if probe.data is None:
        return None
    try:
        tasks = load_labelled(probe.data, names=probe.tasks)
    except BestRQ2Error as error:
        raise type(error)(f"probe.data: {error}") from error
    return OnlineProbe(tasks, max_train=probe.clips, seed=config.seed)


def spacing(probe_seconds: float, step_seconds: float, every_n_steps: int, max_share: float) -> int:
    """Steps between probes: the least multiple of `every_n_steps` that keeps them below their share of the time.

    Args:
        probe_seconds: of one probe.
        step_seconds: of one training step.
        every_n_steps: steps between probes that may take any time.
        max_share: of probes and steps together, in (0, 1].
    """
    least = probe_seconds * (1 - max_share) / (max_share * max(step_seconds, 1e-9) * every_n_steps)
    return every_n_steps * max(1, math.ceil(least))


class OnlineProbing(pl.Callback):
    """Probes before the first step, at evenly spaced steps, and after the last one; training is not touched by it.

    Args:
        probe: what is run.
        settings: of it.
        path: file that keeps cost and spacing.
        timing: knows how long a step takes.
        clock: seconds, for the cost of a probe.
    """

    def __init__(
        self,
        probe: OnlineProbe,
        settings: OnlineProbeConfig,
        path: Path,
        timing: Timing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.probe, self.settings, self.path, self.timing, self.clock = probe, settings, path, timing, clock
        self._seconds: float | None = None
        self._every: int | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Take up what was measured before; otherwise measure.

        Raises:
            BestRQ2Error: a task cannot be scored, although nothing was trained yet.
        """
        self._seconds, self._every = trainer.strategy.broadcast(self._kept())
        if trainer.global_step == 0 or self._seconds is None:
            _run_whole_once(trainer, module)
            seconds = self._run(trainer, module, trainer.global_step)
            self._seconds = self._seconds or trainer.strategy.broadcast(seconds)
            self._keep(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Probe after the steps that are due."""
        step = finished_step(module, batch)
        if step is None:
            return
        if self._every is None and step % self.settings.every_n_steps == 0:
            self._settle(trainer, step)
        if step == module.config.trainer.max_steps or (self._every and step % self._every == 0):
            self._run(trainer, module, step)

    def _settle(self, trainer: pl.Trainer, step: int) -> None:
        """Find the spacing, the same for all processes."""
        assert self._seconds is not None
        settings, a_step = self.settings, self.timing.seconds_per_step(step)
        every = spacing(self._seconds, a_step, settings.every_n_steps, settings.max_share)
        self._every = trainer.strategy.broadcast(every)
        self._keep(trainer)
        if self._every > settings.every_n_steps:
            logger.info(
                "online probe: it takes %.1f s and a step %.2g s, so it comes every %d steps instead of %d to stay "
                "below %g %% of the time (probe.max_share)", self._seconds, a_step, self._every,
                settings.every_n_steps, 100 * settings.max_share,
            )  # fmt: skip

    def _run(self, trainer: pl.Trainer, module: PretrainingModule, step: int) -> float:
        """Probe and publish the scores; returns the seconds it took. Replicas leave the work to the first process."""
        begin = self.clock()
        if trainer.is_global_zero or isinstance(module.model, FSDPModule):
            with usable_parts(module.model):
                encoder = model_in_use(trainer, module).base_model
                scores = self.probe.run(Embedder(encoder, module.device, name="encoder"), first=step == 0)
            module.model.train()
            module.publish(scores, step)
        return self.clock() - begin

    def _kept(self) -> tuple[float | None, int | None]:
        """Seconds of a probe and spacing as they were found earlier, for the same settings."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.path.read_text())
            if kept["settings"] == asdict(self.settings):
                return float(kept["seconds"]), None if kept["every_n_steps"] is None else int(kept["every_n_steps"])
        return None, None

    def _keep(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            kept = {"settings": asdict(self.settings), "seconds": self._seconds, "every_n_steps": self._every}
            with suppress(OSError):  # a full disk: it is measured again after a restart
                write_text(self.path, json.dumps(kept, indent=2) + "\n")


@torch.no_grad()
def _run_whole_once(trainer: pl.Trainer, module: PretrainingModule) -> None:
    """Run a model that is cut into shards on one silent clip: before that, its parts cannot be called alone."""
    if isinstance(module.model, FSDPModule):
        config = module.model.config
        silence = torch.zeros(1, round(config.sampling_rate * config.max_seconds), device=module.device)
        with trainer.precision_plugin.forward_context():
            module.model.eval()(silence, generator=torch.Generator().manual_seed(0))
