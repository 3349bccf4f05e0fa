"""metrics.csv: one row a step, whatever order the figures come in."""

from __future__ import annotations

import csv
from pathlib import Path

from bestrq2.train.metrics import MetricsFile


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_saved_before_a_column_is_known_get_it_too(tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.log_metrics({"train/loss": 2.5}, 10)
    metrics.save()
    metrics.log_metrics({"train/loss": 2.25}, 20)
    metrics.log_metrics({"validation/loss": 3.0}, 10)
    metrics.save()
    assert rows(metrics.path) == [
        {"step": "10", "train/loss": "2.5", "validation/loss": "3.0"},
        {"step": "20", "train/loss": "2.25", "validation/loss": ""},
    ]


def test_saving_after_every_row_gives_the_bytes_of_saving_once(tmp_path: Path):
    often, once = MetricsFile(tmp_path / "often.csv"), MetricsFile(tmp_path / "once.csv")
    for step in (30, 10, 20, 10):  # also out of order, and a row again
        for metrics in (often, once):
            metrics.log_metrics({"train/loss": step / 7, f"probe/{step % 4}": 1.0}, step)
        often.save()
    once.save()
    assert often.path.read_bytes() == once.path.read_bytes()


def test_a_file_taken_up_again_keeps_rows_up_to_the_step_and_drops_later_ones(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    for step in (1, 2, 3):
        metrics.log_metrics({"train/loss": 1 / step}, step)
    metrics.save()
    again = MetricsFile(path, start_step=2)
    again.log_metrics({"train/loss": 0.125}, 3)
    again.save()
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [("1", "1.0"), ("2", "0.5"), ("3", "0.125")]
