"""The same figures under the same names everywhere, and no logger that can end a run."""

from __future__ import annotations

import errno
import importlib.util
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger
from small_run import at_step, die, metrics, small_pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bestrq2.data.rejections import RejectionLog
from bestrq2.errors import ConfigError
from bestrq2.train import loggers, pretraining
from bestrq2.train.loggers import EventFile, SteadyLogger
from bestrq2.train.metrics import MetricsFile

Figures = dict[tuple[str, int], float]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "write_run_report", lambda *_: None)


def in_csv(run: Path) -> Figures:
    return {
        (name, int(row["step"])): float(value)
        for row in metrics(run)
        for name, value in row.items()
        if name != "step" and value
    }


def in_tensorboard(folder: Path) -> Figures:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    figures = {(name, step): value for name, step, value in found}
    assert len(figures) == len(found)  # nothing twice
    return figures


def test_tensorboard_shows_what_metrics_csv_holds_also_after_a_kill_and_a_resume(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = {"log_every_n_steps": 1, "checkpoint_every_n_steps": 3, "val_every_n_steps": 4}
    with monkeypatch.context() as patch:
        at_step(patch, 5, die)  # steps 4 and 5 are made again
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(recordings, tmp_path / "run", trainer=trainer)
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(loggers.time, "time", lambda: now() - 5)  # a clock that was put right in between
        run = small_pretrain(recordings, tmp_path / "run", trainer=trainer, resume=True)
    assert len(list((run / "tensorboard").iterdir())) == 2
    expected = in_csv(run)
    assert {step for _, step in expected} == {1, 2, 3, 4, 5, 6}
    assert {"train/loss", "train/skipped_steps", "validation/loss"} <= {name for name, _ in expected}
    assert in_tensorboard(run / "tensorboard") == pytest.approx(expected, rel=1e-6)


def test_mlflow_gets_the_same_figures_and_goes_on_with_the_same_run(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    settings: dict[str, Any] = {
        "trainer": {"log_every_n_steps": 1, "checkpoint_every_n_steps": 3},
        "logging": {"mlflow": str(tmp_path / "store"), "run_name": "tones"},
    }
    with monkeypatch.context() as patch:
        at_step(patch, 3, die)
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(recordings, tmp_path / "run", **settings)
    run = small_pretrain(recordings, tmp_path / "run", **settings, resume=True)
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "store").as_uri())
    (experiment,) = (each for each in client.search_experiments() if each.name == "bestrq2")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("tones", "FINISHED")
    assert found.data.params["optimizer/lr"] == str(
        yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"]
    )
    expected = in_csv(run)
    figures = {
        (name, each.step): each.value
        for name in found.data.metrics
        for each in client.get_metric_history(found.info.run_id, name)
    }
    assert figures == pytest.approx(expected)
    assert {step for _, step in figures} == {1, 2, 3, 4, 5, 6}


def test_wandb_gets_the_same_figures_and_goes_on_with_the_same_run(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    wandb = pytest.importorskip("wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings: dict[str, Any] = {"trainer": {"log_every_n_steps": 1, "max_steps": 2}, "logging": {"wandb": "tests"}}
    logged, opened = [], []
    original = wandb.Run.log

    def log(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        opened.append((self.id, self.project, self.name, self.config["optimizer"]["lr"], self.offline))
        logged.append(dict(data))
        original(self, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", log)
    run = small_pretrain(recordings, tmp_path / "run", **settings)
    settings["trainer"]["max_steps"] = 3
    small_pretrain(recordings, tmp_path / "run", **settings, resume=True)
    assert wandb.run is None  # closed
    lr = yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"]
    assert {entry[1:] for entry in opened} == {("tests", "run", lr, True)}
    assert len({entry[0] for entry in opened}) == 1
    figures: Figures = {}
    for entry in logged:
        step = entry.pop("trainer/global_step")
        figures |= {(name, step): value for name, value in entry.items()}
    assert figures == pytest.approx(in_csv(run))
    assert len(list((run / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_done(
    service: str, tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == service else original(name))
    with pytest.raises(ConfigError, match=rf"pip install 'bestrq2\[{service}\]'"):
        small_pretrain(recordings, tmp_path / "run", logging={service: "x"})


def test_nothing_is_imported_that_was_not_asked_for(finished_run: Path):
    from bestrq2.train.config import resolve
    from bestrq2.train.run_folder import RunFolder

    config = resolve(yaml.safe_load((finished_run / "config.yaml").read_text()))
    made = loggers.make_loggers(config, RunFolder(finished_run), 0)
    assert [type(each.inner) for each in made] == [MetricsFile, EventFile]  # type: ignore[attr-defined]


def test_a_service_that_cannot_be_opened_is_an_error_of_one_sentence(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"logging\.mlflow: no run can be opened"):
        small_pretrain(recordings, tmp_path / "run", logging={"mlflow": "http://127.0.0.1:9"})


class Unreliable(Logger):
    """Takes figures only while it works."""

    name, version = "unreliable", "1"

    def __init__(self) -> None:
        super().__init__()
        self.works = True
        self.taken: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self.works:
            raise ConnectionError("the network is down")
        self.taken.append((metrics, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_logger_in_trouble_is_warned_of_once_and_gets_its_figures_later(caplog: pytest.LogCaptureFixture):
    inner = Unreliable()
    steady = SteadyLogger("the service", inner)
    for step in range(1, 7):
        inner.works = step not in (2, 3, 5)
        steady.log_metrics({"train/loss": 1.0 / step}, step)
        steady.save()
    steady.finalize("success")
    assert inner.taken == [({"train/loss": 1.0 / step}, step) for step in range(1, 7)]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    expected = "the service cannot be written (the network is down); training goes on, and figures wait"
    assert record.getMessage() == expected


def test_a_service_in_trouble_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch):
    now, inner, calls = [100.0], Unreliable(), []
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(inner, "save", lambda: calls.append(now[0]))
    steady = SteadyLogger("the service", inner, retry_seconds=60.0)
    for seconds, works in ((100.0, True), (110.0, False), (120.0, True), (169.0, True), (171.0, True)):
        now[0], inner.works = seconds, works
        steady.log_metrics({"train/loss": seconds}, int(seconds))
        steady.save()
    assert calls == [100.0, 171.0]
    assert [step for _, step in inner.taken] == [100, 110, 120, 169, 171]


def test_a_full_disk_costs_no_figure(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    calls = {"csv": 0, "events": 0}
    write, save = MetricsFile.save, EventFile.save

    def full(kind: str, original: Any) -> Any:
        def method(self: Any) -> None:
            calls[kind] += 1
            if 2 <= calls[kind] <= 4:
                if kind == "events":  # a part of it arrives
                    with self.path.open("ab") as file:
                        file.write(self._new[0][:10])
                raise OSError(errno.ENOSPC, "No space left on device")
            original(self)

        return method

    monkeypatch.setattr(MetricsFile, "save", full("csv", write))
    monkeypatch.setattr(EventFile, "save", full("events", save))
    run = small_pretrain(recordings, tmp_path / "run", trainer={"log_every_n_steps": 1})
    figures = in_csv(run)
    assert {step for _, step in figures} == {1, 2, 3, 4, 5, 6}
    assert in_tensorboard(run / "tensorboard") == pytest.approx(figures, rel=1e-6)
    warned = [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()]
    assert sorted(text.split(" cannot")[0] for text in warned) == ["TensorBoard", "metrics.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_rejected_recordings_wait_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "rejected.csv"
    log = RejectionLog(path)
    log.path = Path("/dev/full")
    assert log.add([("a.wav", "silent")]) == 1
    assert log.add([("b.wav", "too short")]) == 1
    log.path = path
    assert log.add([("a.wav", "silent"), ("c.wav", "not audio")]) == 1
    assert path.read_text() == "path,reason\na.wav,silent\nb.wav,too short\nc.wav,not audio\n"
    assert len([record for record in caplog.records if "the disk is full" in record.getMessage()]) == 1
