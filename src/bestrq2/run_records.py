"""Reader of the files of a run: settings (config.yaml) and tables over steps (metrics.csv, timing.csv)."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from bestrq2.errors import DataError
from bestrq2.files import regular_file

# the safe loader in C where PyYAML has it: ten times as fast
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Curve = tuple[NDArray[np.int64], NDArray[np.float64]]

CODE_USAGE = ("target_entropy", "code_perplexity", "code_coverage", "top_code_share")
AVERAGED = frozenset(f"train/{name}" for name in ("loss", "excess_loss", "accuracy", *CODE_USAGE))
"""Columns of metrics.csv that are means over the steps since the previous row; in runs of this version those of
`CODE_USAGE` are over all steps since the first."""


def read_settings(path: Path) -> dict[str, Any]:
    """Read nested settings, such as those of `config.yaml`; empty where the file holds something else.

    Raises:
        DataError: the file cannot be read as YAML.
    """
    loaded = read_yaml(path)
    return loaded if isinstance(loaded, dict) else {}


def earlier_setting(settings: dict[str, Any]) -> str | None:
    """Setting by which a run learns what only earlier versions can, if it has one, such as "model.mask_shape block"."""
    model, gone = settings.get("model"), {"mask_shape": "uniform", "masks_per_clip": 1}
    for name, only in {**gone, "predictor_context_positions": False}.items():
        if isinstance(model, dict) and (found := model.get(name, only)) != only:
            return f"model.{name} {found}"
    return None


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        DataError: the file cannot be read as YAML.
    """
    try:
        return yaml.load(regular_file(path).read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error


def is_finetuned(run: Path) -> bool:
    """Whether a folder holds a run of `bestrq2 finetune`."""
    try:
        return (run / "config.yaml").is_file() and "labelled" in read_settings(run / "config.yaml")
    except DataError:
        return False


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to {"model.hidden_size": 768}; settings nearer the root come first."""
    flat = {f"{prefix}{key}": value for key, value in settings.items() if not isinstance(value, dict)}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat


def read_run_settings(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a pretraining run under dotted names.

    `loader.batch_seconds` is also given for runs of earlier versions, which have `loader.batch_size` in clips.

    Raises:
        DataError: the file cannot be read as YAML, or `loader.batch_size` is not a whole number.
    """
    settings = flatten(read_settings(path))
    clips = settings.pop("loader.batch_size", None)
    if clips is not None:
        if not isinstance(clips, int):
            raise DataError(f"{path}: loader.batch_size must be a whole number, found {clips!r}")
        settings["loader.batch_seconds"] = clips * float(settings.get("model.max_seconds", 10.0))
    return settings


def teacher_gflops(run: Path) -> float:
    """Operations per clip, in GFLOPs, of the encoder from which a run has codes; 0 where there is none."""
    return _gflops(run, "teacher", "gflops_per_clip")


def initial_gflops(run: Path) -> float:
    """Operations, in GFLOPs, that trained the weights from which a run started; 0 for random ones or if unknown."""
    return _gflops(run, "init", "training_gflops")


def _gflops(run: Path, model: str, name: str) -> float:
    try:
        return float(json.loads(regular_file(run / "environment.json").read_text())[model][name])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def read_columns(path: Path) -> list[str]:
    """Read the names of the columns of a table; none for an empty file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with regular_file(path).open(newline="", encoding="utf-8", errors="replace") as file:
            return next(csv.reader(file), [])
    except (OSError, csv.Error) as error:
        raise _unreadable(path, error) from error


def read_table(path: Path) -> dict[str, Curve]:
    """Read a wide table with a column `step`.

    Steps written twice, as after a resume, keep their later value; cells that are not a finite number, rows cut short
    by a kill, and the column `epoch` are skipped.

    Returns:
        Column → (steps int64 [N] rising, values float64 [N]).

    Raises:
        DataError: the file cannot be read, or has no column `step`.
    """
    logged: dict[str, dict[int, float]] = {}
    for step, row in _read_rows(path):
        for column, cell in row.items():
            value = _finite(cell)
            if value is not None and column not in ("step", "epoch"):
                logged.setdefault(column, {})[step] = value
    curves = {}
    for column, values in logged.items():
        steps = sorted(values)
        curves[column] = (np.array(steps, dtype=np.int64), np.array([values[step] for step in steps]))
    return curves


def read_metrics(path: Path) -> dict[str, Curve]:
    """Read metrics.csv of a pretraining run as `read_table` does, for everything that shows or compares its values.

    The last training values are dropped where they average fewer steps than the others: a run always logs its last
    step. In runs of earlier versions, validation/excess_loss was the loss minus the entropy of the validation clips,
    which are so few that it is a nat too low: it is computed again with the entropy of training, as in runs of this
    version, and the usage of codes in validation is left out.

    Raises:
        DataError: as `read_table`.
    """
    curves = {name: without_rest(curve) if name in AVERAGED else curve for name, curve in read_table(path).items()}
    usage = [f"validation/{name}" for name in CODE_USAGE if f"validation/{name}" in curves]
    if usage:
        curves = {name: curve for name, curve in curves.items() if name not in (*usage, "validation/excess_loss")}
        if "validation/loss" in curves and "train/target_entropy" in curves:
            steps, losses = curves["validation/loss"]
            curves["validation/excess_loss"] = steps, losses - np.interp(steps, *curves["train/target_entropy"])
    return curves


def without_rest(curve: Curve) -> Curve:
    """Drop the last value of a curve if it came after fewer steps than the others."""
    steps, values = curve
    windows = np.diff(steps, prepend=0)
    shorter = len(steps) > 1 and windows[-1] < np.median(windows[:-1])
    return (steps[:-1], values[:-1]) if shorter else curve


def newest_step(path: Path) -> int | None:
    """Read the last step of a table, even one without values; None where there is none.

    Raises:
        DataError: the file cannot be read, or has no column `step`.
    """
    return max((step for step, _ in _read_rows(path)), default=None)


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a table with their steps, in the order of the file."""
    try:
        with regular_file(path).open(newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.DictReader(file)
            if "step" not in (rows.fieldnames or ()):
                raise DataError(f"{path} has no column 'step'; it found {rows.fieldnames or 'an empty file'}")
            return [(int(step), row) for row in rows if (step := _finite(row["step"])) is not None]
    except (OSError, csv.Error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error}); a run folder holds a metrics.csv")


def _finite(cell: object) -> float | None:
    if not isinstance(cell, str):
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
