"""The same figures under the same names everywhere, and no logger that can end a run."""

from __future__ import annotations

import csv
import errno
import importlib.util
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_run import at_step, die, metrics, small_pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bestrq2.data.rejections import RejectionLog
from bestrq2.errors import ConfigError, StoppedBySignal
from bestrq2.train import loggers
from bestrq2.train.loggers import Logger, Loggers, MetricsFile

Figures = dict[tuple[str, int], float]


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
    run = small_pretrain(recordings, tmp_path / "run", trainer=trainer, resume=True)
    assert len(list((run / "tensorboard").iterdir())) == 2
    expected = in_csv(run)
    assert {step for _, step in expected} == {1, 2, 3, 4, 5, 6}
    assert {"train/loss", "train/skipped_steps", "validation/loss"} <= {name for name, _ in expected}
    assert in_tensorboard(run / "tensorboard") == pytest.approx(expected, rel=1e-6)


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
        step = entry.pop("step")
        figures |= {(name, step): value for name, value in entry.items()}
    assert figures == pytest.approx(in_csv(run))
    assert len(list((run / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_a_missing_package_is_named(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else original(name))
    with pytest.raises(ConfigError, match=r"pip install 'bestrq2\[wandb\]'"):
        small_pretrain(recordings, tmp_path / "run", logging={"wandb": "x"})


def test_a_service_that_cannot_be_opened_is_an_error_of_one_sentence(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"logging\.wandb: no run can be opened \(no such host\); log in"):
        small_pretrain(recordings, tmp_path / "run", logging={"wandb": "x"})


class Unreliable(Logger):
    """Takes figures only while it works."""

    label = "the service"

    def __init__(self) -> None:
        self.works = True
        self.taken: list[tuple[dict[str, float], int]] = []
        self.closed: list[bool] = []

    def add(self, values: Any, step: int) -> None:
        if not self.works:
            raise ConnectionError("the network is down")
        self.taken.append((values, step))

    def close(self, succeeded: bool) -> None:
        self.closed.append(succeeded)


def test_a_logger_in_trouble_is_warned_about_once_and_gets_its_figures_later(caplog: pytest.LogCaptureFixture):
    inner = Unreliable()
    with Loggers([inner]) as all_of_them:
        for step in range(1, 7):
            inner.works = step not in (2, 3, 5)
            all_of_them.log({"train/loss": 1.0 / step}, step)
    assert inner.taken == [({"train/loss": 1.0 / step}, step) for step in range(1, 7)]
    assert inner.closed == [True]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    expected = "the service cannot be written (the network is down); training goes on, and figures wait"
    assert record.getMessage() == expected


def test_a_service_in_trouble_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch):
    now, inner, calls = [100.0], Unreliable(), []
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(inner, "save", lambda: calls.append(now[0]))
    inner.retry_seconds = 60.0
    all_of_them = Loggers([inner])
    for seconds, works in ((100.0, True), (110.0, False), (120.0, True), (169.0, True), (171.0, True)):
        now[0], inner.works = seconds, works
        all_of_them.log({"train/loss": seconds}, int(seconds))
    assert calls == [100.0, 171.0]
    assert [step for _, step in inner.taken] == [100, 110, 120, 169, 171]


def test_a_full_disk_costs_no_row_of_metrics_csv_and_tensorboard_continues_in_a_new_file(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    calls = {"csv": 0, "events": 0}
    save, flush = MetricsFile.save, SummaryWriter.flush

    def full(kind: str, original: Any) -> Any:
        def method(self: Any) -> None:
            calls[kind] += 1
            if calls[kind] == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(self)

        return method

    monkeypatch.setattr(MetricsFile, "save", full("csv", save))
    monkeypatch.setattr(SummaryWriter, "flush", full("events", flush))
    run = small_pretrain(recordings, tmp_path / "run", trainer={"log_every_n_steps": 1})
    figures = in_csv(run)
    assert {step for _, step in figures} == {1, 2, 3, 4, 5, 6}
    shown = in_tensorboard(run / "tensorboard")
    assert {step for _, step in shown} >= {1, 2, 4, 5, 6}
    assert shown == pytest.approx({key: figures[key] for key in shown}, rel=1e-6)
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


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_saved_before_a_column_is_known_get_it_too(tmp_path: Path):
    table = MetricsFile(tmp_path / "metrics.csv")
    table.add({"train/loss": 2.5}, 10)
    table.save()
    table.add({"train/loss": 2.25}, 20)
    table.add({"validation/loss": 3.0}, 10)
    table.save()
    assert csv_rows(table.path) == [
        {"step": "10", "train/loss": "2.5", "validation/loss": "3.0"},
        {"step": "20", "train/loss": "2.25", "validation/loss": ""},
    ]


def test_saving_after_every_row_gives_the_bytes_of_saving_once(tmp_path: Path):
    often, once = MetricsFile(tmp_path / "often.csv"), MetricsFile(tmp_path / "once.csv")
    for step in (30, 10, 20, 10):  # also out of order, and a row again
        for table in (often, once):
            table.add({"train/loss": step / 7, f"probe/{step % 4}": 1.0}, step)
        often.save()
    once.save()
    assert often.path.read_bytes() == once.path.read_bytes()


def test_a_file_taken_up_again_keeps_rows_up_to_the_step_and_drops_later_ones(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path)
    for step in (1, 2, 3):
        table.add({"train/loss": 1 / step}, step)
    table.save()
    with path.open("ab") as file:
        file.write(b"\xff\xfe,4\n")  # a damaged row
    again = MetricsFile(path, start_step=2)
    again.add({"train/loss": 0.125}, 3)
    again.save()
    assert [(row["step"], row["train/loss"]) for row in csv_rows(path)] == [("1", "1.0"), ("2", "0.5"), ("3", "0.125")]


def timing(run: Path):
    with (run / "timing.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]


def test_seconds_rise_over_a_run_and_go_on_after_a_resume(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 4, "log_every_n_steps": 2})
    first = timing(run)
    assert [step for step, _ in first] == [2, 3, 4]  # logged every second step, and saved every third
    small_pretrain(recordings, run, trainer={"max_steps": 8, "log_every_n_steps": 2}, resume=True)
    both = timing(run)
    assert both[:3] == first
    assert [step for step, _ in both] == [2, 3, 4, 6, 8]
    assert (np.diff([seconds for _, seconds in both]) > 0).all()


def test_seconds_of_a_run_that_was_stopped_before_it_logged_go_on(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    trainer = {"max_steps": 4, "log_every_n_steps": 50, "checkpoint_every_n_steps": 50}
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(StoppedBySignal):
            small_pretrain(recordings, tmp_path / "run", trainer=trainer)
    assert "TensorBoard" not in caplog.text
    stopped = timing(tmp_path / "run")
    both = timing(small_pretrain(recordings, tmp_path / "run", trainer=trainer, resume=True))
    assert both[:1] == stopped
    assert [step for step, _ in both] == [2, 3, 4]
    assert (np.diff([seconds for _, seconds in both]) > 0).all()


def test_a_damaged_file_costs_no_run_and_part_of_the_time_is_not_given_for_all(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 2, "log_every_n_steps": 1})
    damaged = "step,seconds\nfew,many\n"
    (run / "timing.csv").write_text(damaged)
    small_pretrain(recordings, run, trainer={"max_steps": 3, "log_every_n_steps": 1}, resume=True)
    assert (run / "timing.csv").read_text() == damaged
