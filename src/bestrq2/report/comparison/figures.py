"""Charts of a comparison: losses, use of the codes and probe scores of the arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bestrq2.evaluate.score_table import METHOD_TITLES
from bestrq2.report.charts import (
    LineChart,
    Score,
    ScoreChart,
    ScoreRow,
    Series,
    score_axis,
    series_style,
    svg_of_lines,
    svg_of_scores,
    thinned,
)
from bestrq2.report.comparison.arms import Arm, Band, band, comparable, group, stage
from bestrq2.report.comparison.probes import ProbeRow
from bestrq2.report.comparison.tables import mean_title, percent
from bestrq2.report.curves import QUANTITIES, STAGES, is_constant
from bestrq2.report.runs import Run
from bestrq2.report.scales import time_unit
from bestrq2.text import flops_unit

CODES = ("code_perplexity", "code_coverage", "top_code_share")
BASELINE_COLOUR = "var(--b0)"
# Fewer points than in a report, to still the noise of runs without validation.
MOST_POINTS = 150


def loss_charts(arms: Sequence[Arm]) -> list[list[LineChart]]:
    """Loss and excess loss against steps, operations and wall time, a row for each and each set of comparable arms."""
    axes = ("steps", "gflops", "seconds")
    return [_row(arms, quantity, axes, of) for of in comparable(arms) for quantity in ("loss", "excess_loss")]


def code_charts(arms: Sequence[Arm]) -> list[list[LineChart]]:
    """Use of the codes against steps, in one row; without what is constant, which the tables give."""
    charts = [_row(arms, quantity, ("steps",), arms)[0] for quantity in CODES]
    return [[chart for chart in charts if not is_constant(chart)] or charts]


def probe_charts(rows: Mapping[str, Sequence[ProbeRow]], arms: Sequence[Arm]) -> dict[str, list[ScoreChart]]:
    """Method → one chart per domain and for their mean: arms with intervals and seeds, then the baselines."""
    colours = {arm.label: series_style(index)[0] for index, arm in enumerate(arms)}
    found = {}
    for method, of_method in rows.items():
        name, charts = METHOD_TITLES[method], []
        for domain in next(row.scores for row in of_method if row.scores):
            drawn = [
                ScoreRow(
                    row.label, colours[row.label] if row.kind == "arm" else BASELINE_COLOUR, *_score(row, domain, name)
                )
                for row in of_method
                if row.kind == "arm" or row.scores
            ]
            axis = score_axis(score for row in drawn for score in row.scores)
            charts.append(
                ScoreChart(mean_title(domain), "95 % intervals over test clips and seeds", tuple(drawn), axis=axis)
            )
        found[name.replace("linear", "Linear")] = charts
    return found


def training_figures(run: Run) -> dict[str, str]:
    """Curves of one run as SVG files by name: loss and codes."""
    arms = group([run])
    return {"loss": svg_of_lines(loss_charts(arms)), "codes": svg_of_lines(code_charts(arms))}


def comparison_figures(arms: Sequence[Arm], rows: Mapping[str, Sequence[ProbeRow]]) -> dict[str, str]:
    """Figures of a comparison as SVG files by name: probes where runs were probed, loss and codes."""
    probes = list(probe_charts(rows, arms).items())
    return {
        **({"probes": svg_of_scores(probes)} if probes else {}),
        "loss": svg_of_lines(loss_charts(arms)),
        "codes": svg_of_lines(code_charts(arms)),
    }


def _score(row: ProbeRow, domain: str, method: str) -> tuple[tuple[Score, ...], str]:
    """Score and note of a row in the chart of a domain."""
    if not row.scores:
        return (), "not probed"
    score = row.scores[domain]
    is_arm = row.kind == "arm"
    low, high = None, None
    if score.half_width is not None:
        low, high = 100 * (score.mean - score.half_width), 100 * (score.mean + score.half_width)
    seeds = tuple(100 * value for value in score.values) if is_arm else ()
    return (Score(method, 100 * score.mean, percent(score, of_seeds=False), low, high, seeds),), ""


def _row(arms: Sequence[Arm], quantity: str, against: Sequence[str], shown_arms: Sequence[Arm]) -> list[LineChart]:
    """Charts of one quantity of some of the arms against several axes, with the same vertical axis."""
    name = stage(arms, quantity, 2)
    bands = [band(arm, f"{name}/{quantity}") if name and arm in shown_arms else None for arm in arms]
    title = f"{QUANTITIES[quantity].title} ({STAGES[name]})" if name else QUANTITIES[quantity].title
    if len(shown_arms) < len(arms):
        title += ": " + "; ".join(arm.label for arm in shown_arms)
    shown = QUANTITIES[quantity]
    charts: list[LineChart] = []
    for axis in against:
        factor, x_label, pointer = _unit(bands, axis)
        series = []
        for index, (arm, one) in enumerate(zip(arms, bands, strict=True)):
            if one is None or (x := getattr(one, axis)) is None:
                continue
            colour, dash = series_style(index)
            x, mean, low, high = thinned(np.asarray(x) / factor, one.mean, one.low, one.high, most=MOST_POINTS)
            series.append(Series(arm.label, colour, np.round(x) if axis == "steps" else x, mean, low, high, dash=dash))
        charts.append(
            LineChart(
                title=title,
                series=series,
                y_label=shown.y_label,
                x_label=x_label,
                unit=shown.unit,
                better=shown.better,
                shared_y=charts[0].y if charts else None,
                pointer=pointer,
                reference=shown.reference,
                empty="not recorded" if axis == "seconds" and any(bands) else "not logged",
            )
        )
    return charts


def _unit(bands: Sequence[Band | None], axis: str) -> tuple[float, str, str]:
    """Divisor of the values along a horizontal axis, its label, and how the place of the pointer is written."""
    ends = [float(values[-1]) for one in bands if one and (values := getattr(one, axis)) is not None]
    end = max(ends, default=1.0)
    if axis == "gflops":
        factor, unit = flops_unit(end)
        return factor, f"training compute ({unit})", f"{{}} {unit}"
    if axis == "seconds":
        factor, unit = time_unit(end)
        return factor, f"wall time ({unit})", f"{{}} {unit}"
    return 1.0, "step", "step {}"
