"""timing.csv: how long a run has taken up to each logged step."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from bestrq2.errors import DataError
from bestrq2.files import write_text
from bestrq2.run_records import read_table
from bestrq2.train.callbacks import finished_step


class Timing(pl.Callback):
    """Writes the seconds of training up to every logged step, over all parts of a run that was resumed.

    They stand in a file of their own, because metrics.csv is the same to the byte however often a run was interrupted.

    Args:
        path: the file, with the columns step and seconds.
        start: step that training (re)starts from; later rows are dropped.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.rows: dict[int, float] = {}
        self._before = self._began = 0.0
        if start:
            # A file that is missing or damaged costs a figure, not the run; part of the time would be a wrong figure.
            with suppress(DataError, KeyError):
                steps, seconds = read_table(path)["seconds"]
                self.rows = {
                    int(step): float(value) for step, value in zip(steps, seconds, strict=True) if step <= start
                }
                self._before = max(self.rows.values(), default=0.0)
        self._known = not start or bool(self.rows)
        self._start = start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def seconds_per_step(self, step: int) -> float:
        """Mean over the steps so far; over those since the restart where earlier times are lost."""
        since = time.monotonic() - self._began
        return (self._before + since) / step if self._known else since / max(1, step - self._start)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time of a step whose averages are logged."""
        step, settings = finished_step(module, batch), module.config.trainer
        due = step is not None and (step % settings.log_every_n_steps == 0 or step == settings.max_steps)
        if step is None or not due or not self._known or not trainer.is_global_zero:
            return
        self.rows[step] = self._before + time.monotonic() - self._began
        lines = [f"{step},{seconds:.3f}\n" for step, seconds in sorted(self.rows.items())]
        with suppress(OSError):
            write_text(self.path, "step,seconds\n" + "".join(lines))
