"""Scores of one model on XARES-LLM: the file that keeps them, and the table beside published ones."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.published import PublishedAverages, published_averages
from bestrq2.files import write_text

FORMAT = 1
BENCHMARK, PUBLISHED = "xares-llm", "XARES-LLM"
DOMAINS = {
    "Speech": (
        "aishell-1 asvspoof2015 cremad fluentspeechcommands libricount librispeech speechcommandsv1 vocalsound "
        "voxceleb1 voxlingua33"
    ),
    "Music": "freemusicarchive gtzan nsynth songdescriber",
    "Environment": "clotho esc-50 fsd50k fsdkaggle2018 urbansound8k",
}
"""Domains of the datasets as in X-ARES; MECAT has all of them and stands apart."""
OTHER = "Other"


def domain_of(task: str) -> str:
    """The domain of a dataset."""
    return next((domain for domain, names in DOMAINS.items() if task in names.split()), OTHER)


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one dataset.

    Attributes:
        task: the benchmark's name of it.
        score: in its metric, higher is better.
        weight: in the benchmark's overall score.
    """

    task: str
    score: float
    weight: float = 1.0


@dataclass(frozen=True)
class XaresLLMResult:
    """What a model scored on a joint task or a dataset.

    Attributes:
        model: its name in tables.
        task: what was trained on.
        expected: datasets that are scored when nothing fails.
        scores: of those that were.
        failures: dataset → one sentence on why it has no score.
        provenance: settings, identity and versions, as plain JSON types.
    """

    model: str
    task: str
    expected: tuple[str, ...]
    scores: tuple[TaskScore, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """Datasets without a score."""
        return tuple(name for name in self.expected if name not in {score.task for score in self.scores})

    @property
    def overall(self) -> float | None:
        """The benchmark's weighted mean; None unless all datasets have a score."""
        if self.missing or not self.scores:
            return None
        total = sum(score.weight for score in self.scores)
        return sum(score.weight * score.score for score in self.scores) / total if total else None

    @property
    def mean_of_means(self) -> float | None:
        """Mean over domains of their means; None unless all datasets have a score."""
        if self.missing or not self.scores:
            return None
        groups: dict[str, list[float]] = {}
        for score in self.scores:
            groups.setdefault(domain_of(score.task), []).append(score.score)
        return sum(sum(group) / len(group) for group in groups.values()) / len(groups)


def write_result(path: Path, result: XaresLLMResult) -> None:
    """Write a result as JSON; the file appears whole or not at all."""
    content = {
        "format": FORMAT,
        "benchmark": BENCHMARK,
        **asdict(result),
        "missing": result.missing,
        "overall": result.overall,
        "mean_of_means": result.mean_of_means,
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> XaresLLMResult:
    """Read what `write_result` wrote.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["benchmark"]) != (FORMAT, BENCHMARK):
            raise ValueError(f"benchmark {content['benchmark']!r} of format {content['format']!r}")
        return XaresLLMResult(
            model=str(content["model"]),
            task=str(content["task"]),
            expected=tuple(content["expected"]),
            scores=tuple(TaskScore(**score) for score in content["scores"]),
            failures=dict(content["failures"]),
            provenance=dict(content["provenance"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: holds no result of XARES-LLM ({error!r}); write it anew with `bestrq2 xares-llm MODEL`"
        ) from error


def task_name(name: str) -> str:
    """The benchmark's name of a dataset without the prefix it has in files of joint tasks."""
    return name.removeprefix("eval_").lower()


def read_scores(path: Path) -> list[TaskScore]:
    """Scores in the benchmark's scores.tsv: columns Task, score and weight; its row of the mean is left out.

    Raises:
        DataError: it cannot be read, or a score is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["Task"] != "Overall"]
        scores = [TaskScore(task_name(row["Task"]), float(row["score"]), float(row["weight"])) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as scores of xares_llm ({error!r}); delete it, run again") from error
    for score in scores:
        if not math.isfinite(score.score):
            raise DataError(f"{path}: the score of {score.task} is {score.score}; delete it, run again")
    return scores


def format_table(result: XaresLLMResult) -> str:
    """Scores by domain, their means where nothing is missing, and the published means."""
    known = {score.task: score for score in result.scores}
    names = [*result.expected, *(task for task in known if task not in result.expected)]
    lines = [f"XARES-LLM, {result.task}: {result.model}"]
    for domain in (*DOMAINS, OTHER):
        own = [name for name in names if domain_of(name) == domain]
        lines += [f"  {domain}"] if own else []
        lines += [f"    {name:<24}{_cell(known.get(name))}" for name in own]
    if result.missing:
        lines.append(f"  no mean: {len(names) - len(result.missing)} of {len(names)} datasets have a score")
        lines += [f"    {name}: {result.failures.get(name, 'not run')}" for name in result.missing]
    else:
        lines.append(f"  {'overall (weighted mean)':<26}{result.overall:6.3f}")
        lines.append(f"  {'mean of domain means':<26}{result.mean_of_means:6.3f}")
    return "\n".join([*lines, *_published_lines(published_averages(PUBLISHED))])


def _cell(score: TaskScore | None) -> str:
    return "     -" if score is None else f"{score.score:6.3f}"


def _published_lines(rows: Sequence[PublishedAverages]) -> list[str]:
    """Published rows, which average all datasets of both joint tasks."""
    if not rows:
        return []
    lines = ["  published, of both tasks together"]
    width = max(len(row.model) for row in rows)
    for row in rows:
        means = {"overall": row.global_mean, "mean of domain means": row.mean_of_means}
        known = ", ".join(f"{name} {float(value) / 100:.2f}" for name, value in means.items() if value)
        lines.append(f"    {row.model:<{width}}  {known}")
    return [*lines, *sorted({f"    source: {row.source}" for row in rows})]
