"""Result of a benchmark: scores of a model, failures and provenance, in one checked JSON format.

`bestrq2 probe`, `bestrq2 finetune`, `bestrq2 xares` and `bestrq2 xares-llm` all write it.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bestrq2.errors import BestRQ2Error, DataError
from bestrq2.evaluate.table import Table, parts_html, parts_text
from bestrq2.files import regular_file, write_text
from bestrq2.text import counted

FORMAT = 3

PROBE, FINETUNE, XARES, XARES_LLM = "probe", "finetune", "x-ares", "xares-llm"
"""Values of `Result.benchmark`; a frozen benchmark has its own name, such as "soundworld-2"."""
CHOOSE, REPORT = "choose", "report"
"""Halves of a frozen benchmark: tasks to choose settings on, and tasks to report."""

_COMMANDS = {
    FINETUNE: "bestrq2 finetune MODEL LABELLED",
    XARES: "bestrq2 xares MODEL",
    XARES_LLM: "bestrq2 xares-llm MODEL",
}
_NUMBERS = ("low", "high", "chance", "seconds")


@dataclass(frozen=True)
class TaskScore:
    """Score of one kind of features on one task by one method.

    Attributes:
        features: name of the features: the model's, or that of a baseline.
        task: name of the task, e.g. "music/instrument", "esc50".
        method: "linear", "statistics" or "knn" of probes, "mlp" or "knn" of X-ARES, otherwise the benchmark's name.
        metric: e.g. "accuracy", "balanced accuracy", "mAP".
        score: the metric on the test clips, higher is better; NaN where it is undefined.
        low: lower end of the 95 % interval over the choice of test clips, NaN where there is none.
        high: upper end of the interval.
        chance: score that needs no audio, NaN where unknown.
        n_test: number of test clips, 0 where unknown.
        domain: domain of the task, "" where unknown.
        weight: weight in the benchmark's overall mean.
        seconds: wall time of fitting and scoring, NaN where unknown.
        skipped: clips left out because their audio was rejected, each with split, place and reason.
        half: `CHOOSE` or `REPORT` in a frozen benchmark, "" elsewhere.
        clips: what each test clip contributes to the score, which is their mean (1 or 0 for accuracy); empty where
            unknown. Intervals over clips and seeds are computed from it.
    """

    features: str
    task: str
    method: str
    metric: str
    score: float
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan
    n_test: int = 0
    domain: str = ""
    weight: float = 1.0
    seconds: float = math.nan
    skipped: tuple[str, ...] = ()
    half: str = ""
    clips: tuple[float, ...] = ()

    @property
    def relative(self) -> float:
        """The score relative to chance: 0 at chance, 1 where everything is right; the score where chance is unknown."""
        return self.score if math.isnan(self.chance) or self.chance == 1 else relative(self.score, self.chance)


@dataclass(frozen=True)
class Result:
    """Scores of one model on one benchmark.

    Attributes:
        benchmark: name of the benchmark; results of different ones cannot be compared.
        model: name of the model in tables, and of its features among the scores.
        scores: scores of the model and of baselines, one per features, task, method and metric.
        failures: task → one sentence that says why it has no score.
        provenance: origin of the model, versions, protocol, command and date, as plain JSON types; see
            `bestrq2.evaluate.provenance`.
        parts: tables and sentences of a result, by which it prints and shows in a notebook; None for its fields.
    """

    benchmark: str
    model: str
    scores: tuple[TaskScore, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[Result], Sequence[Table | str]] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return repr(self) if self.parts is None else parts_text(self.parts(self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>" if self.parts is None else parts_html(self.parts(self))

    def of_model(self) -> list[TaskScore]:
        """The scores of the model itself, without those of baselines."""
        return [score for score in self.scores if score.features == self.model]


def relative(score: float, chance: float) -> float:
    """Score relative to its chance level, (score - chance) / (1 - chance), so that tasks can be averaged."""
    return (score - chance) / (1 - chance)


def check_result(result: Result) -> None:
    """Check a result of any benchmark.

    Raises:
        DataError: a name is missing, a number is out of range, or a score occurs twice.
    """
    if not result.model or not result.benchmark:
        raise DataError("the name of the model or of the benchmark is missing")
    seen = set()
    for score in result.scores:
        what = f"the {score.method} score of {score.features} on {score.task!r}"
        if not (score.task and score.method and score.metric and score.features):
            raise DataError(f"{what} lacks a task, method, metric or features")
        if math.isinf(score.score):
            raise DataError(f"{what} is {score.score}, which is not finite")
        has_interval = not (math.isnan(score.low) or math.isnan(score.high))
        if has_interval and not 0 <= score.low <= score.score <= score.high <= 1:
            raise DataError(f"{what} is {score.score} [{score.low}, {score.high}], not inside an interval in [0, 1]")
        if score.n_test < 0 or score.weight < 0 or score.seconds < 0 or math.isinf(score.seconds):
            raise DataError(f"{what} has a negative or infinite count, weight or time")
        key = (score.features, score.task, score.method, score.metric, score.domain)
        if key in seen:
            raise DataError(f"{what} occurs twice")
        seen.add(key)
    for task, reason in result.failures.items():
        if not task or not isinstance(reason, str) or not reason:
            raise DataError(f"the failure of {task!r} has no reason")


def check_complete(result: Result) -> None:
    """Check that every task has a score.

    Raises:
        DataError: no task has one.
        BestRQ2Error: some tasks have none.
    """
    if result.failures:
        total = len({score.task for score in result.scores} | set(result.failures))
        kind = BestRQ2Error if result.scores else DataError
        lacking = f"{len(result.failures)} of {counted(total, 'task')} without a score: {', '.join(result.failures)}"
        raise kind(f"{lacking}; rerun the same command to score only the missing ones")


def write_result(path: str | os.PathLike[str], result: Result, means: Mapping[str, Any] | None = None) -> None:
    """Write a result as JSON; the file appears whole or not at all.

    Args:
        path: file to write.
        result: result to write.
        means: averages of the scores by the rules of the benchmark, as plain JSON types, for other programs to read;
            `read_result` ignores them.

    Raises:
        DataError: `read_result` would refuse the result.
        OSError: the file cannot be written.
    """
    check_result(result)
    content: dict[str, Any] = {
        "format": FORMAT,
        "benchmark": result.benchmark,
        "model": result.model,
        "provenance": dict(result.provenance),
        "scores": [_plain(score) for score in result.scores],
        "failures": dict(result.failures),
        "means": dict(means or {}),
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{os.fspath(path)}: the result cannot be written as JSON ({error})") from error
    write_text(Path(path), text + "\n")


def read_result(
    path: str | os.PathLike[str], benchmark: str | None = None, check: Callable[[Result], None] = check_result
) -> Result:
    """Read what `write_result` wrote, or a result file of version 0.1 of this package.

    Args:
        path: file to read.
        benchmark: the benchmark it must be of; None for any.
        check: check of the content that raises a DataError; a benchmark may have its own.

    Raises:
        DataError: the file cannot be read, is damaged or of another benchmark or format; the message names the file,
            the reason and the command that writes a new one.
    """
    place, remedy = os.fspath(path), _COMMANDS.get(benchmark or "", f"bestrq2 probe MODEL {benchmark or 'LABELLED'}")
    try:
        result = _parsed(regular_file(Path(path)).read_text(encoding="utf-8"), benchmark)
        check(result)
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror}); write a new one with `{remedy}`") from error
    except DataError as error:
        raise DataError(f"{place}: {str(error).rstrip('.')}; write a new one with `{remedy}`") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not a JSON file ({error}); write a new one with `{remedy}`") from error
    return result


def _parsed(text: str, benchmark: str | None) -> Result:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise DataError("is not a result of bestrq2")
    if content.get("format") == 1:
        content = _from_format_1(content)
    if content.get("format") == 2:  # had no outcomes of clips, and no halves
        content |= {"format": FORMAT, "scores": [{"half": "", "clips": "", **one} for one in content["scores"]]}
    if content.get("format") != FORMAT:
        raise DataError(f"is a result of format {content.get('format')!r}, but this version reads {FORMAT}")
    kinds: dict[str, Any] = {"format": int, "benchmark": str, "model": str, "scores": list}
    kinds |= dict.fromkeys(("provenance", "failures", "means"), dict)
    _check_fields(content, kinds, "")
    if benchmark not in (None, content["benchmark"]):
        raise DataError(f"is a result of {content['benchmark']}, not of {benchmark}")
    scores = tuple(_parsed_score(values, place) for place, values in enumerate(content["scores"]))
    return Result(content["benchmark"], content["model"], scores, content["failures"], content["provenance"])


def _parsed_score(values: Any, place: int) -> TaskScore:
    if not isinstance(values, dict):
        raise DataError(f"score {place} is not an object")
    number = (int, float, type(None))
    kinds: dict[str, Any] = dict.fromkeys(("features", "task", "method", "metric", "domain", "half", "clips"), str)
    kinds |= dict.fromkeys(("score", *_NUMBERS), number)
    kinds |= {"n_test": int, "weight": (int, float), "skipped": list}
    _check_fields(values, kinds, f" of score {place}")
    read = {one.name: values[one.name] for one in fields(TaskScore)}
    read |= {name: math.nan if read[name] is None else float(read[name]) for name in ("score", *_NUMBERS)}
    clips = tuple(map(float, read["clips"].split()))
    return TaskScore(**{**read, "skipped": tuple(map(str, read["skipped"])), "clips": clips})


def _check_fields(content: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Raise a DataError unless the fields are those of `kinds`, each of its type."""
    for name, kind in kinds.items():
        if name not in content:
            raise DataError(f"lacks the field {name!r}{where}")
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise DataError(f"has {type(content[name]).__name__} in the field {name!r}{where}")
    if unknown := sorted(set(content) - set(kinds)):
        raise DataError(f"has the unknown field {unknown[0]!r}{where}")


def _from_format_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the four formats of version 0.1: probe scores, frozen benchmark, fine-tuning, X-ARES and XARES-LLM."""
    if "metrics" in content:
        raise DataError("is a fine-tuning result of version 0.1 of this package")
    try:
        scores, benchmark = list(content["scores"]), content.get("benchmark", PROBE)
        model = content.get("model") or content.get("features") or (scores[0]["features"] if scores else "model")
        defaults = _plain(TaskScore(model, "", "", "score", math.nan)) | {"skipped": []}
        if benchmark == XARES:
            scores = [{"score" if name == "value" else name: value for name, value in one.items()} for one in scores]
        if benchmark == XARES_LLM:
            scores = [{"method": XARES_LLM, **one} for one in scores]
        provenance = dict(content.get("provenance", {}))
        if "protocol" in content:
            provenance["protocol"] = content["protocol"]
        failures = dict.fromkeys(content.get("missing", ()), "it was not run") | dict(content.get("failures", {}))
        return {
            "format": FORMAT,
            "benchmark": benchmark,
            "model": model,
            "provenance": provenance,
            "scores": [{**defaults, **one} for one in scores],
            "failures": failures,
            "means": {},
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("is a damaged result of version 0.1 of this package") from error


def _plain(score: TaskScore) -> dict[str, Any]:
    """Fields of a score as JSON types: null for NaN, and the outcomes of its clips as one string."""
    values = {name: None if value != value else value for name, value in asdict(score).items()}
    return values | {"clips": " ".join(f"{value:g}" for value in score.clips)}
