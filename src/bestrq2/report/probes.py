"""Probe scores as cards of bars: means per domain, then every task."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bestrq2.evaluate.result import TaskScore
from bestrq2.report.colours import feature_colours, short_task, unique
from bestrq2.report.contents import RunCurves

METHODS = {"linear": "linear probe", "knn": "k-NN"}


@dataclass(frozen=True)
class Bar:
    """One bar; score, low and high in percent of the axis, 0 to 100."""

    method: str
    score: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class FeatureBars:
    """The bars of one kind of features in one card."""

    features: str
    colour: str
    bars: list[Bar]


@dataclass(frozen=True)
class ProbeCard:
    """One small figure: a task, or the mean over several."""

    title: str
    metric: str
    chance: float
    rows: list[FeatureBars]
    alternative: str


@dataclass(frozen=True)
class DomainProbes:
    """All tasks of one domain."""

    domain: str
    colour: str
    cards: list[ProbeCard]


@dataclass(frozen=True)
class ProbeRow:
    """One line of the exact table; numbers as text in percent, `best` within its task and method."""

    score: TaskScore
    method: str
    cells: list[str]
    best: bool


def mean_score(scores: list[TaskScore], task: str) -> TaskScore:
    """Mean over tasks, each counting the same; the interval takes the tasks' errors as independent.

    Half-widths add in squares: mean ± sqrt(sum(half-width²)) / n, separately below and above.
    """
    first, n = scores[0], len(scores)
    mean = float(np.mean([one.score for one in scores]))
    below = math.sqrt(sum((one.score - one.low) ** 2 for one in scores)) / n
    above = math.sqrt(sum((one.high - one.score) ** 2 for one in scores)) / n
    metrics = unique(one.metric for one in scores)
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


def domain_means(probes: list[TaskScore]) -> dict[str, list[TaskScore]]:
    """Domain → mean over its tasks per features and method; with several domains also their mean.

    A mean is only given where features and method have every task, so that means stay comparable.
    """
    means: dict[str, list[TaskScore]] = {}
    for domain in unique(one.domain for one in probes):
        means[domain] = _complete_means([one for one in probes if one.domain == domain], domain)
    if len(means) > 1:
        together = _complete_means([one for scores in means.values() for one in scores], "mean of domains")
        means["Mean of domains"] = together
    return {domain: scores for domain, scores in means.items() if scores}


def _complete_means(scores: list[TaskScore], title: str) -> list[TaskScore]:
    means = []
    for method in METHODS:
        tasks = {one.task for one in scores if one.method == method}
        for features in unique(one.features for one in scores):
            own = [one for one in scores if one.method == method and one.features == features]
            if own and {one.task for one in own} == tasks:
                means.append(mean_score(own, title))
    return means


def probe_cards(
    probes: list[TaskScore], runs: list[RunCurves], domain_colours: dict[str, str]
) -> tuple[list[ProbeCard], list[DomainProbes]]:
    """Cards of means (one per domain, then the mean of domains), and the cards of all tasks by domain.

    A score that is NaN, as of a probe that failed, has no bar; the table still lists it.
    """
    colours = feature_colours(probes, runs)
    probes = [one for one in probes if math.isfinite(one.score)]
    means = [_card(domain, scores, colours) for domain, scores in domain_means(probes).items()]
    domains = []
    for domain in unique(one.domain for one in probes):
        own = [one for one in probes if one.domain == domain]
        tasks = unique(one.task for one in own)
        cards = [_card(short_task(task, domain), [one for one in own if one.task == task], colours) for task in tasks]
        domains.append(DomainProbes(domain, domain_colours[domain], cards))
    return means, domains


def _card(title: str, scores: list[TaskScore], colours: dict[str, str]) -> ProbeCard:
    rows = []
    for features, colour in colours.items():
        own = [one for method in METHODS for one in scores if one.method == method and one.features == features]
        if own:
            rows.append(FeatureBars(features, colour, [_bar(one) for one in own]))
    chance = float(np.mean([one.chance for one in scores]))
    texts = [f"{row.features} " + ", ".join(f"{bar.method} {bar.text} %" for bar in row.bars) for row in rows]
    return ProbeCard(
        title=title,
        metric=", ".join(unique(one.metric for one in scores)),
        chance=round(100 * chance, 2),
        rows=rows,
        alternative=f"{title}: " + "; ".join(texts) + f"; chance {100 * chance:.1f} %.",
    )


def _bar(score: TaskScore) -> Bar:
    def inside(share: float) -> float:
        return round(100 * min(max(share if math.isfinite(share) else score.score, 0.0), 1.0), 2)

    return Bar(
        METHODS.get(score.method, score.method),
        inside(score.score),
        inside(score.low),
        inside(score.high),
        f"{100 * score.score:.1f}",
    )


def probe_table(probes: list[TaskScore]) -> list[ProbeRow]:
    """Every score in percent with two decimals, grouped by domain, task and method."""
    domains, tasks = unique(one.domain for one in probes), unique((one.domain, one.task) for one in probes)
    methods = list(METHODS)
    ordered = sorted(
        probes,
        key=lambda one: (domains.index(one.domain), tasks.index((one.domain, one.task)), methods.index(one.method)),
    )
    best: dict[tuple[str, str, str], float] = {}
    for one in probes:
        key = (one.domain, one.task, one.method)
        best[key] = max(best.get(key, -math.inf), one.score)
    return [
        ProbeRow(
            one,
            METHODS[one.method],
            [f"{100 * value:.2f}" for value in (one.score, one.low, one.high, one.chance)],
            one.score == best[one.domain, one.task, one.method],
        )
        for one in ordered
    ]
