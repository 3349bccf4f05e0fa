"""X-ARES in a comparison: averages over 37 entries, of arms and of published models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bestrq2.evaluate.published import published_averages
from bestrq2.evaluate.xares.averages import ENTRIES_37, Averages, averages
from bestrq2.evaluate.xares.entries import XaresResult
from bestrq2.evaluate.xares.table import BENCHMARK
from bestrq2.report.comparison.arms import Arm
from bestrq2.report.comparison.contents import Table
from bestrq2.report.comparison.statistics import estimate

MEANS = ("speech", "music", "environment", "global mean", "mean of means")


def xares_tables(arms: Sequence[Arm]) -> list[Table]:
    """Averages of arms and published models where a run has entries that count, and the tasks of all arms."""
    return [*_means(arms), *_tasks(arms)]


def _means(arms: Sequence[Arm]) -> list[Table]:
    by_arm = {arm.label: _averages(arm) for arm in arms}
    if not any(one.global_mean.found for own in by_arm.values() for one in own):
        return []
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        own = by_arm[arm.label]
        cells = [_cell(own, place, len(arm.runs)) for place in range(len(MEANS))]
        rows.append((arm.label, *cells) if own else (arm.label, "not run"))
    rows += [(f"{row.model} (published)", *row.cells) for row in published_averages(BENCHMARK, ENTRIES_37.name)]
    return [Table(f"{BENCHMARK}, {ENTRIES_37.name} (%)", ("", *MEANS), tuple(rows))]


def _tasks(arms: Sequence[Arm]) -> list[Table]:
    """A row a task that any run has a score of: means over the seeds, linear probe and k-NN."""
    found = [_scores(run.xares) if run.xares is not None else {} for arm in arms for run in arm.runs]
    tasks = list(dict.fromkeys(task for scores in found for task in scores))
    if not tasks:
        return []
    rows = [(task, *(_task_cell(arm, task) for arm in arms)) for task in tasks]
    return [Table(f"{BENCHMARK}, linear / k-NN (%)", ("", *(arm.label for arm in arms)), tuple(rows))]


def _task_cell(arm: Arm, task: str) -> str:
    runs = [_scores(run.xares).get(task, {}) for run in arm.runs if run.xares is not None]
    cells = []
    for method in ("mlp", "knn"):
        values = [scores[method] for scores in runs if method in scores]
        cells.append(_text(values, len(arm.runs), 1) if values else "–")
    return "–" if set(cells) == {"–"} else " / ".join(cells)


def _scores(result: XaresResult) -> dict[str, dict[str, float]]:
    """Scores by task and method."""
    found: dict[str, dict[str, float]] = {}
    for score in result.scores:
        found.setdefault(score.task, {})[score.method] = score.value
    return found


def xares_numbers(arm: Arm) -> list[dict[str, Any] | None]:
    """By run, the averages by every aggregation and the scores by task; None of a run without a result."""
    return [None if run.xares is None else {**run.xares.averages, "scores": _scores(run.xares)} for run in arm.runs]


def _averages(arm: Arm) -> list[Averages]:
    return [averages(run.xares.scores, ENTRIES_37) for run in arm.runs if run.xares is not None]


def _cell(own: Sequence[Averages], place: int, seeds: int) -> str:
    """Mean over the seeds that have all entries, with its interval; else what the fullest of them has."""
    means = [one.means[place] for one in own]
    values = [mean.value for mean in means if mean.value is not None]
    if not values:
        return max(means, key=lambda mean: mean.found).text if means else ""
    return _text(values, seeds, 2)


def _text(values: Sequence[float], seeds: int, digits: int) -> str:
    found = estimate(values)
    text = f"{100 * found.mean:.{digits}f}"
    if found.half_width is not None:
        text += f" ± {100 * found.half_width:.{digits}f}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds} seeds)"
