"""Probe scores as charts: means per domain, then every task, and all numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.score_table import METHOD_TITLES as METHODS
from bestrq2.evaluate.table import Table, mark_best, percent
from bestrq2.report.charts import Score, ScoreChart, ScoreRow
from bestrq2.report.curves import RunCurves, model_colours

Name = TypeVar("Name")

BASELINES = ("var(--b0)", "var(--b1)")


@dataclass(frozen=True)
class ProbeSection:
    """What a page shows of probes.

    Attributes:
        legend: features → CSS colour.
        means: one chart per domain, then the mean of domains.
        tasks: domain → charts of its tasks.
        table: every score, by domain, task and method, the best of each task and method marked.
    """

    legend: dict[str, str]
    means: list[ScoreChart]
    tasks: dict[str, list[ScoreChart]]
    table: Table


def probe_section(probes: Sequence[TaskScore], runs: Sequence[RunCurves]) -> ProbeSection | None:
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
    means = [_chart(domain, scores, colours) for domain, scores in domain_means(finite).items()]
    tasks: dict[str, list[ScoreChart]] = {}
    for domain in _unique(one.domain for one in finite):
        own = [one for one in finite if one.domain == domain]
        tasks[domain] = [
            _chart(short_task(task, domain), [one for one in own if one.task == task], colours)
            for task in _unique(one.task for one in own)
        ]
    return ProbeSection(colours, means, tasks, _table(probes))


def short_task(task: str, domain: str) -> str:
    """Name of a task under its domain's heading: "instrument" for "music/instrument"."""
    return task.removeprefix(f"{domain}/")


def domain_means(probes: Sequence[TaskScore]) -> dict[str, list[TaskScore]]:
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
    """Mean over tasks, each counting the same; the interval takes the errors of the tasks as independent.

    Half-widths add in squares: mean ± sqrt(sum(half-width²)) / n, separately below and above.
    """
    first, n = scores[0], len(scores)
    mean = float(np.mean([one.score for one in scores]))
    below = math.sqrt(sum((one.score - one.low) ** 2 for one in scores)) / n
    above = math.sqrt(sum((one.high - one.score) ** 2 for one in scores)) / n
    metrics = _unique(one.metric for one in scores)
    return TaskScore(
        features=first.features,
        task=task,
        domain=first.domain,
        method=first.method,
        metric=metrics[0] if len(metrics) == 1 else "mean score",
        score=mean,
        low=mean - below,
        high=mean + above,
        chance=float(np.mean([one.chance for one in scores])),
        n_test=sum(one.n_test for one in scores),
    )


def _complete_means(scores: Sequence[TaskScore], title: str) -> list[TaskScore]:
    means = []
    for method in METHODS:
        tasks = {one.task for one in scores if one.method == method}
        for features in _unique(one.features for one in scores):
            own = [one for one in scores if one.method == method and one.features == features]
            if own and {one.task for one in own} == tasks:
                means.append(mean_score(own, title))
    return means


def _chart(title: str, scores: Sequence[TaskScore], colours: Mapping[str, str]) -> ScoreChart:
    rows = []
    for features, colour in colours.items():
        own = [one for method in METHODS for one in scores if (one.method, one.features) == (method, features)]
        if own:
            rows.append(ScoreRow(features, colour, tuple(map(_score, own))))
    chance = 100 * float(np.mean([one.chance for one in scores]))
    return ScoreChart(title, ", ".join(_unique(one.metric for one in scores)), tuple(rows), chance)


def _score(one: TaskScore) -> Score:
    low, high = (100 * (end if math.isfinite(end) else one.score) for end in (one.low, one.high))
    return Score(METHODS.get(one.method, one.method), 100 * one.score, f"{100 * one.score:.1f}", low, high)


def _table(probes: Sequence[TaskScore]) -> Table:
    by_task: dict[tuple[str, str, str], list[TaskScore]] = {}
    for domain in _unique(one.domain for one in probes):
        own = [one for one in probes if one.domain == domain]
        for task in _unique(one.task for one in own):
            by_task |= {
                (domain, task, METHODS[method]): [one for one in own if (one.task, one.method) == (task, method)]
                for method in METHODS
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


def _unique(names: Iterable[Name]) -> list[Name]:
    """Distinct names in order of first appearance."""
    return list(dict.fromkeys(names))
