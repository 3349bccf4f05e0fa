"""Where the figures of a run go: metrics.csv and TensorBoard always, Weights & Biases and MLflow where asked for.

Nothing is sent anywhere unless `logging.wandb` or `logging.mlflow` says so, and then neither package reports on itself.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import socket
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from bestrq2.errors import ConfigError
from bestrq2.files import write_text
from bestrq2.train.metrics import MetricsFile
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.settings import PretrainConfig

logger = logging.getLogger(__name__)

# A service that failed is left alone for so long, in seconds.
_RETRY_SECONDS = 60.0
# How TensorBoard knows its files.
_EVENTS = "events.out.tfevents."


def make_loggers(config: PretrainConfig, folder: RunFolder, start: int) -> list[Logger]:
    """The loggers of a run; all get the same figures under the same names, and none can end the run.

    Args:
        config: of the run.
        folder: of the run.
        start: step that training (re)starts from; later figures will be made again.

    Raises:
        ConfigError: if a package is missing.
    """
    loggers: list[Logger] = [
        SteadyLogger("metrics.csv", MetricsFile(folder.metrics, start)),
        SteadyLogger("TensorBoard", EventFile(folder.root / "tensorboard", start)),
    ]
    if config.logging.wandb is not None:
        _require("wandb", "wandb")
        loggers.append(SteadyLogger("Weights & Biases", WandbRun(config, folder), _RETRY_SECONDS))
    if config.logging.mlflow is not None:
        _require("mlflow", "mlflow")
        loggers.append(SteadyLogger("MLflow", MlflowRun(config, folder), _RETRY_SECONDS))
    return loggers


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"logging.{extra}: the package {package} is missing; pip install 'bestrq2[{extra}]'")


class SteadyLogger(Logger):
    """Hands figures to another logger; what cannot be delivered waits, and training goes on.

    Args:
        label: what to call it in a warning.
        inner: the other logger.
        retry_seconds: how long to leave it alone after it failed; figures wait meanwhile.
    """

    def __init__(self, label: str, inner: Logger, retry_seconds: float = 0.0) -> None:
        super().__init__()
        self.label = label
        self.inner = inner
        self.retry_seconds = retry_seconds
        self._waiting: list[tuple[dict[str, float], int | None]] = []
        self._warned = False
        self._not_before = 0.0

    @property
    def name(self) -> str | None:
        """As the other logger."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """As the other logger."""
        return self.inner.version

    @property
    def experiment(self) -> None:
        """Lightning asks for it once the processes are connected: the time to open a run at a service."""
        if isinstance(self.inner, WandbRun | MlflowRun):
            self.inner.start()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take figures; `save` delivers them."""
        self._waiting.append((dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: a run at a service is opened with its settings, and `config.yaml` holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Deliver what waits, if the other logger can take it."""
        if time.monotonic() >= self._not_before:
            self._try(self._deliver)

    def _deliver(self) -> None:
        while self._waiting:
            self.inner.log_metrics(*self._waiting[0])
            del self._waiting[0]
        self.inner.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Deliver the rest and close."""
        self._try(self._deliver)
        self._try(lambda: self.inner.finalize(status))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service raises: figures are not worth a run
            self._not_before = time.monotonic() + self.retry_seconds
            if not self._warned:
                self._warned = True
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                logger.warning("%s cannot be written (%s); training goes on, and figures wait", self.label, reason)


class EventFile(Logger):
    """Scalars as TensorBoard reads them, in a file of this process.

    Lightning's logger writes in a thread, which a full disk ends for good; this one appends what is new and, where that
    fails, appends it next time.

    Args:
        folder: where it lies, beside those of earlier processes.
        start_step: step that training (re)starts from; TensorBoard leaves out what earlier files say of later ones.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        super().__init__()
        unique = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self.path = folder / f"{_EVENTS}{_second_after_earlier_files(folder)}.{unique}"
        self._new: list[bytes] = []
        self._size = 0
        self._add(file_version="brain.Event:2")
        if start_step:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._add(session_log=SessionLog(status=SessionLog.START), step=start_step + 1)

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._new.append(record.getvalue())

    @property
    def name(self) -> str:
        """Empty: the run folder is the only one."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run folder is the only one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values of a step (steps done, from 1)."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(summary=Summary(value=values), step=step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Append what is new, wholly or not at all.

        Raises:
            OSError: if the disk is full or refuses.
        """
        self.path.parent.mkdir(exist_ok=True)
        content = b"".join(self._new)
        with self.path.open("ab", buffering=0) as file:
            file.truncate(self._size)  # drops what an earlier try wrote in part
            written = file.write(content)
            if written < len(content):
                raise OSError("the disk took a part only")
        self._size += len(content)
        self._new.clear()


def _second_after_earlier_files(folder: Path) -> int:
    # TensorBoard reads files in the order of their names; clocks may stand still between two starts, or go back
    earlier = (path.name.removeprefix(_EVENTS).split(".")[0] for path in folder.glob(f"{_EVENTS}*"))
    return max(int(time.time()), *(int(second) + 1 for second in earlier if second.isdecimal()), 0)


class WandbRun(WandbLogger):
    """A run at Weights & Biases, the same one after a resume.

    Args:
        config: of the run.
        folder: of the run; keeps the id.
    """

    def __init__(self, config: PretrainConfig, folder: RunFolder) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        self.ids = RunIds(folder)
        super().__init__(
            project=config.logging.wandb,
            name=config.logging.run_name or folder.root.resolve().name,
            save_dir=folder.root,
            id=self.ids.get("wandb") or uuid.uuid4().hex[:8],
        )
        self._config = config
        self._started = False

    @rank_zero_only
    def start(self) -> None:
        """Open the run, with its settings.

        Raises:
            ConfigError: if it cannot be opened.
        """
        if self._started:
            return
        with _opening("wandb", "log in with `wandb login`, or set WANDB_MODE=offline"):
            self.log_hyperparams(self._config.to_dict())
            self._started = True
            self.ids.keep("wandb", str(self.version))

    def finalize(self, status: str) -> None:
        """Close the run, so that the next one of this process is another."""
        if self._started:
            self.experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment, self._started = None, False


class MlflowRun(MLFlowLogger):
    """A run at MLflow, the same one after a resume.

    Args:
        config: of the run.
        folder: of the run; keeps the id.
    """

    def __init__(self, config: PretrainConfig, folder: RunFolder) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # A server that does not answer would otherwise be asked for minutes at each logged step.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        self.ids = RunIds(folder)
        target = str(config.logging.mlflow)
        is_uri = ":" in target or target in ("databricks", "databricks-uc", "uc")
        super().__init__(
            experiment_name="bestrq2",
            run_name=config.logging.run_name or folder.root.resolve().name,
            tracking_uri=target if is_uri else Path(target).expanduser().resolve().as_uri(),
            run_id=self.ids.get("mlflow"),
        )
        self._config = config
        self._started = False

    @rank_zero_only
    def start(self) -> None:
        """Open the run, with its settings.

        Raises:
            ConfigError: if it cannot be opened.
        """
        if self._started:
            return
        with _opening("mlflow", "name a tracking URI or a folder"):
            if self.ids.get("mlflow") is None:
                self.log_hyperparams(self._config.to_dict())
            else:
                self.experiment.update_run(self.run_id, status="RUNNING")
            self._started = True
            self.ids.keep("mlflow", str(self.run_id))


@contextmanager
def _opening(extra: str, advice: str) -> Iterator[None]:
    """Turn what a service raises while a run is opened in this block into one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"logging.{extra}: no run can be opened ({reason}); {advice}") from error


class RunIds:
    """What services call this run, in `logging.json` of the run folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.root / "logging.json"

    def _read(self) -> dict[str, str]:
        try:
            ids = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return ids if isinstance(ids, dict) else {}

    def get(self, service: str) -> str | None:
        """The run's id there; None where it has none yet."""
        return self._read().get(service)

    def keep(self, service: str, name: str) -> None:
        """Remember an id."""
        write_text(self.path, json.dumps({**self._read(), service: name}) + "\n")
