"""Scores of probes and of X-ARES as sections of a page: charts of means and tasks, and all numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bestrq2.evaluate.published import published_averages, published_scores
from bestrq2.evaluate.result import Result, TaskScore, relative
from bestrq2.evaluate.score_table import METHOD_TITLES
from bestrq2.evaluate.table import Table, mark_best, percent
from bestrq2.evaluate.xares.results import (
    AGGREGATIONS,
    BENCHMARK,
    ENTRIES_37,
    Aggregation,
    averages,
    metric_of,
    notes,
    own_tasks,
    touched_tasks,
)
from bestrq2.evaluate.xares.tasks import DOMAINS, TASKS
from bestrq2.evaluate.xares.tasks import METHOD_TITLES as XARES_METHODS
from bestrq2.report.charts import Score, ScoreChart, ScoreRow
from bestrq2.report.curves import RunCurves, model_colours

Name = TypeVar("Name")

BASELINES = ("var(--b0)", "var(--b1)")
PUBLISHED_FAMILY, PUBLISHED = BASELINES
FAMILY = "BEST-RQ"


@dataclass(frozen=True)
class ScoreSection:
    """Section of a page with scores.

    Attributes:
        name: anchor of the section.
        title, text: heading and paragraph.
        legend: model or features → CSS colour.
        charts: heading → charts.
        table: every number in percent.
        notes: sentences below the table.
    """

    name: str
    title: str
    text: str
    legend: dict[str, str]
    charts: dict[str, list[ScoreChart]]
    table: Table
    notes: list[str]

    @property
    def with_chance(self) -> bool:
        """Whether charts show a chance level."""
        return any(chart.chance is not None for charts in self.charts.values() for chart in charts)


# --- probes ---


def probe_section(probes: Sequence[TaskScore], runs: Sequence[RunCurves]) -> ScoreSection | None:
    """Charts and table of probe scores; None without scores.

    Args:
        probes: scores; domains, tasks and features are shown in the order of their first appearance. One that is NaN,
            such as that of a failed probe, is in the table only.
        runs: runs that share their colours with features of their name or label.
    """
    if not probes:
        return None
    colours = model_colours([one.features for one in probes], runs, BASELINES if runs else ())
    finite = [one for one in probes if math.isfinite(one.score)]
    charts: dict[str, list[ScoreChart]] = {}
    if len({one.task for one in finite}) != 1:
        means = mean_scores(finite).items()
        charts["Mean over tasks"] = [_probe_chart(domain, scores, colours) for domain, scores in means]
    for domain in _unique(one.domain for one in finite):
        own = [one for one in finite if one.domain == domain]
        charts[domain] = [
            _probe_chart(short_task(task, domain), [one for one in own if one.task == task], colours)
            for task in _unique(one.task for one in own)
        ]
    text = (
        "Scores of classifiers that are trained on frozen embeddings of labelled clips, in percent (linear probe in "
        "bold, with statistics over time, then k-NN); whiskers are 95 % intervals. Means are relative to chance."
    )
    notes = ["* Best of its task and method. The interval of a mean takes the errors of the tasks as independent."]
    return ScoreSection("probes", "Probes of the embeddings", text, colours, charts, _probe_table(probes), notes)


def short_task(task: str, domain: str) -> str:
    """Name of a task under its domain's heading: "instrument" for "music/instrument"."""
    return task.removeprefix(f"{domain}/")


def mean_scores(probes: Sequence[TaskScore]) -> dict[str, list[TaskScore]]:
    """Domain → mean over its tasks per features and method; with several domains also their mean.

    A mean is only given where features and method have every task, so that means stay comparable.
    """
    means: dict[str, list[TaskScore]] = {}
    for domain in _unique(one.domain for one in probes):
        means[domain] = _complete_means([one for one in probes if one.domain == domain], domain)
    if len(means) > 1:
        together = _complete_means([one for scores in means.values() for one in scores], "mean of domains")
        means["Mean of domains"] = together
    return {domain: scores for domain, scores in means.items() if scores}


def mean_score(scores: Sequence[TaskScore], task: str) -> TaskScore:
    """Mean over tasks relative to chance, each counting the same, with the errors of the tasks taken as independent.

    Half-widths add in squares: mean ± sqrt(sum(half-width²)) / n, separately below and above.
    """
    first, n = scores[0], len(scores)
    mean = float(np.mean([one.relative for one in scores]))
    below = math.sqrt(sum((one.relative - relative(one.low, one.chance)) ** 2 for one in scores)) / n
    above = math.sqrt(sum((relative(one.high, one.chance) - one.relative) ** 2 for one in scores)) / n
    return TaskScore(
        features=first.features,
        task=task,
        domain=first.domain,
        method=first.method,
        metric="relative to chance",
        score=mean,
        low=mean - below,
        high=mean + above,
        chance=0.0,
        n_test=sum(one.n_test for one in scores),
    )


def _complete_means(scores: Sequence[TaskScore], title: str) -> list[TaskScore]:
    means = []
    for method in METHOD_TITLES:
        tasks = {one.task for one in scores if one.method == method}
        for features in _unique(one.features for one in scores):
            own = [one for one in scores if one.method == method and one.features == features]
            if own and {one.task for one in own} == tasks:
                means.append(mean_score(own, title))
    return means


def _probe_chart(title: str, scores: Sequence[TaskScore], colours: Mapping[str, str]) -> ScoreChart:
    rows = []
    for features, colour in colours.items():
        own = [one for method in METHOD_TITLES for one in scores if (one.method, one.features) == (method, features)]
        if own:
            rows.append(ScoreRow(features, colour, tuple(map(_probe_score, own))))
    chance = 100 * float(np.mean([one.chance for one in scores]))
    return ScoreChart(title, ", ".join(_unique(one.metric for one in scores)), tuple(rows), chance)


def _probe_score(one: TaskScore) -> Score:
    low, high = (100 * (end if math.isfinite(end) else one.score) for end in (one.low, one.high))
    return Score(METHOD_TITLES.get(one.method, one.method), 100 * one.score, f"{100 * one.score:.1f}", low, high)


def _probe_table(probes: Sequence[TaskScore]) -> Table:
    by_task: dict[tuple[str, str, str], list[TaskScore]] = {}
    for domain in _unique(one.domain for one in probes):
        own = [one for one in probes if one.domain == domain]
        for task in _unique(one.task for one in own):
            by_task |= {
                (domain, task, METHOD_TITLES[method]): [one for one in own if (one.task, one.method) == (task, method)]
                for method in METHOD_TITLES
            }
    rows = []
    for key, scores in by_task.items():
        marked = mark_best([percent(one.score, 2) for one in scores], [one.score for one in scores])
        rows += [
            (*key, one.features, one.metric, cell, *(percent(value, 2) for value in (one.low, one.high, one.chance)))
            for cell, one in zip(marked, scores, strict=True)
        ]
    header = ("domain", "task", "method", "features", "metric", "score %", "low %", "high %", "chance %")
    return Table(header, tuple(rows), left=5)


# --- X-ARES ---


def xares_section(result: Result | None, runs: Sequence[RunCurves]) -> ScoreSection | None:
    """Charts, table and notes of an X-ARES result; None without one.

    Args:
        result: scores of one model.
        runs: runs that share their colour with a model of their name or label.
    """
    if result is None:
        return None
    legend = model_colours([result.model], runs)
    colour = legend[result.model]
    if touched_tasks(result):
        legend |= {f"published, {FAMILY} family": PUBLISHED_FAMILY, "published, others": PUBLISHED}
    step = result.provenance.get("step")
    scored = [f"Scored at step {step:,}."] if isinstance(step, int) else []
    charts = {heading: found for one in AGGREGATIONS for heading, found in _averages(result, one, colour).items()}
    beside = ", beside published ones" if charts else ""
    return ScoreSection(
        "xares",
        BENCHMARK,
        f"Scores by the benchmark’s own harness in percent{beside}: linear probe in bold, then k-NN.",
        legend,
        charts | _tasks(result, colour),
        _xares_table(result),
        [*scored, *notes(result)],
    )


def published_colour(model: str) -> str:
    """One grey for the family of this method, another for all other published models."""
    return PUBLISHED_FAMILY if model.startswith(FAMILY) else PUBLISHED


def _averages(result: Result, aggregation: Aggregation, colour: str) -> dict[str, list[ScoreChart]]:
    """One chart per domain and per mean over all of them; empty where no entry was scored."""
    own = averages(result.scores, aggregation)
    if not own["global_mean"].found:
        return {}
    names = [*(domain.capitalize() for domain in DOMAINS), "Global mean", "Mean of means"]
    charts = []
    for place, (name, mean) in enumerate(zip(names, own.values(), strict=True)):
        rows = [
            ScoreRow(row.model, published_colour(row.model), (Score("published", float(cell), cell),))
            for row in published_averages(BENCHMARK, aggregation.name)
            if (cell := row.cells[place])
        ]
        # the paper does not give every domain; those are in the table only
        if rows:
            # a mean over some of the entries only would mislead, so a note says how many there are
            missing = mean.value is None
            scores = () if mean.value is None else (Score("mean", 100 * mean.value, mean.text),)
            first = ScoreRow(result.model, colour, scores, mean.text if missing else "")
            charts.append(ScoreChart(name, f"{mean.expected} entries", (first, *rows)))
    heading = "As the model cards average" if aggregation is ENTRIES_37 else "As the paper averages"
    return {f"{heading}: {aggregation.name}": charts}


def _tasks(result: Result, colour: str) -> dict[str, list[ScoreChart]]:
    """One chart per task, by domain, then those of tasks that no average counts."""
    touched = touched_tasks(result)
    groups = {
        domain.capitalize(): [task.name for task in touched if task.entries and task.domain == domain]
        for domain in DOMAINS
    }
    groups["Tasks that no average counts"] = [task.name for task in touched if not task.entries]
    groups["Tasks outside of X-ARES"] = own_tasks(result)
    return {heading: [_task(result, name, colour) for name in tasks] for heading, tasks in groups.items() if tasks}


def _task(result: Result, task: str, colour: str) -> ScoreChart:
    values: dict[str, float] = {one.method: 100 * one.score for one in result.scores if one.task == task}
    rows = [ScoreRow(result.model, colour, _xares_scores(values), "" if values else "failed")]
    published: dict[str, dict[str, float]] = {}
    for one in published_scores():
        if one.task == task:
            published.setdefault(one.model, {})[one.method] = one.percent
    rows += [ScoreRow(model, published_colour(model), _xares_scores(scores)) for model, scores in published.items()]
    return ScoreChart(TASKS[task].title if task in TASKS else task, metric_of(result, task), tuple(rows))


def _xares_scores(values: Mapping[str, float]) -> tuple[Score, ...]:
    return tuple(
        Score(title, values[method], f"{values[method]:.1f}")
        for method, title in XARES_METHODS.items()
        if method in values
    )


def _xares_table(result: Result) -> Table:
    rows = []
    for name in [*(task.name for task in touched_tasks(result)), *own_tasks(result)]:
        values = {score.method: f"{100 * score.score:.2f}" for score in result.scores if score.task == name}
        title, domain = (TASKS[name].title, TASKS[name].domain) if name in TASKS else (name, "")
        rows.append((title, domain, metric_of(result, name), *(values.get(method, "–") for method in XARES_METHODS)))
    return Table(("task", "domain", "metric", "linear probe %", "k-NN %"), tuple(rows), left=3)


def _unique(names: Iterable[Name]) -> list[Name]:
    """Distinct names in order of first appearance."""
    return list(dict.fromkeys(names))
