"""Results of X-ARES as cards of bars beside the published rows: averages, then every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bestrq2.evaluate.published import published_averages, published_scores
from bestrq2.evaluate.xares.averages import AGGREGATIONS, ENTRIES_37, Aggregation, Mean, averages
from bestrq2.evaluate.xares.entries import XaresResult
from bestrq2.evaluate.xares.table import BENCHMARK, metric_of, notes, own_tasks, touched_tasks
from bestrq2.evaluate.xares.tasks import DOMAINS, METHOD_TITLES, METHODS, TASKS
from bestrq2.report.colours import PUBLISHED, PUBLISHED_FAMILY, result_colours, unique
from bestrq2.report.contents import RunCurves

FAMILY = "BEST-RQ"
LINEAR, KNN = METHOD_TITLES["mlp"], METHOD_TITLES["knn"]


@dataclass(frozen=True)
class XaresBar:
    """One bar; percent is its length."""

    method: str
    percent: float
    text: str


@dataclass(frozen=True)
class XaresRow:
    """One model in one card; `lacking` stands in place of bars that would mislead."""

    model: str
    colour: str
    bars: list[XaresBar]
    lacking: str = ""


@dataclass(frozen=True)
class XaresCard:
    """One small figure: an average or a task."""

    title: str
    detail: str
    rows: list[XaresRow]

    @property
    def alternative(self) -> str:
        """The figure in words."""
        texts = [f"{row.model} {row.lacking or ', '.join(f'{bar.text} %' for bar in row.bars)}" for row in self.rows]
        return f"{self.title} ({self.detail}): {'; '.join(texts)}."


@dataclass(frozen=True)
class XaresGroup:
    """Cards under one heading."""

    heading: str
    cards: list[XaresCard]


@dataclass(frozen=True)
class XaresSection:
    """All that a report shows of X-ARES.

    Attributes:
        legend: (name, CSS colour) of the own models, then of published ones where any are shown.
        averages: a group per published aggregation; empty where no entry of it was scored.
        tasks: a group per domain, then those that no average counts and tasks outside of X-ARES.
        table: model, task, domain, metric, then linear probe and k-NN in percent.
        notes: sentences on what is missing, sources and versions.
    """

    legend: list[tuple[str, str]]
    averages: list[XaresGroup]
    tasks: list[XaresGroup]
    table: list[tuple[str, ...]]
    notes: list[str]


def xares_section(results: Sequence[XaresResult], runs: list[RunCurves]) -> XaresSection | None:
    """What there is to show; None without results."""
    if not results:
        return None
    colours = result_colours([result.model for result in results], runs)
    shown = [group for aggregation in AGGREGATIONS if (group := _average_group(results, aggregation, colours))]
    tasks = _task_groups(results, colours)
    legend = list(colours.items())
    if any(touched_tasks(result) for result in results):
        legend += [(f"published, {FAMILY} family", PUBLISHED_FAMILY), ("published, others", PUBLISHED)]
    several = len(results) > 1
    said = [f"{result.model}: {note}" if several else note for result in results for note in _notes(result)]
    return XaresSection(legend, shown, tasks, _table(results), unique(said))


def _notes(result: XaresResult) -> list[str]:
    step = result.provenance.get("step")
    return [*([f"Scored at step {step:,}."] if isinstance(step, int) else []), *notes(result)]


def _average_group(
    results: Sequence[XaresResult], aggregation: Aggregation, colours: Mapping[str, str]
) -> XaresGroup | None:
    """A card per domain of the model cards' aggregation, and per mean over all; None where nothing of it was scored."""
    own = {result.model: averages(result.scores, aggregation) for result in results}
    if not any(one.global_mean.found for one in own.values()):
        return None
    published = published_averages(BENCHMARK, aggregation.name)
    names = [*(domain.capitalize() for domain in DOMAINS), "Global mean", "Mean of means"]
    cards = []
    for place, name in enumerate(names):
        rows = [_own_row(model, colours[model], one.means[place]) for model, one in own.items()]
        for row in published:
            if cell := row.cells[place]:
                colour = published_colour(row.model)
                rows.append(XaresRow(row.model, colour, [XaresBar("published", float(cell), cell)]))
        # Domains that the paper does not give stand in the table only.
        if len(rows) > len(own):
            expected = next(iter(own.values())).means[place].expected
            cards.append(XaresCard(name, f"{expected} entries", rows))
    heading = "As the model cards average" if aggregation is ENTRIES_37 else "As the paper averages"
    return XaresGroup(f"{heading}: {aggregation.name}", cards)


def _own_row(model: str, colour: str, mean: Mean) -> XaresRow:
    if mean.value is None:
        return XaresRow(model, colour, [], mean.text)
    return XaresRow(model, colour, [XaresBar("own", round(100 * mean.value, 2), mean.text)])


def published_colour(model: str) -> str:
    """One grey for the family of this method, another for all else."""
    return PUBLISHED_FAMILY if model.startswith(FAMILY) else PUBLISHED


def _task_groups(results: Sequence[XaresResult], colours: Mapping[str, str]) -> list[XaresGroup]:
    published: dict[str, dict[str, dict[str, float]]] = {}
    for one in published_scores():
        published.setdefault(one.task, {}).setdefault(one.model, {})[one.method] = one.percent
    names = {task.name for result in results for task in touched_tasks(result)}
    touched = [task for task in TASKS.values() if task.name in names]
    groups = [
        (domain.capitalize(), [task.name for task in touched if task.entries and task.domain == domain])
        for domain in DOMAINS
    ]
    groups.append(("Tasks that no average counts", [task.name for task in touched if not task.entries]))
    groups.append(("Tasks outside of X-ARES", unique(name for result in results for name in own_tasks(result))))
    return [
        XaresGroup(heading, [_task_card(results, name, colours, published.get(name, {})) for name in tasks])
        for heading, tasks in groups
        if tasks
    ]


def _task_card(
    results: Sequence[XaresResult],
    task: str,
    colours: Mapping[str, str],
    published: Mapping[str, Mapping[str, float]],
) -> XaresCard:
    rows = []
    for result in results:
        values: dict[str, float] = {score.method: 100 * score.value for score in result.scores if score.task == task}
        lacking = "" if values else "failed" if task in result.failures else "not run"
        rows.append(XaresRow(result.model, colours[result.model], _bars(values), lacking))
    rows += [XaresRow(model, published_colour(model), _bars(values)) for model, values in published.items()]
    metric = next((found for result in results if (found := metric_of(result, task))), "")
    return XaresCard(TASKS[task].title if task in TASKS else task, metric, rows)


def _bars(values: Mapping[str, float]) -> list[XaresBar]:
    return [
        XaresBar(METHOD_TITLES[method], round(values[method], 2), f"{values[method]:.1f}")
        for method in METHODS
        if method in values
    ]


def _table(results: Sequence[XaresResult]) -> list[tuple[str, ...]]:
    rows = []
    for result in results:
        for name in [*(task.name for task in touched_tasks(result)), *own_tasks(result)]:
            values = {score.method: f"{100 * score.value:.2f}" for score in result.scores if score.task == name}
            title, domain = (TASKS[name].title, TASKS[name].domain) if name in TASKS else (name, "")
            cells = [values.get(method, "–") for method in ("mlp", "knn")]
            rows.append((result.model, title, domain, metric_of(result, name), *cells))
    return rows
