"""metrics.csv: one wide table that survives kills and goes on after a resume."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from bestrq2.files import write_text


class MetricsFile(Logger):
    """Logs into a CSV file with the column `step` and one column per metric.

    Lightning's own CSV logger empties its file when a run is resumed; this one keeps the rows up to the step that
    training resumes from and drops later ones, which will be made again.

    Args:
        path: the file.
        start_step: step that training (re)starts from.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, str]] = {}
        self._columns: list[str] = []
        # Rows as they stand in the file, so that saving one more does not spell out all that came before.
        self._lines: dict[int, str] = {}
        if path.exists() and start_step:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("step") and int(row["step"]) <= start_step:
                        self._rows[int(row.pop("step"))] = row
                        self._columns = list(row)

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
        """Add values to the row of a step (steps done, from 1)."""
        values = {key: repr(float(value)) for key, value in metrics.items() if key != "epoch"}
        if values:
            self._rows.setdefault(step or 0, {}).update(values)
            self._lines.pop(step or 0, None)
            if new := [key for key in values if key not in self._columns]:
                self._columns += new
                self._lines.clear()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Write the table."""
        for step in self._rows.keys() - self._lines.keys():
            self._lines[step] = self._line([step, *(self._rows[step].get(name, "") for name in self._columns)])
        lines = [self._lines[step] for step in sorted(self._lines)]
        write_text(self.path, "".join([self._line(["step", *self._columns]), *lines]))

    @staticmethod
    def _line(cells: list[Any]) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()
