"""Reads what a comparison needs of a run folder, and refuses what cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.result import Result
from bestrq2.evaluate.xares.entries import XaresResult
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.report.comparison.results import find_result, find_xares
from bestrq2.run_records import Curve, flatten, read_columns, read_settings, read_table, whole_windows

LOSSES = ("validation/loss", "train/loss")


@dataclass(frozen=True)
class Run:
    """One run as it lies in its folder.

    Attributes:
        folder: as it was named.
        recipe: name of the recipe; the stem of the file where it was a path.
        seed: of the run.
        settings: {"model.hidden_size": 768, ...}, all of config.yaml; model fields of older runs have their defaults.
        model: the architecture.
        steps: the last step logged.
        max_steps: steps of the whole run.
        curves: metric → (steps int64 [N] rising, values float64 [N]).
        timing: (steps int64 [N], seconds of training float64 [N]); None where it was not recorded.
        result: of the frozen benchmark; None where the run was not probed.
        reference: name of the reference, of a run that ships with the package.
        xares: of X-ARES; None where it was not run.
    """

    folder: Path
    recipe: str
    seed: int
    settings: dict[str, Any]
    model: BestRQ2Config
    steps: int
    max_steps: int
    curves: dict[str, Curve]
    timing: Curve | None
    result: Result | None
    reference: str | None = None
    xares: XaresResult | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps >= self.max_steps

    @property
    def batch_size(self) -> int:
        """Clips a step."""
        return int(self.settings["loader.batch_size"])

    def final(self, metric: str) -> float | None:
        """The last value of a metric; None where it was not logged."""
        curve = self.curves.get(metric)
        return None if curve is None else float(curve[1][-1])

    def seconds(self) -> float | None:
        """Seconds of training up to the last step; None where they were not recorded."""
        return None if self.timing is None else float(self.timing[1][-1])


def read_run(folder: str | Path, unfinished: bool = False, reference: str | None = None) -> Run:
    """The run in a folder.

    Args:
        folder: a run folder.
        unfinished: whether to read a run that has not done all its steps.
        reference: name of the reference, of a run that ships with the package.

    Raises:
        DataError: it is no run folder, its files cannot be understood, it is not finished, or its benchmark result is
            older than the model.
    """
    run = read_training(folder, unfinished, reference)
    run = replace(run, result=find_result(run.folder), xares=find_xares(run.folder))
    _check_results_belong(run)
    return run


def read_training(folder: str | Path, unfinished: bool = False, reference: str | None = None) -> Run:
    """The run in a folder without its benchmark result; see `read_run`."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.csv").is_file():
        found = "no such folder" if not folder.exists() else "not a run folder"
        missing = [name for name in ("config.yaml", "metrics.csv") if not (folder / name).is_file()]
        lacks = f" (it lacks {' and '.join(missing)})" if folder.is_dir() else ""
        raise DataError(f"{folder}: {found}{lacks}; name folders that `bestrq2 pretrain --output RUN` wrote")
    settings, model = _read_settings(folder / "config.yaml")
    curves = read_table(folder / "metrics.csv")
    if not any(name in curves for name in LOSSES):
        _refuse_without_loss(folder / "metrics.csv")
    steps, max_steps = max(int(steps[-1]) for steps, _ in curves.values()), int(settings["trainer.max_steps"])
    if steps < max_steps and not unfinished:
        raise DataError(
            f"{folder}: is at step {steps:,} of {max_steps:,}: finish it with `bestrq2 pretrain --resume`, or add "
            "--unfinished to compare it as it is"
        )
    return Run(
        folder=folder,
        recipe=Path(str(settings["recipe"])).name.removesuffix(".yaml").removesuffix(".yml"),
        seed=int(settings["seed"]),
        settings=settings,
        model=model,
        steps=steps,
        max_steps=max_steps,
        curves=whole_windows(curves),
        timing=_read_timing(
            folder / "timing.csv", min(int(curves[name][0][0]) for name in LOSSES if name in curves), steps
        ),
        result=None,
        reference=reference,
    )


def _read_settings(path: Path) -> tuple[dict[str, Any], BestRQ2Config]:
    """All settings under dotted names, and the architecture."""
    settings = read_settings(path)
    flat = flatten(settings)
    needed = ("recipe", "data", "seed", "loader.batch_size", "trainer.max_steps")
    missing = [name for name in needed if flat.get(name) is None]
    if missing:
        raise DataError(f"{path}: is no configuration of a pretraining run: it lacks {', '.join(missing)}")
    for name in ("seed", "loader.batch_size", "trainer.max_steps"):
        if not isinstance(flat[name], int):
            raise DataError(f"{path}: {name} must be a whole number, found {flat[name]!r}")
    try:
        model = BestRQ2Config(**(settings.get("model") or {}))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: model: {error}; was the run made by a newer version?") from error
    flat = {key: value for key, value in flat.items() if key != "model" and not key.startswith("model.")}
    return flat | {f"model.{name}": getattr(model, name) for name in field_names()}, model


def _refuse_without_loss(path: Path) -> None:
    columns = read_columns(path)
    if any(name in columns for name in LOSSES):
        raise DataError(f"{path}: no step was logged yet; there is nothing to compare")
    raise DataError(
        f"{path}: has neither of the columns {' and '.join(reversed(LOSSES))}, but {', '.join(columns) or 'none'}; "
        "was it written by another version, or renamed?"
    )


def _read_timing(path: Path, first_step: int, last_step: int) -> Curve | None:
    """Seconds of training by step up to the last one; None where there are none, or those of the beginning are lost."""
    if not path.is_file():
        return None
    columns = read_columns(path)
    if not {"step", "seconds"} <= set(columns):
        raise DataError(f"{path}: must have the columns step and seconds, found {columns or 'none'}")
    curve = read_table(path).get("seconds")
    if curve is None:
        return None
    steps, seconds = curve
    done = steps <= last_step
    return (steps[done], seconds[done]) if done.any() and steps[0] <= first_step else None


def _check_results_belong(run: Run) -> None:
    """See that results are of this run's model as it is now."""
    if run.result is not None:
        _check_belongs(run, run.result.provenance, f"bestrq2 probe {run.folder} {run.result.benchmark}", "probe it")
    if run.xares is not None:
        _check_belongs(run, run.xares.provenance, f"bestrq2 xares {run.folder}", "run X-ARES")


def _check_belongs(run: Run, provenance: Mapping[str, Any], command: str, remedy: str) -> None:
    again = f"{remedy} again with `{command}`"
    step, seed = provenance.get("step"), provenance.get("seed")
    if step is not None and step != run.steps:
        raise DataError(f"{run.folder}: was probed at step {step} and is now at step {run.steps}: {again}")
    if seed is not None and seed != run.seed:
        raise DataError(f"{run.folder}: has seed {run.seed}, but its probe result is of seed {seed}: {again}")
