"""Run folders as reports, comparisons and model cards read them: settings, curves and benchmark results."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.benchmark import SOUNDWORLD_2, read_benchmark_result, realworld_1
from bestrq2.evaluate.probe import PROBES
from bestrq2.evaluate.result import PROBE, Result, read_result
from bestrq2.evaluate.xares.results import RESULT_NAME, read_xares_result
from bestrq2.inference.cost import Cost, cost
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.report.curves import RunCurves
from bestrq2.run_records import (
    Curve,
    earlier_setting,
    newest_step,
    read_columns,
    read_metrics,
    read_run_settings,
    read_settings,
    read_table,
    teacher_gflops,
)

BENCHMARK = SOUNDWORLD_2.name
LOSSES = ("validation/loss", "train/loss")
# Last part of a setting's dotted name → its name in reports, in the order shown.
SHOWN_SETTINGS = {
    "recipe": "recipe",
    "objective": "objective",
    "data": "data",
    "teacher": "teacher",
    "hidden_size": "width",
    "num_hidden_layers": "encoder layers",
    "predictor_num_layers": "predictor layers",
    "codebook_size": "codes",
    "num_codebooks": "codebooks",
    "mask_ratio": "share hidden",
    "batch_seconds": "seconds per step",
    "max_steps": "steps",
    "lr": "learning rate",
    "precision": "precision",
    "seed": "seed",
}


@dataclass(frozen=True)
class Run:
    """Contents of one run folder.

    Attributes:
        folder: path as given.
        recipe: name of the recipe; the stem of the file where it was a path.
        seed: random seed of the run.
        settings: all of config.yaml under dotted names; model fields that older runs lack have their defaults.
        model: the architecture.
        steps: last step logged.
        max_steps: steps of the whole run.
        curves: metric → (steps int64 [N] rising, values float64 [N]).
        timing: (steps int64 [N], seconds of training float64 [N]); None where it was not recorded.
        result: scores on the frozen benchmark; None where the run was not probed.
        reference: name of the reference for a run that ships with the package.
        xares: X-ARES result; None where it was not run.
        probes: results of `bestrq2 probe` on labels of one's own.
        teacher_gflops: operations per clip of the encoder that gives codes; 0 without one.
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
    xares: Result | None = None
    probes: tuple[Result, ...] = ()
    teacher_gflops: float = 0.0

    @functools.cached_property
    def cost(self) -> Cost:
        """Size of the model, and operations per clip, those of a teacher among them."""
        counted = cost(self.model)
        return replace(counted, training_gflops=counted.training_gflops + self.teacher_gflops)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps >= self.max_steps

    @property
    def step_rows(self) -> float:
        """Rows of `max_seconds` per step."""
        return self.settings["loader.batch_seconds"] / self.model.max_seconds

    def final(self, metric: str) -> float | None:
        """Last value of a metric; None where it was not logged."""
        curve = self.curves.get(metric)
        return None if curve is None else float(curve[1][-1])

    def seconds(self) -> float | None:
        """Seconds of training up to the last step; None where they were not recorded."""
        return None if self.timing is None else float(self.timing[1][-1])


def read_run(folder: str | Path, unfinished: bool = False, reference: str | None = None) -> Run:
    """Read a run folder with its benchmark results.

    Args:
        folder: run folder.
        unfinished: accept a run that has not done all its steps.
        reference: name of the reference for a run that ships with the package.

    Raises:
        DataError: it is not a run folder, its files cannot be read, it is not finished, or a benchmark result belongs
            to other weights.
    """
    run = read_training(folder, unfinished, reference)
    run = replace(run, result=find_result(run.folder), xares=find_xares(run.folder), probes=find_probes(run.folder))
    if run.result is not None:
        command = f"bestrq2 probe {run.folder} {run.result.benchmark}"
        _check_belongs(run, run.result.provenance, f"probe it again with `{command}`")
    if run.xares is not None:
        _check_belongs(run, run.xares.provenance, f"run X-ARES again with `bestrq2 xares {run.folder}`")
    return run


def read_training(folder: str | Path, unfinished: bool = False, reference: str | None = None) -> Run:
    """Read a run folder without its benchmark results; see `read_run`."""
    folder = Path(folder)
    missing = [name for name in ("config.yaml", "metrics.csv") if not (folder / name).is_file()]
    if missing:
        found = f"not a run folder (it lacks {' and '.join(missing)})" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {found}; name folders that `bestrq2 pretrain --output RUN` wrote")
    settings, model = _read_settings(folder / "config.yaml")
    curves = read_metrics(folder / "metrics.csv")
    if not any(name in curves for name in LOSSES):
        _refuse_without_loss(folder / "metrics.csv")
    steps, max_steps = newest_step(folder / "metrics.csv") or 0, int(settings["trainer.max_steps"])
    if steps < max_steps and not unfinished:
        raise DataError(
            f"{folder}: is at step {steps:,} of {max_steps:,}: finish it with `bestrq2 pretrain --resume`, or add "
            "--unfinished to compare it as it is"
        )
    first_step = min(int(curves[name][0][0]) for name in LOSSES if name in curves)
    return Run(
        folder=folder,
        recipe=Path(str(settings["recipe"])).name.removesuffix(".yaml").removesuffix(".yml"),
        seed=int(settings["seed"]),
        settings=settings,
        model=model,
        steps=steps,
        max_steps=max_steps,
        curves=curves,
        timing=_read_timing(folder / "timing.csv", first_step, steps),
        result=None,
        reference=reference,
        teacher_gflops=teacher_gflops(folder),
    )


def read_curves(folder: Path) -> RunCurves:
    """Read curves and facts of a run for its report; there are no facts where config.yaml cannot be read.

    Raises:
        DataError: there is no readable metrics.csv with a column `step`.
    """
    folder = Path(folder)
    by_last_part: dict[str, Any] = {}
    try:
        settings = read_run_settings(folder / "config.yaml")
    except DataError:
        settings = {}
    for name, value in settings.items():
        by_last_part.setdefault(name.rsplit(".", 1)[-1], value)
    facts = {
        label: value_text(by_last_part[setting], setting)
        for setting, label in SHOWN_SETTINGS.items()
        if by_last_part.get(setting) is not None
    }
    if facts.get("objective") == "one_stage":
        facts.pop("predictor layers", None)  # there is no predictor
    name = folder.resolve().name
    return RunCurves(name, facts.get("recipe", name), facts, read_metrics(folder / "metrics.csv"))


def reference_folder() -> Path:
    """Folder of the reference runs that ship with the package, as NAME/seed-N/."""
    return Path(str(resources.files("bestrq2") / "references"))


def reference_runs() -> list[Run]:
    """Read the reference runs that ship with the package.

    Raises:
        DataError: there are none in this version.
    """
    folders = sorted(path.parent for path in reference_folder().glob("*/seed-*/config.yaml"))
    if not folders:
        raise DataError("no reference runs come with this version of bestrq2; leave out --reference")
    return [read_run(folder, reference=folder.parent.name) for folder in folders]


def find_result(folder: Path) -> Result | None:
    """Benchmark result of a run folder; None without one. Results of earlier benchmarks are passed over."""
    path = folder / f"{BENCHMARK}.json"
    return read_benchmark_result(path) if path.is_file() else None


def find_probes(folder: Path) -> tuple[Result, ...]:
    """Results of a run folder on real recordings: on labels of one's own, of several on the same clips and splits the
    newest, and on realworld-1.

    Raises:
        DataError: a result is damaged.
    """
    found = [read_result(path, PROBE) for path in sorted((folder / PROBES).glob("*.json"))]
    real = realworld_1()
    if (path := folder / f"{real.name}.json").is_file():
        found.append(read_benchmark_result(path, real))
    found.sort(key=lambda result: str(result.provenance.get("created")))
    return tuple({own_labels(result): result for result in found}.values())


def at_step(results: Sequence[Result], step: int | None) -> list[Result]:
    """Results of the weights that a run has at a step, and those that do not tell theirs."""
    return [one for one in results if one.provenance.get("step") in (None, step)]


def own_labels(result: Result) -> tuple[str, str]:
    """Name of the labels of a result, and the identity of their clips, splits and seed; "" for a frozen benchmark."""
    if result.benchmark != PROBE:
        return result.benchmark, ""
    protocol = result.provenance.get("protocol", {})
    return PurePath(str(protocol.get("labelled"))).name, f"{protocol.get('clips')} {protocol.get('seed')}"


def find_xares(folder: Path) -> Result | None:
    """X-ARES result of a run folder; None without one.

    Raises:
        DataError: the result is damaged.
    """
    path = folder / RESULT_NAME
    return read_xares_result(path) if path.is_file() else None


def value_text(value: object, name: str = "") -> str:
    """A setting as text: "20,000", "16 x 16", and "0.4–0.6" for a name like "mask_ratio"."""
    if isinstance(value, list | tuple):
        between = "–" if name.endswith("ratio") else ", " if len(value) != 2 or name.endswith("betas") else " x "
        one = between == "–" and all(item == value[0] for item in value)
        return between.join(map(value_text, value[:1] if one else value))
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int) and abs(value) >= (1000 if name.endswith("steps") else 10_000):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read_settings(path: Path) -> tuple[dict[str, Any], BestRQ2Config]:
    """All settings under dotted names, and the architecture."""
    settings = read_settings(path)
    flat = {"optimizer.algorithm": "adamw", **read_run_settings(path)}  # earlier versions had no other
    needed = ("recipe", "data", "seed", "loader.batch_seconds", "trainer.max_steps")
    missing = [name for name in needed if flat.get(name) is None]
    if missing:
        raise DataError(f"{path}: is not the configuration of a pretraining run: it lacks {', '.join(missing)}")
    for name in ("seed", "trainer.max_steps"):
        if not isinstance(flat[name], int):
            raise DataError(f"{path}: {name} must be a whole number, found {flat[name]!r}")
    if not isinstance(flat["loader.batch_seconds"], int | float):
        raise DataError(f"{path}: loader.batch_seconds must be a number, found {flat['loader.batch_seconds']!r}")
    if found := earlier_setting(settings):
        raise DataError(
            f"{path}: has {found}, which this version of bestrq2 no longer knows; use the version that made it"
        )
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
    """Seconds of training by step up to the last one; None where they or those of the beginning are missing."""
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


def _check_belongs(run: Run, provenance: Mapping[str, Any], remedy: str) -> None:
    """Raise a DataError if a result was scored at another step or seed than the run has now."""
    step, seed = provenance.get("step"), provenance.get("seed")
    if step is not None and step != run.steps:
        raise DataError(f"{run.folder}: was probed at step {step} and is now at step {run.steps}: {remedy}")
    if seed is not None and seed != run.seed:
        raise DataError(f"{run.folder}: has seed {run.seed}, but its probe result is of seed {seed}: {remedy}")
