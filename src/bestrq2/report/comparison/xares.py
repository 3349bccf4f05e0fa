"""X-ARES in a comparison: averages over 37 entries, of arms and of published models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bestrq2.evaluate.published import published_averages
from bestrq2.evaluate.xares.averages import ENTRIES_37, Averages, averages
from bestrq2.evaluate.xares.table import BENCHMARK
from bestrq2.report.comparison.arms import Arm
from bestrq2.report.comparison.contents import Table
from bestrq2.report.comparison.statistics import estimate

MEANS = ("speech", "music", "environment", "global mean", "mean of means")


def xares_tables(arms: Sequence[Arm]) -> list[Table]:
    """Arms, then published models; no table where no run has a result that counts."""
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


def xares_numbers(arm: Arm) -> list[dict[str, Any] | None]:
    """By run, the averages by every aggregation; None of a run without a result."""
    return [None if run.xares is None else run.xares.averages for run in arm.runs]


def _averages(arm: Arm) -> list[Averages]:
    return [averages(run.xares.scores, ENTRIES_37) for run in arm.runs if run.xares is not None]


def _cell(own: Sequence[Averages], place: int, seeds: int) -> str:
    """Mean over the seeds that have all entries, with its interval; else what the fullest of them has."""
    means = [one.means[place] for one in own]
    values = [mean.value for mean in means if mean.value is not None]
    if not values:
        return max(means, key=lambda mean: mean.found).text if means else ""
    found = estimate(values)
    text = f"{100 * found.mean:.2f}"
    if found.half_width is not None:
        text += f" ± {100 * found.half_width:.2f}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds} seeds)"
