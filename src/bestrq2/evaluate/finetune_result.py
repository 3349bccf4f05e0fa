"""What fine-tuning reports: metrics with intervals, one row a class, and the predictions of the test recordings."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.evaluate.classification import Metric, class_table, metrics_with_intervals
from bestrq2.files import write_text
from bestrq2.inference.predicting import predictions_table

_RESULT = "test.json"
_CLASSES = "test-classes.csv"
_PREDICTIONS = "test-predictions.csv"
# More classes than that are not printed, only written.
_SHOWN = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class FinetuneResult:
    """Scores of a fine-tuned model on its test recordings.

    Attributes:
        output: the run folder.
        classes: names of the classes.
        multi_label: whether a recording may have any number of classes.
        best_epoch: the epoch whose weights were kept, from 1.
        clips: test recordings scored.
        metrics: with intervals.
        per_class: one row a class, see `class_table`.
    """

    output: Path
    classes: tuple[str, ...]
    multi_label: bool
    best_epoch: int
    clips: int
    metrics: tuple[Metric, ...]
    per_class: tuple[Row, ...]

    @classmethod
    def of(
        cls,
        output: Path,
        classes: tuple[str, ...],
        multi_label: bool,
        best_epoch: int,
        targets: np.ndarray,
        probabilities: np.ndarray,
        seed: int,
    ) -> FinetuneResult:
        """The scores of predictions, float [recordings, classes]; `seed` is of the bootstrap."""
        metrics = tuple(metrics_with_intervals(targets, probabilities, multi_label, seed))
        rows = tuple(class_table(classes, targets, probabilities, multi_label))
        return cls(output, classes, multi_label, best_epoch, len(targets), metrics, rows)

    @property
    def text(self) -> str:
        """The scores as plain text tables, in percent."""
        last = list(self.per_class[0])[-1]
        weakest = sorted(self.per_class, key=lambda row: math.inf if math.isnan(row[last]) else row[last])
        shown = self.per_class if len(self.classes) <= _SHOWN else weakest[:_SHOWN]
        parts = [_layout(self.metric_cells()), _layout(class_cells(shown))]
        if len(shown) < len(self.classes):
            parts.append(f"The weakest {_SHOWN} of {len(self.classes)} classes; {self.output / _CLASSES} has all.")
        parts.append(f"{self.clips} test clips, weights of epoch {self.best_epoch}, the best in validation.")
        return "\n\n".join(parts)

    def metric_cells(self) -> list[list[str]]:
        """The metrics in percent, as rows of a table below its header."""
        rows = [["test", "score", "95 % interval", "chance"]]
        for one in self.metrics:
            interval = f"[{_percent(one.low)}, {_percent(one.high)}]"
            rows.append([one.name, _percent(one.score), interval, _percent(one.chance)])
        return rows


def class_cells(per_class: Sequence[Row]) -> list[list[str]]:
    """Rows of `FinetuneResult.per_class` in percent, as rows of a table below its header; "-" for NaN."""
    kinds = list(per_class[0])[2:]
    rows = [["class", "clips", *kinds]]
    return rows + [[row["class"], str(row["clips"]), *(_percent(row[kind]) for kind in kinds)] for row in per_class]


def write_result(result: FinetuneResult, names: Sequence[str], targets: np.ndarray, probabilities: np.ndarray) -> None:
    """Write predictions, the table of classes and, last, the scores into the run folder.

    Args:
        result: the scores.
        names: of the test recordings.
        targets: [recordings, classes], what is true.
        probabilities: float [recordings, classes].
    """
    rows = list(zip(names, probabilities, strict=True))
    table = predictions_table(rows, result.classes, result.multi_label, truth=targets)
    write_text(result.output / _PREDICTIONS, table)
    classes = io.StringIO()
    writer = csv.DictWriter(classes, list(result.per_class[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _empty_for_nan(value) for key, value in row.items()} for row in result.per_class)
    write_text(result.output / _CLASSES, classes.getvalue())
    plain = {"format": 1} | {name: value for name, value in asdict(result).items() if name != "output"}
    write_text(result.output / _RESULT, json.dumps(_null_for_nan(plain), indent=1, allow_nan=False) + "\n")


def read_result(run: Path) -> FinetuneResult | None:
    """What `write_result` wrote; None where there is nothing that can be read."""
    try:
        found = json.loads((run / _RESULT).read_text(encoding="utf-8"))
        metrics = [Metric(one["name"], *map(_nan_for_null, list(one.values())[1:])) for one in found["metrics"]]
        rows = [{key: _nan_for_null(value) for key, value in row.items()} for row in found["per_class"]]
        return FinetuneResult(
            run, tuple(found["classes"]), found["multi_label"], found["best_epoch"], found["clips"], tuple(metrics),
            tuple(rows),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def _empty_for_nan(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _nan_for_null(value: Any) -> Any:
    return math.nan if value is None else value


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _layout(rows: list[list[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right; a rule below the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
