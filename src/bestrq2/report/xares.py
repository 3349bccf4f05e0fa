"""X-ARES results as charts beside the published rows: averages, then every task, and all numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bestrq2.evaluate.published import published_averages, published_scores
from bestrq2.evaluate.result import Result
from bestrq2.evaluate.table import Table
from bestrq2.evaluate.xares.results import (
    AGGREGATIONS,
    BENCHMARK,
    ENTRIES_37,
    Aggregation,
    Mean,
    averages,
    metric_of,
    notes,
    own_tasks,
    touched_tasks,
)
from bestrq2.evaluate.xares.tasks import DOMAINS, METHOD_TITLES, METHODS, TASKS
from bestrq2.report.charts import Score, ScoreChart, ScoreRow
from bestrq2.report.curves import RunCurves, model_colours

PUBLISHED_FAMILY, PUBLISHED = "var(--b0)", "var(--b1)"
FAMILY = "BEST-RQ"


@dataclass(frozen=True)
class XaresSection:
    """What a page shows of X-ARES.

    Attributes:
        legend: name → CSS colour of the models, then of published ones where any are shown.
        averages: heading → charts of one published aggregation; empty where no entry of any was scored.
        tasks: heading → charts of tasks, by domain, then those that no average counts and tasks outside of X-ARES.
        table: every task of every model, in percent.
        notes: sentences on what is missing, sources and versions.
    """

    legend: dict[str, str]
    averages: dict[str, list[ScoreChart]]
    tasks: dict[str, list[ScoreChart]]
    table: Table
    notes: list[str]


def xares_section(results: Sequence[Result], runs: Sequence[RunCurves]) -> XaresSection | None:
    """Charts, table and notes of X-ARES results; None without results.

    Args:
        results: one per model.
        runs: runs that share their colours with models of their name or label.
    """
    if not results:
        return None
    colours = model_colours([result.model for result in results], runs)
    legend = dict(colours)
    if any(touched_tasks(result) for result in results):
        legend |= {f"published, {FAMILY} family": PUBLISHED_FAMILY, "published, others": PUBLISHED}
    several = len(results) > 1
    sentences = [f"{result.model}: {note}" if several else note for result in results for note in _notes(result)]
    return XaresSection(
        legend,
        {heading: charts for one in AGGREGATIONS for heading, charts in _averages(results, one, colours).items()},
        _tasks(results, colours),
        _table(results),
        list(dict.fromkeys(sentences)),
    )


def published_colour(model: str) -> str:
    """One grey for the family of this method, another for all other published models."""
    return PUBLISHED_FAMILY if model.startswith(FAMILY) else PUBLISHED


def _notes(result: Result) -> list[str]:
    step = result.provenance.get("step")
    return [*([f"Scored at step {step:,}."] if isinstance(step, int) else []), *notes(result)]


def _averages(
    results: Sequence[Result], aggregation: Aggregation, colours: Mapping[str, str]
) -> dict[str, list[ScoreChart]]:
    """One chart per domain and per mean over all of them; empty where no entry was scored."""
    own = {result.model: averages(result.scores, aggregation) for result in results}
    if not any(one["global_mean"].found for one in own.values()):
        return {}
    published = published_averages(BENCHMARK, aggregation.name)
    names = [*(domain.capitalize() for domain in DOMAINS), "Global mean", "Mean of means"]
    charts = []
    for place, name in enumerate(names):
        rows = [ScoreRow(model, colours[model], *_mean(list(one.values())[place])) for model, one in own.items()]
        rows += [
            ScoreRow(row.model, published_colour(row.model), (Score("published", float(cell), cell),))
            for row in published
            if (cell := row.cells[place])
        ]
        # the paper does not give every domain; those are in the table only
        if len(rows) > len(own):
            expected = list(next(iter(own.values())).values())[place].expected
            charts.append(ScoreChart(name, f"{expected} entries", tuple(rows)))
    heading = "As the model cards average" if aggregation is ENTRIES_37 else "As the paper averages"
    return {f"{heading}: {aggregation.name}": charts}


def _mean(mean: Mean) -> tuple[tuple[Score, ...], str]:
    """Scores and note of a row: a mean over some of the entries only would mislead."""
    if mean.value is None:
        return (), mean.text
    return (Score("mean", 100 * mean.value, mean.text),), ""


def _tasks(results: Sequence[Result], colours: Mapping[str, str]) -> dict[str, list[ScoreChart]]:
    published: dict[str, dict[str, dict[str, float]]] = {}
    for one in published_scores():
        published.setdefault(one.task, {}).setdefault(one.model, {})[one.method] = one.percent
    names = {task.name for result in results for task in touched_tasks(result)}
    touched = [task for task in TASKS.values() if task.name in names]
    groups = {
        domain.capitalize(): [task.name for task in touched if task.entries and task.domain == domain]
        for domain in DOMAINS
    }
    groups["Tasks that no average counts"] = [task.name for task in touched if not task.entries]
    groups["Tasks outside of X-ARES"] = list(dict.fromkeys(name for result in results for name in own_tasks(result)))
    return {
        heading: [_task(results, name, colours, published.get(name, {})) for name in tasks]
        for heading, tasks in groups.items()
        if tasks
    }


def _task(
    results: Sequence[Result],
    task: str,
    colours: Mapping[str, str],
    published: Mapping[str, Mapping[str, float]],
) -> ScoreChart:
    rows = []
    for result in results:
        values: dict[str, float] = {one.method: 100 * one.score for one in result.scores if one.task == task}
        note = "" if values else "failed" if task in result.failures else "not run"
        rows.append(ScoreRow(result.model, colours[result.model], _scores(values), note))
    rows += [ScoreRow(model, published_colour(model), _scores(values)) for model, values in published.items()]
    metric = next((found for result in results if (found := metric_of(result, task))), "")
    return ScoreChart(TASKS[task].title if task in TASKS else task, metric, tuple(rows))


def _scores(values: Mapping[str, float]) -> tuple[Score, ...]:
    return tuple(
        Score(METHOD_TITLES[method], values[method], f"{values[method]:.1f}") for method in METHODS if method in values
    )


def _table(results: Sequence[Result]) -> Table:
    rows = []
    for result in results:
        for name in [*(task.name for task in touched_tasks(result)), *own_tasks(result)]:
            values = {score.method: f"{100 * score.score:.2f}" for score in result.scores if score.task == name}
            title, domain = (TASKS[name].title, TASKS[name].domain) if name in TASKS else (name, "")
            cells = [values.get(method, "–") for method in METHODS]
            rows.append((result.model, title, domain, metric_of(result, name), *cells))
    return Table(("model", "task", "domain", "metric", "linear probe %", "k-NN %"), tuple(rows), left=4)
