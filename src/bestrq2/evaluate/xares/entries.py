"""Scores of one model on X-ARES, and the file that keeps them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.xares.averages import AGGREGATIONS, averages
from bestrq2.evaluate.xares.tasks import METHODS, TASKS, Method, PublicTask
from bestrq2.files import write_text

__all__ = ["RESULT_NAME", "TASKS", "Method", "PublicTask", "Score", "XaresResult", "read_result", "write_result"]

RESULT_NAME = "xares.json"
"""Name of the file in a run folder."""
FORMAT = 1
_REMEDY = "write it anew with `bestrq2 xares MODEL`"


@dataclass(frozen=True)
class Score:
    """One method on one task.

    Attributes:
        task: the harness's name of it, a key of `TASKS` or that of a task of one's own.
        method: "mlp" (the linear probe) or "knn".
        value: in 0..1, higher is better.
        metric: the harness's name of it, such as "accuracy".
        seconds: wall time it took, None where unknown.
    """

    task: str
    method: Method
    value: float
    metric: str
    seconds: float | None = None


@dataclass(frozen=True)
class XaresResult:
    """What one model scored on X-ARES tasks, all of them or some.

    Attributes:
        model: its name in tables.
        scores: one per task and method, in any order.
        failures: task → one sentence on why it has no score.
        provenance: where the model comes from and the versions that scores depend on, as plain JSON types.
    """

    model: str
    scores: Sequence[Score]
    failures: Mapping[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def averages(self) -> dict[str, Any]:
        """By every published aggregation, as plain JSON types; a value is None where entries are missing."""
        return {aggregation.name: averages(self.scores, aggregation).to_dict() for aggregation in AGGREGATIONS}

    def to_json(self) -> str:
        """As JSON text, the inverse of `from_json`.

        Raises:
            DataError: if `from_json` would refuse it.
        """
        _check(self)
        content = {
            "format": FORMAT,
            "benchmark": "x-ares",
            "model": self.model,
            "provenance": self.provenance,
            "scores": [asdict(score) for score in self.scores],
            "failures": dict(self.failures),
            "averages": self.averages,
        }
        try:
            return json.dumps(content, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"the provenance cannot be written as JSON ({error})") from error

    @classmethod
    def from_json(cls, text: str, source: str | os.PathLike[str] = "the text") -> XaresResult:
        """Read what `to_json` gave.

        Args:
            text: JSON.
            source: what messages call it, such as the file's path.

        Raises:
            DataError: if it is of another format, lacks a field or has one too many, or a score cannot be one.
        """
        try:
            return _read(text)
        except DataError as error:
            raise DataError(f"{os.fspath(source)}: {error}; {_REMEDY}") from error


def write_result(path: str | os.PathLike[str], result: XaresResult) -> None:
    """Write a result as JSON; the file appears whole or not at all.

    Raises:
        DataError: if the result is one that `read_result` would refuse.
        OSError: if it cannot be written.
    """
    write_text(Path(path), result.to_json())


def read_result(path: str | os.PathLike[str]) -> XaresResult:
    """Read what `write_result` wrote.

    Raises:
        DataError: if it cannot be read, is damaged or something else; the message names the file and what to do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"{os.fspath(path)}: cannot be read ({reason}); {_REMEDY}") from error
    return XaresResult.from_json(text, path)


_KINDS = {
    "format": int,
    "benchmark": str,
    "model": str,
    "provenance": dict,
    "scores": list,
    "failures": dict,
    "averages": dict,
}


def _read(text: str) -> XaresResult:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("benchmark") != "x-ares":
        raise DataError("is no result of X-ARES")
    if content.get("format") != FORMAT:
        raise DataError(f"is of format {content.get('format')!r}, but this version reads {FORMAT}")
    _check_fields(content, _KINDS, "")
    result = XaresResult(
        content["model"],
        tuple(_read_score(values, place) for place, values in enumerate(content["scores"])),
        content["failures"],
        content["provenance"],
    )
    _check(result)
    if content["averages"] != result.averages:
        raise DataError("has averages that are not those of its scores")
    return result


def _read_score(values: Any, place: int) -> Score:
    where = f" of score {place}"
    if not isinstance(values, dict):
        raise DataError(f"score {place} is {type(values).__name__}, no object")
    kinds = {
        "task": str, "method": str, "value": (int, float), "metric": str, "seconds": (int, float, type(None)),
    }  # fmt: skip
    _check_fields(values, kinds, where)
    return Score(**{one.name: values[one.name] for one in fields(Score)})


def _check_fields(content: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Raise a DataError unless the fields are those of `kinds`, each of its type."""
    for name, kind in kinds.items():
        if name not in content:
            raise DataError(f"misses the field {name!r}{where}")
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise DataError(f"has {type(content[name]).__name__} in the field {name!r}{where}")
    foreign = sorted(set(content) - set(kinds))
    if foreign:
        raise DataError(f"has the unknown field {foreign[0]!r}{where}")


def _check(result: XaresResult) -> None:
    """Raise a DataError unless every score can be one and stands once."""
    if not result.model:
        raise DataError("has no model's name")
    seen: set[tuple[str, str]] = set()
    for score in result.scores:
        what = f"the {score.method} score of {score.task!r}"
        if not score.task:
            raise DataError("has a score without a task")
        known = TASKS.get(score.task)
        if score.method not in (METHODS if known is None else known.methods):
            methods = " and ".join(METHODS if known is None else known.methods)
            raise DataError(f"{what} is of no method of that task, which has {methods}")
        if known is not None and score.metric != known.metric:
            raise DataError(f"{what} has the metric {score.metric!r}, but X-ARES scores that task by {known.metric!r}")
        if not 0 <= score.value <= 1:
            raise DataError(f"{what} is {score.value}, no number in 0..1")
        if score.seconds is not None and not (math.isfinite(score.seconds) and score.seconds >= 0):
            raise DataError(f"{what} took {score.seconds} seconds")
        if (score.task, score.method) in seen:
            raise DataError(f"{what} stands there twice")
        seen.add((score.task, score.method))
    for task, reason in result.failures.items():
        if not task or not isinstance(reason, str) or not reason:
            raise DataError(f"the failure of {task!r} says no reason")
