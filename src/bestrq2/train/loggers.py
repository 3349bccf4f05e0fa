"""Loggers of a run: metrics.csv and TensorBoard always, Weights & Biases on request.

All get the same figures under the same names, and none can end the run. Nothing is sent anywhere unless `logging.wandb`
asks for it.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bestrq2.errors import ConfigError
from bestrq2.files import regular_file, write_text
from bestrq2.text import csv_line
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.settings import LoggingConfig

logger = logging.getLogger(__name__)

# Time for which a service that failed is left alone, s.
_RETRY_SECONDS = 60.0
# Beginning of the names of TensorBoard's files.
_EVENTS = "events.out.tfevents."


class Logger(ABC):
    """Destination of the figures of a run."""

    label: str
    retry_seconds = 0.0

    @abstractmethod
    def add(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of a step (steps done, from 1)."""

    def save(self) -> None:  # noqa: B027
        """Write what was added since the last time; what could not be written is still there the next time."""

    def close(self, succeeded: bool) -> None:  # noqa: B027
        """Write the rest and close."""


class Loggers:
    """All loggers of a run; a failing one is warned about once, gets its figures later, and training goes on.

    Used as a context, which closes them.

    Args:
        loggers: the loggers; none in all processes but the first.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = list(loggers)
        self._waiting: dict[Logger, list[tuple[dict[str, float], int]]] = {one: [] for one in self.loggers}
        self._not_before = dict.fromkeys(self.loggers, 0.0)
        self._warned: set[Logger] = set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand values to every logger that is not left alone after a failure; for the others they wait."""
        for one in self.loggers:
            self._waiting[one].append((dict(values), step))
            if time.monotonic() >= self._not_before[one]:
                self._try(one, lambda one=one: self._deliver(one))  # type: ignore[misc]

    def _deliver(self, one: Logger) -> None:
        waiting = self._waiting[one]
        while waiting:
            one.add(*waiting[0])
            del waiting[0]
        one.save()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for one in self.loggers:
            self._try(one, lambda one=one: self._deliver(one))  # type: ignore[misc]
            self._try(one, lambda one=one: one.close(kind is None))  # type: ignore[misc]

    def _try(self, one: Logger, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # any error of a service: figures are not worth a run
            self._not_before[one] = time.monotonic() + one.retry_seconds
            if one not in self._warned:
                self._warned.add(one)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                logger.warning("%s cannot be written (%s); training goes on, and figures wait", one.label, reason)


def make_loggers(config: LoggingConfig, folder: RunFolder, start: int, settings: dict[str, Any]) -> Loggers:
    """The loggers of a run.

    Args:
        config: services to use.
        folder: run folder.
        start: step from which training (re)starts; later figures are made again.
        settings: all settings of the run, for services that show them.

    Raises:
        ConfigError: a package is missing, or a run cannot be opened at a service.
    """
    loggers: list[Logger] = [MetricsFile(folder.metrics, start), TensorBoard(folder.root / "tensorboard", start)]
    if config.wandb is not None:
        loggers.append(WandbRun(config, folder, settings))
    return Loggers(loggers)


class MetricsFile(Logger):
    """A CSV file with the column `step` and one column per metric, exact over interruptions.

    A resumed run keeps the rows up to the step from which it starts and drops later ones, which are made again.

    Args:
        path: the file.
        start_step: step from which training (re)starts.
    """

    label = "metrics.csv"

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self.path = path
        self._rows: dict[int, dict[str, str]] = {}
        self._columns: list[str] = []
        # Rows as they are in the file, so that saving one more does not format all earlier ones again.
        self._lines: dict[int, str] = {}
        if path.exists() and start_step:
            with regular_file(path).open(newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.DictReader(file):
                    if (row.get("step") or "").isdecimal() and int(row["step"]) <= start_step:
                        self._rows[int(row.pop("step"))] = row
                        self._columns = list(row)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add values to the row of a step."""
        cells = {key: repr(value) for key, value in values.items()}
        if cells:
            self._rows.setdefault(step, {}).update(cells)
            self._lines.pop(step, None)
            if new := [key for key in cells if key not in self._columns]:
                self._columns += new
                self._lines.clear()

    def save(self) -> None:
        """Write the table."""
        for step in self._rows.keys() - self._lines.keys():
            self._lines[step] = csv_line([step, *(self._rows[step].get(name, "") for name in self._columns)])
        lines = [self._lines[step] for step in sorted(self._lines)]
        write_text(self.path, "".join([csv_line(["step", *self._columns]), *lines]))


class TensorBoard(Logger):
    """Scalars for TensorBoard, written by PyTorch's `SummaryWriter`, one event file per start of the run.

    After a failure, such as a full disk, the next figures go to a new file: the thread of the old writer has ended.
    What it had not written is missing from TensorBoard; metrics.csv has it.

    Args:
        folder: folder of the event files.
        start_step: step from which training (re)starts; TensorBoard ignores what earlier files hold of later steps.
    """

    label = "TensorBoard"

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        self.folder = folder
        self._purge_step = start_step + 1 if start_step else None
        self._writer: Any = None

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add values of a step."""
        if self._writer is None:
            self._writer = self._open()
            self._purge_step = None
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Write what was added.

        Raises:
            OSError: if the disk is full.
        """
        if self._writer is None:  # nothing was added so far
            return
        try:
            self._writer.flush()
        except Exception:
            self._writer = None
            raise

    def close(self, succeeded: bool) -> None:
        """Write the rest and close."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads files in the order of their names, which hold the second of their start
        names = [path.name.removeprefix(_EVENTS).split(".")[0] for path in self.folder.glob(f"{_EVENTS}*")]
        if str(int(time.time())) in names:
            time.sleep(1.0)
        return SummaryWriter(str(self.folder), purge_step=self._purge_step)


class WandbRun(Logger):
    """A run at Weights & Biases, continued under its id after a resume.

    Args:
        config: project and name.
        folder: run folder, which keeps the id in logging.json.
        settings: all settings of the run.

    Raises:
        ConfigError: the package is missing, or the run cannot be opened.
    """

    label = "Weights & Biases"
    retry_seconds = _RETRY_SECONDS

    def __init__(self, config: LoggingConfig, folder: RunFolder, settings: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("logging.wandb: the package wandb is missing; pip install 'bestrq2[wandb]'")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        ids = folder.root / "logging.json"
        try:
            known = json.loads(ids.read_text()) if ids.exists() else {}
        except (OSError, ValueError):
            known = {}
        name = str(known.get("wandb") or uuid.uuid4().hex[:8])
        try:
            import wandb

            self._run = wandb.init(
                project=config.wandb,
                name=config.run_name or folder.root.resolve().name,
                id=name,
                resume="allow",
                dir=folder.root,
                config=settings,
            )
            self._run.define_metric("*", step_metric="step", step_sync=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"logging.wandb: no run can be opened ({reason}); log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        write_text(ids, json.dumps({**known, "wandb": name}) + "\n")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Send values of a step."""
        self._run.log({**values, "step": step})

    def close(self, succeeded: bool) -> None:
        """Close the run, so that the next one of this process is another."""
        self._run.finish(exit_code=0 if succeeded else 1)
