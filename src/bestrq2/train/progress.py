"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from bestrq2.train.callbacks import finished_step
from bestrq2.train.module import PretrainingModule
from bestrq2.train.waiting import DataClock


class Progress(pl.Callback):
    """Shows loss, accuracy, code perplexity, clips/s, the share of time spent waiting for data, and the time left.

    Args:
        label: what stands before it.
        lines_every_seconds: how often a line is printed where there is no terminal.
    """

    def __init__(self, label: str = "pretrain", lines_every_seconds: float = 10.0) -> None:
        self.label = label
        self.lines_every_seconds = lines_every_seconds
        self.clock = DataClock()
        self._bar: Any = None
        self._first_step = self._clips = 0
        self._line_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._first_step = trainer.global_step
        self.clock.start(module.device)
        self._line_at = time.monotonic()
        if sys.stderr.isatty() and trainer.is_global_zero:
            self._bar = tqdm(
                total=module.config.trainer.max_steps, initial=self._first_step, desc=self.label, unit="step",
                dynamic_ncols=True, bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
            )  # fmt: skip

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Stop waiting for data."""
        self.clock.batch_arrived()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show where the run is."""
        self.clock.batch_ended()
        self._clips += len(batch) * trainer.world_size
        step = finished_step(module, batch)
        if step is None or not trainer.is_global_zero:
            return
        now, elapsed = time.monotonic(), max(1e-9, self.clock.elapsed)
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(module, step, elapsed), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._line_at >= self.lines_every_seconds or step == module.config.trainer.max_steps:
            self._line_at = now
            status = self._status(module, step, elapsed)
            print(f"{self.label}: step {step}/{module.config.trainer.max_steps}, {status}", file=sys.stderr, flush=True)

    def _status(self, module: PretrainingModule, step: int, elapsed: float) -> str:
        latest, parts = module.latest, []
        for name, label in (("loss", "loss"), ("accuracy", "acc"), ("code_perplexity", "codes")):
            value = latest.get(f"train/{name}")
            if value is not None:
                text = {"loss": f"{value:.3f}", "acc": f"{100 * value:.1f}%", "codes": f"{value:.0f}"}[label]
                parts.append(f"{label} {text}")
        left = (module.config.trainer.max_steps - step) * elapsed / max(1, step - self._first_step)
        parts += [
            f"{self._clips / elapsed:.1f} clips/s",
            f"{100 * self.clock.waited / elapsed:.0f}% waiting for data",
            f"{tqdm.format_interval(left)} left",
        ]
        return ", ".join(parts)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
