"""Reads the curves and the most telling settings of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bestrq2.errors import DataError
from bestrq2.report.contents import RunCurves
from bestrq2.run_records import flatten, read_settings, read_table, whole_windows

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
    that step) and, where there is one, `config.yaml`.

    Raises:
        DataError: there is no readable metrics.csv with a `step` column.
    """
    run_folder = Path(run_folder)
    by_last_part: dict[str, Any] = {}
    for name, value in _settings(run_folder / "config.yaml").items():
        by_last_part.setdefault(name.rsplit(".", 1)[-1], value)
    facts = {
        label: value_text(by_last_part[setting], setting)
        for setting, label in TELLING_SETTINGS.items()
        if by_last_part.get(setting) is not None
    }
    if facts.get("objective") == "one_stage":
        facts.pop("predictor layers", None)  # there is no predictor
    name, curves = run_folder.resolve().name, whole_windows(read_table(run_folder / "metrics.csv"))
    return RunCurves(name, facts.get("recipe", name), facts, curves)


def _settings(path: Path) -> dict[str, Any]:
    """Settings under dotted names; none where they cannot be read, for curves can be drawn without."""
    try:
        return flatten(read_settings(path))
    except DataError:
        return {}


def value_text(value: object, name: str = "") -> str:
    """A setting for people: "20,000", "16 x 16", and of the name "mask_ratio" "0.4–0.6"."""
    if isinstance(value, list | tuple):
        between = "–" if name.endswith("ratio") else ", " if len(value) != 2 or name.endswith("betas") else " x "
        one = between == "–" and all(item == value[0] for item in value)
        return between.join(map(value_text, value[:1] if one else value))
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) >= (1000 if name.endswith("steps") else 10_000)
    ):
        return f"{value:,}"
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
