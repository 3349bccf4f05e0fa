"""Results of X-ARES: both published averages, the table beside published rows, and CSV."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.published import AVERAGE_COLUMNS, DOMAIN_COLUMNS, published_averages, published_scores
from bestrq2.evaluate.result import XARES, Result, TaskScore, check_result, read_result
from bestrq2.evaluate.table import WIDTH, Table
from bestrq2.evaluate.xares.tasks import DOMAINS, METHODS, TASKS, Domain, Method, PublicTask

BENCHMARK = "X-ARES"
RESULT_NAME = "xares.json"
"""Name of the result in a run folder."""

NO_METHOD, MISSING, FAILED = "–", "none", "failed"
_LONGEST_NAME = 24
_VERSIONS = ("bestrq2", "xares", "torch", "created")

Entry = tuple[str, Method]


@dataclass(frozen=True)
class Aggregation:
    """A published way to average.

    Attributes:
        name: name as in published.csv.
        entries: domain → (task, method) of every score that counts, all with the same weight.
    """

    name: str
    entries: Mapping[Domain, tuple[Entry, ...]]

    @property
    def all_entries(self) -> tuple[Entry, ...]:
        """Entries of all domains."""
        return tuple(entry for entries in self.entries.values() for entry in entries)


def _aggregation(name: str, methods: Sequence[Method], domain_of: Callable[[PublicTask], Domain | None]) -> Aggregation:
    """Scores by some methods of the tasks that have a domain."""
    entries = {
        domain: tuple(
            (task.name, method)
            for task in TASKS.values()
            if domain_of(task) == domain
            for method in task.methods
            if method in methods
        )
        for domain in DOMAINS
    }
    return Aggregation(name, entries)


def _paper_domain(task: PublicTask) -> Domain | None:
    """Domain by the paper, which counts Vocal Imitation as environment; None for a task that is not in it."""
    return task.paper_domain if task.paper else None


ENTRIES_37 = _aggregation("37 entries", METHODS, lambda task: task.domain if task.entries else None)
PAPER_LINEAR = _aggregation("21 datasets, linear probe", ("mlp",), _paper_domain)
PAPER_KNN = _aggregation("21 datasets, k-NN", ("knn",), _paper_domain)
AGGREGATIONS = (ENTRIES_37, PAPER_LINEAR, PAPER_KNN)


@dataclass(frozen=True)
class Mean:
    """Mean over entries.

    Attributes:
        value: mean in 0..1; None unless all entries have a score, since a mean over some is another quantity.
        found: number of entries with a score.
        expected: number of entries.
    """

    value: float | None
    found: int
    expected: int

    @property
    def text(self) -> str:
        """The mean in percent, or "12 of 22 entries"."""
        return f"{self.found} of {self.expected} entries" if self.value is None else f"{100 * self.value:.2f}"


def averages(scores: Sequence[TaskScore], aggregation: Aggregation) -> dict[str, Mean]:
    """Average scores in a published way; scores of other tasks and methods do not count.

    Args:
        scores: scores of one model, one per task and method.
        aggregation: one of `AGGREGATIONS`.

    Returns:
        The mean of each domain, "global_mean" over all entries and "mean_of_means" over the domains, in this order.
    """
    values = {(score.task, score.method): score.score for score in scores}

    def mean(entries: Sequence[Entry]) -> Mean:
        found = [values[entry] for entry in entries if entry in values]
        return Mean(fmean(found) if len(found) == len(entries) else None, len(found), len(entries))

    domains: dict[str, Mean] = {domain: mean(entries) for domain, entries in aggregation.entries.items()}
    overall = mean(aggregation.all_entries)
    known = [one.value for one in domains.values() if one.value is not None]
    between = Mean(fmean(known) if len(known) == len(domains) else None, overall.found, overall.expected)
    return {**domains, "global_mean": overall, "mean_of_means": between}


def missing_entries(scores: Sequence[TaskScore], aggregation: Aggregation) -> list[Entry]:
    """Entries of an aggregation that have no score."""
    found = {(score.task, score.method) for score in scores}
    return [entry for entry in aggregation.all_entries if entry not in found]


def plain_averages(result: Result) -> dict[str, dict[str, Any]]:
    """Averages by every aggregation as plain JSON types, with the missing entries as "esc50/knn"."""
    return {
        aggregation.name: {
            **{name: asdict(mean) for name, mean in averages(result.scores, aggregation).items()},
            "missing": [f"{task}/{method}" for task, method in missing_entries(result.scores, aggregation)],
        }
        for aggregation in AGGREGATIONS
    }


def entry_titles(entries: Sequence[Entry]) -> list[str]:
    """Titles of entries: "ESC-50" where all methods of a task are among them, else "ESC-50 (k-NN)"."""
    short = {"mlp": "linear", "knn": "k-NN"}
    titles = []
    for name in dict.fromkeys(name for name, _ in entries):
        methods = [method for method in METHODS if (name, method) in entries]
        whole = len(methods) == len(TASKS[name].methods)
        titles.append(TASKS[name].title if whole else f"{TASKS[name].title} ({short[methods[0]]})")
    return titles


def read_xares_result(path: str | os.PathLike[str]) -> Result:
    """Read a result of X-ARES.

    Raises:
        DataError: the file cannot be read, is damaged or holds something else; the message names it and the remedy.
    """
    return read_result(path, XARES, check_xares_result)


def check_xares_result(result: Result) -> None:
    """Raise a DataError unless every score is one that X-ARES gives."""
    check_result(result)
    for score in result.scores:
        what = f"the {score.method} score of {score.task!r}"
        known = TASKS.get(score.task)
        methods = METHODS if known is None else known.methods
        if score.method not in methods:
            raise DataError(f"{what} has another method than those of the task: {' and '.join(methods)}")
        if known is not None and score.metric != known.metric:
            raise DataError(f"{what} has the metric {score.metric!r}, but X-ARES scores the task by {known.metric!r}")
        if not 0 <= score.score <= 1:
            raise DataError(f"{what} is {score.score}, which is not in 0..1")


def touched_tasks(result: Result) -> list[PublicTask]:
    """Tasks of X-ARES that were scored or failed, in the order of `TASKS`."""
    names = {score.task for score in result.scores} | set(result.failures)
    return [task for task in TASKS.values() if task.name in names]


def own_tasks(result: Result) -> list[str]:
    """Other tasks, such as SoundWorld's, that were scored or failed."""
    names = dict.fromkeys([*(score.task for score in result.scores), *result.failures])
    return [name for name in names if name not in TASKS]


def metric_of(result: Result, task: str) -> str:
    """Metric of a task; "" for a custom task that failed."""
    if task in TASKS:
        return TASKS[task].metric
    return next((score.metric for score in result.scores if score.task == task), "")


def xares_parts(result: Result) -> list[Table | str]:
    """Tables and notes of a result of X-ARES, for `Result.parts`."""
    sentences = (textwrap.fill(note, WIDTH, break_on_hyphens=False, break_long_words=False) for note in notes(result))
    return [f"{BENCHMARK}: {result.model}", *xares_tables(result), *sentences]


def xares_tables(result: Result) -> list[Table]:
    """Tables of a result: entries of the averages, the averages, other tasks of X-ARES, and custom tasks."""
    tables = []
    if counted := [task for task in touched_tasks(result) if task.entries]:
        tables.append(_task_table(result, counted, "linear probe / k-NN, percent"))
        tables += [
            _average_table(result, one) for one in AGGREGATIONS if averages(result.scores, one)["global_mean"].found
        ]
    if others := [task for task in touched_tasks(result) if not task.entries]:
        tables.append(_task_table(result, others, "tasks that no average counts"))
    if own := own_tasks(result):
        rows = [(name, _cell(result, name, METHODS), metric_of(result, name)) for name in own]
        tables.append(Table(("", _short(result.model), "metric"), tuple(rows), "tasks outside of X-ARES"))
    return tables


def notes(result: Result) -> list[str]:
    """Sentences on sources, on what is missing and why, on time and versions."""
    missing, expected = missing_entries(result.scores, ENTRIES_37), len(ENTRIES_37.all_entries)
    found = expected - len(missing)
    sentences = []
    if touched_tasks(result):
        sources = dict.fromkeys([one.source for one in published_averages(BENCHMARK)])
        sources |= dict.fromkeys([one.source for one in published_scores()])
        sentences.append(f"Published: {'; '.join(sources)}. The paper counts Vocal Imitation as environment.")
    if found:
        sentences += [f"{row.model}: {row.note}." for row in published_averages(BENCHMARK) if row.note]
    if not found:
        sentences.append(f"None of the {expected} entries of the published averages was scored, so they are not shown.")
    elif missing:
        sentences.append(
            f"{found} of {expected} entries were scored: a mean is given only where all its entries are there. "
            f"Missing: {', '.join(entry_titles(missing))}."
        )
    for name, reason in result.failures.items():
        sentences.append(f"{TASKS[name].title if name in TASKS else name} failed: {reason}")
    times = [score.seconds for score in result.scores if score.seconds == score.seconds]
    if times:
        sentences.append(f"The scores took {sum(times) / 60:.1f} min.")
    if versions := [f"{name} {result.provenance[name]}" for name in _VERSIONS if result.provenance.get(name)]:
        sentences.append(f"Made with {', '.join(versions)}.")
    return sentences


def xares_csv(result: Result) -> str:
    """A result and the published averages as one long CSV table, values in percent.

    Columns: model, kind ("score" or "average"), name (task or aggregation), domain (of an average also "global_mean" or
    "mean_of_means"), method, metric, percent (empty where entries are missing), entries ("12 of 22"), source.
    """
    header = ("model", "kind", "name", "domain", "method", "metric", "percent", "entries", "source")
    rows: list[tuple[str, ...]] = []
    for score in result.scores:
        domain = TASKS[score.task].domain if score.task in TASKS else ""
        percent = f"{100 * score.score:.4f}"
        rows.append((result.model, "score", score.task, domain, score.method, score.metric, percent, "", "own"))
    columns = (*DOMAIN_COLUMNS, *AVERAGE_COLUMNS)
    for one in AGGREGATIONS:
        for column, mean in averages(result.scores, one).items():
            percent = "" if mean.value is None else f"{100 * mean.value:.4f}"
            entries = f"{mean.found} of {mean.expected}"
            rows.append((result.model, "average", one.name, column, "", "", percent, entries, "own"))
        for row in published_averages(BENCHMARK, one.name):
            for column, cell in zip(columns, row.cells, strict=True):
                if cell:
                    rows.append((row.model, "average", one.name, column, "", "", cell, "", row.source))
    return Table(header, tuple(rows)).csv()


def _task_table(result: Result, tasks: Sequence[PublicTask], title: str) -> Table:
    published = {(one.model, one.task, one.method): one.percent for one in published_scores()}
    models = list(dict.fromkeys(model for model, _, _ in published))
    rows: list[tuple[str, ...]] = []
    for domain in DOMAINS:
        own = [task for task in tasks if task.domain == domain]
        rows += [(domain,)] if own else []
        for task in own:
            cells = [
                _pair([published.get((model, task.name, method)) for method in task.methods], task.methods)
                for model in models
            ]
            metric = "" if task.metric == "accuracy" else f" ({task.metric})"
            rows.append((f"  {task.title}{metric}", _cell(result, task.name, task.methods), *cells))
    return Table(("", _short(result.model), *models), tuple(rows), title)


def _average_table(result: Result, aggregation: Aggregation) -> Table:
    own = averages(result.scores, aggregation)
    titles = {"global_mean": f"global mean ({own['global_mean'].expected})", "mean_of_means": "mean of means"}
    header = ("", *(titles.get(name, f"{name} ({mean.expected})") for name, mean in own.items()))
    rows = [(_short(result.model), *(mean.text for mean in own.values()))]
    for row in published_averages(BENCHMARK, aggregation.name):
        rows.append((row.model, *(cell or NO_METHOD for cell in row.cells)))
    return Table(header, tuple(rows), aggregation.name)


def _cell(result: Result, task: str, methods: Sequence[str]) -> str:
    values: dict[str, float] = {score.method: 100 * score.score for score in result.scores if score.task == task}
    found = [values.get(method) for method in methods]
    return _pair(found, methods, FAILED if task in result.failures else MISSING, len(FAILED))


def _short(name: str) -> str:
    """The end of a long name, such as that of a path."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _pair(values: Sequence[float | None], methods: Sequence[str], absent: str = NO_METHOD, size: int = 5) -> str:
    """Linear probe and k-NN side by side, in columns of equal width."""
    by_method: dict[str, float | None] = dict(zip(methods, values, strict=True))
    texts = []
    for method in METHODS:
        value = by_method.get(method)
        text = NO_METHOD if method not in by_method else absent if value is None else f"{value:.1f}"
        texts.append(f"{text:>{size}}")
    return " / ".join(texts)
