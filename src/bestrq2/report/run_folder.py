"""Reads the curves and the most telling settings of a run folder."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bestrq2.errors import DataError
from bestrq2.report.contents import RunCurves

# Last part of a setting's dotted name → what the report calls it, in the order shown.
TELLING_SETTINGS = {
    "recipe": "recipe",
    "objective": "objective",
    "data": "data",
    "hidden_size": "width",
    "num_hidden_layers": "encoder layers",
    "predictor_num_layers": "predictor layers",
    "codebook_size": "codes",
    "num_codebooks": "codebooks",
    "mask_ratio": "share hidden",
    "batch_size": "batch size",
    "max_steps": "steps",
    "lr": "learning rate",
    "precision": "precision",
    "seed": "seed",
}


def read_curves(run_folder: Path) -> RunCurves:
    """Curves and facts of the run in `run_folder`.

    Reads `metrics.csv` (a wide table: column `step`, one column per metric, empty where a metric was not logged at
    that step) and, where there is one, `config.yaml`. Steps logged twice, as after a resume, keep their later value;
    cells that are no finite number and rows cut short by a kill are passed over.

    Raises:
        DataError: there is no readable metrics.csv with a `step` column.
    """
    run_folder = Path(run_folder)
    settings = _flatten(_read_config(run_folder / "config.yaml"))
    by_last_part: dict[str, Any] = {}
    for name, value in settings.items():
        by_last_part.setdefault(name.rsplit(".", 1)[-1], value)
    facts = {
        label: _setting_text(by_last_part[setting])
        for setting, label in TELLING_SETTINGS.items()
        if by_last_part.get(setting) is not None
    }
    if facts.get("objective") == "one_stage":
        facts.pop("predictor layers", None)  # there is no predictor
    name = run_folder.resolve().name
    return RunCurves(name, facts.get("recipe", name), facts, _read_metrics(run_folder / "metrics.csv"))


def _read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric → (steps int64 [N] rising, values float64 [N])."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.DictReader(file)
            if "step" not in (rows.fieldnames or []):
                raise DataError(f"{path} has no column 'step'; it found {rows.fieldnames or 'an empty file'}")
            logged: dict[str, dict[int, float]] = {}
            for row in rows:
                step = _finite(row["step"])
                if step is None:
                    continue
                for metric, cell in row.items():
                    value = _finite(cell) if metric not in (None, "step", "epoch") else None
                    if value is not None:
                        logged.setdefault(metric, {})[int(step)] = value
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); a run folder holds a metrics.csv") from error
    curves = {}
    for metric, values in logged.items():
        steps = sorted(values)
        curves[metric] = (np.array(steps, dtype=np.int64), np.array([values[step] for step in steps]))
    return curves


def _finite(cell: object) -> float | None:
    if not isinstance(cell, str):
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_config(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"model.hidden_size": 768}; settings nearer the root come first."""
    if not isinstance(tree, dict):
        return {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(value, dict):
            flat[f"{prefix}{key}"] = value
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _setting_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return "–".join(map(_setting_text, value)) if len(value) == 2 else ", ".join(map(_setting_text, value))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)
