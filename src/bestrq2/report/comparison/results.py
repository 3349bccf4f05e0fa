"""Results of the frozen benchmark: found in run folders, read, and checked to be of the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestrq2.errors import DataError
from bestrq2.evaluate.benchmark import SOUNDWORLD_1, read_benchmark_result
from bestrq2.evaluate.result import Result
from bestrq2.evaluate.score_table import domain_means
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.evaluate.xares import entries as xares

if TYPE_CHECKING:
    from bestrq2.report.comparison.runs import Run

BENCHMARK = SOUNDWORLD_1.name
LOG_MEL, RANDOM, SUPERVISED = "log-mel statistics", "random encoder", "supervised"
# Not "upper bound": with as few labels as the probes see, much pretraining gets beyond it.
SUPERVISED_ROW = "encoder trained on the labels"


def find_result(folder: Path) -> Result | None:
    """The result in a run folder, of this version of the benchmark where there are several; None without one."""
    found = sorted(path for path in folder.glob("soundworld-*.json") if path.stem.partition("-")[2].isdigit())
    if not found:
        return None
    current = folder / f"{BENCHMARK}.json"
    return read_benchmark_result(current if current in found else found[-1])


def find_xares(folder: Path) -> xares.XaresResult | None:
    """The result of X-ARES in a run folder, None without one; a DataError says what is wrong with it."""
    path = folder / xares.RESULT_NAME
    return xares.read_result(path) if path.is_file() else None


def supervised_result() -> Result | None:
    """The encoder trained on the labels, which ships with the package; None where it does not."""
    path = resources.files("bestrq2") / "references" / "supervised.json"
    return read_benchmark_result(Path(str(path))) if path.is_file() else None


def has_features(result: Result, features: str, method: str) -> bool:
    """Whether a result has a row of these features under this method."""
    return any(score.features == features and score.method == method for score in result.scores)


def means(result: Result, method: str, features: str) -> dict[str, float]:
    """Mean of each domain, and "mean" of them, as shares.

    Raises:
        DataError: the features were not probed.
    """
    return domain_means([score for score in result.scores if score.features == features], method, features)


def chance(result: Result, method: str) -> dict[str, float]:
    """What needs no audio, as `means`."""
    by_domain: dict[str, list[float]] = {}
    for score in result.scores:
        if score.method == method and score.features == result.model:
            by_domain.setdefault(score.domain, []).append(score.chance)
    shares = {domain: sum(values) / len(values) for domain, values in by_domain.items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def require_one_benchmark(runs: Iterable[Run]) -> None:
    """See that all results came about in the same way.

    Raises:
        DataError: naming the first run that differs from the first probed one, and in what.
    """
    probed = [(run.folder, run.result) for run in runs if run.result is not None]
    for folder, result in probed:
        for method in METHODS:
            if not has_features(result, result.model, method):
                raise DataError(f"{folder}: its result has no {method} scores of {result.model!r}: probe it again")
    for folder, result in probed[1:]:
        compare_kinds(str(probed[0][0]), probed[0][1], str(folder), result)


def compare_kinds(first: str, one: Result, second: str, other: Result) -> None:
    """See that two results can stand beside each other; a DataError names both and the first thing that differs."""
    ours, theirs = _kind(one), _kind(other)
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{first} and {second} were not probed alike: {key} is {ours.get(key)!r} in the one and "
                f"{theirs.get(key)!r} in the other; probe both with `bestrq2 probe RUN {BENCHMARK}`"
            )


def _kind(result: Result) -> dict[str, Any]:
    """All that must be equal between comparable results; their tasks are the benchmark's, or they could not be read."""
    kind = {"benchmark": result.benchmark} | {key: result.provenance.get(key) for key in ("synthesiser", "soundworld")}
    return kind | _flat({"protocol": result.provenance.get("protocol", {})})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
