"""The result file of a benchmark: scores beside the protocol and the model they belong to, as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bestrq2 import soundworld
from bestrq2._version import __version__
from bestrq2.convert.weights import exported_step
from bestrq2.errors import CheckpointError, DataError
from bestrq2.evaluate.benchmark import METHODS, Benchmark, benchmark_means, benchmark_named
from bestrq2.evaluate.scores import ProbeScore
from bestrq2.files import write_text
from bestrq2.inference.cost import cost
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.run_records import flatten, is_finetuned, newest_step, read_settings

FORMAT = 1


@dataclass(frozen=True)
class BenchmarkResult:
    """Scores of a model and of the baselines beside it.

    Attributes:
        benchmark: name of the protocol.
        protocol: its frozen numbers, see `Benchmark.protocol`.
        provenance: where the model comes from, see `model_provenance`.
        features: name of the model's own row among the scores.
        scores: of all rows.
    """

    benchmark: str
    protocol: dict[str, Any]
    provenance: dict[str, Any]
    features: str
    scores: tuple[ProbeScore, ...]

    @property
    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """{features: {method: {domain: ..., "mean": mean over domains}}}."""
        return benchmark_means(self.scores)


def write_result(path: str | Path, result: BenchmarkResult) -> None:
    """Write a result as JSON; the file appears whole or not at all.

    Raises:
        DataError: if the result is one that `read_result` would refuse.
        OSError: if it cannot be written.
    """
    _check(result)
    content = {
        "format": FORMAT,
        "benchmark": result.benchmark,
        "protocol": result.protocol,
        "provenance": result.provenance,
        "features": result.features,
        "scores": [score.to_dict() for score in result.scores],
        "means": result.means,
    }
    write_text(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_result(path: str | Path) -> BenchmarkResult:
    """Read what `write_result` wrote.

    Raises:
        DataError: if it cannot be read, is of another format or benchmark, lacks a field, or its scores were not made
            by the benchmark's protocol; the message names the file and what to do.
    """
    remedy = "write it anew with `bestrq2 probe MODEL BENCHMARK`"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a benchmark's result ({error}); {remedy}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is no benchmark's result of format {FORMAT}; {remedy}.")
    kinds = {
        "benchmark": str, "protocol": dict, "provenance": dict, "features": str, "scores": list, "means": dict,
    }  # fmt: skip
    for field, kind in kinds.items():
        if not isinstance(content.get(field), kind):
            found = "misses the field" if field not in content else "has something else than expected in the field"
            raise DataError(f"{path} {found} {field!r}; {remedy}.")
    try:
        scores = tuple(ProbeScore.from_dict(values) for values in content["scores"])
        result = BenchmarkResult(
            benchmark=content["benchmark"],
            protocol=content["protocol"],
            provenance=content["provenance"],
            features=content["features"],
            scores=scores,
        )
        _check(result)
        if not _close(content["means"], result.means):
            raise DataError("its means are not those of its scores")
    except (DataError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {str(error).rstrip('.')}; {remedy}.") from error
    return result


def _check(result: BenchmarkResult) -> None:
    """Raise a DataError unless the scores are those of the benchmark that the result names."""
    benchmark = benchmark_named(result.benchmark)
    for key, value in benchmark.protocol().items():
        if key not in result.protocol:
            raise DataError(f"the protocol misses {key!r}, which {benchmark.name} freezes at {value!r}")
        if result.protocol[key] != value and key != "tasks":
            raise DataError(f"the protocol has {key} {result.protocol[key]!r}, but {benchmark.name} has {value!r}")
    if not result.scores:
        raise DataError("there are no scores")
    if result.features not in {score.features for score in result.scores}:
        raise DataError(f"no score is of {result.features!r}, the model's own row")
    for score in result.scores:
        _check_score(benchmark, score)
    for features, method in dict.fromkeys((score.features, score.method) for score in result.scores):
        own = [score.task for score in result.scores if (score.features, score.method) == (features, method)]
        _check_tasks(benchmark, f"{features} ({method})", own)
    if result.protocol["tasks"] != benchmark.protocol()["tasks"]:
        raise DataError(f"the protocol lists other tasks than {benchmark.name}")


def _check_tasks(benchmark: Benchmark, row: str, found: Sequence[str]) -> None:
    expected = [task.name for task in benchmark.tasks]
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    double = sorted({name for name in found if found.count(name) > 1})
    parts = [("misses", missing), ("has foreign", foreign), ("repeats", double)]
    said = " and ".join(f"{verb} {', '.join(names)}" for verb, names in parts if names)
    if said:
        raise DataError(f"the tasks of {row} are not those of {benchmark.name}: it {said}")


def _check_score(benchmark: Benchmark, score: ProbeScore) -> None:
    what = f"the score of {score.features} on {score.task}"
    known = {task.name: task for task in benchmark.tasks}
    metrics = {task.metric for task in benchmark.tasks}
    metric = known[score.task].metric if score.task in known else None
    if score.metric not in metrics or metric not in (None, score.metric):
        wanted = metric or " or ".join(sorted(metrics))
        raise DataError(f"{what} has the metric {score.metric!r}, but {benchmark.name} scores {wanted}")
    if score.method not in METHODS:
        raise DataError(f"{what} has the method {score.method!r}, but {benchmark.name} has {' and '.join(METHODS)}")
    if score.task in known and score.domain != known[score.task].domain:
        raise DataError(f"{what} counts for {score.domain!r}, but in {benchmark.name} for {known[score.task].domain!r}")
    if not 0 <= score.low <= score.score <= score.high <= 1:
        raise DataError(f"{what} is {score.score} [{score.low}, {score.high}], no share inside an interval in [0, 1]")
    if score.n_test != benchmark.test:
        raise DataError(f"{what} was made on {score.n_test} clips, but {benchmark.name} has {benchmark.test}")


def _close(found: Any, expected: Any) -> bool:
    """Whether two nested dictionaries of numbers are the same but for rounding."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_close(found[key], expected[key]) for key in expected)
        )
    return isinstance(found, int | float) and math.isclose(found, expected, abs_tol=1e-9)


def software_provenance() -> dict[str, str]:
    """Versions that scores depend on, and the time: bestrq2, torch, synthesiser, soundworld, created (ISO, UTC)."""
    return {
        "bestrq2": __version__,
        "torch": str(torch.__version__),
        "synthesiser": soundworld.synthesiser(),
        "soundworld": soundworld.VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_run_folder(model: str | os.PathLike[str]) -> bool:
    """Whether a model is given as the folder of a pretraining run."""
    return (Path(model) / "config.yaml").is_file() and not is_finetuned(Path(model))


def model_provenance(model: str | os.PathLike[str], config: BestRQ2Config) -> dict[str, Any]:
    """Where a model comes from, as plain JSON types.

    Args:
        model: as given to `bestrq2 probe`.
        config: its architecture.

    Returns:
        model; recipe, data, seed, steps (planned) and batch_size of the run; step, that of the weights in its model
        folder (of the newest row of its metrics, in runs of older versions); finished, whether that is the last one;
        training_gflops, those of the planned steps; encoder_parameters, objective, and `software_provenance`. What only
        a run folder tells is None for other models, as is step where there are no metrics.

    Raises:
        CheckpointError: if a run folder's config.yaml or metrics.csv cannot be read.
    """
    numbers = cost(config)
    known: dict[str, Any] = dict.fromkeys(("recipe", "data", "seed", "steps", "batch_size", "training_gflops"))
    known |= {"step": None, "finished": None}
    if is_run_folder(model):
        known |= _run_provenance(Path(model))
        known["training_gflops"] = numbers.training_gflops * known["batch_size"] * known["steps"]
    return {
        "model": os.fspath(model),
        **known,
        "encoder_parameters": numbers.encoder_parameters,
        "objective": config.objective,
        **software_provenance(),
    }


def _run_provenance(run: Path) -> dict[str, Any]:
    try:
        settings = flatten(read_settings(run / "config.yaml"))
        known = {
            "recipe": _text(settings["recipe"]),
            "data": _text(settings["data"]),
            "seed": int(settings["seed"]),
            "steps": int(settings["trainer.max_steps"]),
            "batch_size": int(settings["loader.batch_size"]),
        }
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run / 'config.yaml'}: holds no settings of a run") from error
    # The weights are those of the last export; metrics may have gone on since.
    step = exported_step(run) or _newest_step(run / "metrics.csv")
    return {**known, "step": step, "finished": step == known["steps"]}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _newest_step(metrics: Path) -> int | None:
    """The step of the newest row, None where there is none."""
    try:
        return newest_step(metrics) if metrics.is_file() else None
    except DataError as error:
        raise CheckpointError(f"{metrics}: holds no metrics of a run") from error


def result_of(
    benchmark: Benchmark, features: str, scores: Sequence[ProbeScore], provenance: Mapping[str, Any]
) -> BenchmarkResult:
    """The result made of scores just taken.

    Args:
        benchmark: the protocol they were taken by.
        features: name of the model's own row.
        scores: of all rows.
        provenance: see `model_provenance`.
    """
    return BenchmarkResult(benchmark.name, benchmark.protocol(), dict(provenance), features, tuple(scores))
