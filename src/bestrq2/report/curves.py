"""Training curves: one figure per quantity, all runs over each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.report.colours import run_colours, run_labels, unique
from bestrq2.report.contents import RunCurves
from bestrq2.report.scales import Axis, Tick, Unit, number_text, padded_axis

MOST_POINTS = 400
SMOOTH_FROM = 60
MOST_DOTS = 40


@dataclass(frozen=True)
class Quantity:
    """How one logged quantity is presented."""

    title: str
    y_label: str
    unit: Unit = "number"
    explanation: str = ""
    reference: float | None = None


QUANTITIES = {
    "loss": Quantity("Loss", "cross-entropy (nats)", explanation="Of the hidden patches’ codes; lower is better."),
    "excess_loss": Quantity(
        "Excess loss",
        "loss − target entropy (nats)",
        explanation="Below 0 the model knows more than how often each code occurs.",
        reference=0.0,
    ),
    "accuracy": Quantity("Accuracy", "hidden codes named (%)", "percent", "Share of hidden patches named exactly."),
    "code_perplexity": Quantity(
        "Code perplexity", "effective number of codes", explanation="exp(entropy) of the codes in a batch."
    ),
    "code_coverage": Quantity("Code coverage", "codebook in use (%)", "percent", "Codes that occur at all."),
    "top_code_share": Quantity(
        "Top code’s share", "share of patches (%)", "percent", "Of the commonest code; high means the targets collapse."
    ),
    "target_entropy": Quantity(
        "Target entropy", "entropy of the codes (nats)", explanation="The loss of guessing by frequency alone."
    ),
    "skipped_steps": Quantity(
        "Skipped steps",
        "optimiser steps",
        explanation="Loss or gradient was not finite: the step changed nothing and is in no average.",
    ),
}
GROUPS = {
    "Naming the codes": ["loss", "excess_loss", "accuracy"],
    "Use of the codebook": ["code_perplexity", "code_coverage", "top_code_share", "target_entropy"],
}


@dataclass(frozen=True)
class Line:
    """One drawn line: an SVG path in a 1000 × 1000 box; `kind` is "mean", "record" (thin), "validation" or "dots"."""

    path: str
    colour: str
    kind: str = "mean"


@dataclass(frozen=True)
class CurveFigure:
    """One figure; `readings` is what the pointer reads: {"low", "high", "unit", "series": [...]}."""

    title: str
    y_label: str
    explanation: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    reference_at: float | None
    lines: list[Line]
    alternative: str
    readings: dict[str, object]


@dataclass(frozen=True)
class Series:
    """One run's record of a quantity: steps [N], values [N] (at most MOST_POINTS)."""

    label: str
    split: str
    colour: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def smoothed(self) -> NDArray[np.float64]:
        """Running mean [N] over a twentieth of the points where there are many, else the values."""
        half = len(self.values) // 40
        if len(self.values) < SMOOTH_FROM or half == 0:
            return self.values
        total = np.concatenate([[0.0], np.cumsum(self.values)])
        index = np.arange(len(self.values))
        start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(self.values))
        return (total[stop] - total[start]) / (stop - start)


@dataclass(frozen=True)
class CurveGroup:
    """Figures that belong together, under one heading."""

    title: str
    figures: list[CurveFigure]


def curve_groups(runs: list[RunCurves]) -> tuple[list[CurveGroup], list[CurveFigure]]:
    """Figures of what a reader looks for, and those of everything else that was logged."""
    logged = unique(_quantity_of(column) for run in runs for column in run.curves)
    wanted = {title: [name for name in names if name in logged] for title, names in GROUPS.items()}
    wanted["Probes during training"] = [name for name in logged if name.startswith("probe/")]
    rest = [name for name in logged if not any(name in names for names in wanted.values())]
    groups = [CurveGroup(title, _figures(names, runs)) for title, names in wanted.items()]
    return [group for group in groups if group.figures], _figures(rest, runs)


def _figures(names: list[str], runs: list[RunCurves]) -> list[CurveFigure]:
    return [figure for figure in (_figure(name, runs) for name in names) if figure is not None]


def _split_of(column: str) -> tuple[str, str]:
    """("train" | "validation" | "", quantity) of a column of metrics.csv."""
    for prefix, split in (("train/", "training"), ("validation/", "validation"), ("val/", "validation")):
        if column.startswith(prefix):
            return split, column.removeprefix(prefix)
    return "", column


def _quantity_of(column: str) -> str:
    return _split_of(column)[1]


def _present(name: str) -> Quantity:
    if name in QUANTITIES:
        return QUANTITIES[name]
    words = name.removeprefix("probe/").replace("_", " ").replace("/", " · ")
    title = words[:1].upper() + words[1:]
    return Quantity(title, "score (%)", "percent") if name.startswith("probe/") else Quantity(title, words)


def _series(name: str, runs: list[RunCurves]) -> list[Series]:
    colours, labels, found = run_colours(runs), run_labels(runs), []
    for run in runs:
        for column, (steps, values) in run.curves.items():
            split, quantity = _split_of(column)
            x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
            keep = np.isfinite(x) & np.isfinite(y)
            if quantity == name and keep.any():
                x, y = _thinned(x[keep], y[keep])
                found.append(Series(labels[run.name], split, colours[run.name], x, y))
    return found


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most MOST_POINTS points: means over equal groups, the last point kept as it is."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x) - 1, MOST_POINTS).astype(int)
    counts = np.diff(edges)
    means = [np.append(np.add.reduceat(v[:-1], edges[:-1]) / counts, v[-1]) for v in (x, y)]
    return means[0], means[1]


def _figure(name: str, runs: list[RunCurves]) -> CurveFigure | None:
    series = _series(name, runs)
    if not series:
        return None
    shown = _present(name)
    drawn = [one.smoothed if one.split == "training" else one.values for one in series]
    low, high = min(float(v.min()) for v in drawn), max(float(v.max()) for v in drawn)
    if shown.reference is not None:
        low, high = min(low, shown.reference), max(high, shown.reference)
    y = padded_axis(low, high, shown.unit)
    first, last = min(float(s.steps[0]) for s in series), max(float(s.steps[-1]) for s in series)
    x = Axis(min(first, 0.0), last) if last > min(first, 0.0) else padded_axis(first, last)
    return CurveFigure(
        title=shown.title,
        y_label=shown.y_label,
        explanation=shown.explanation,
        x_ticks=x.ticks(4),
        y_ticks=y.ticks(5),
        reference_at=None if shown.reference is None else y.percent(shown.reference),
        lines=_lines(series, x, y),
        alternative=_alternative(shown, series),
        readings={
            "low": x.low,
            "high": x.high,
            "unit": shown.unit,
            "series": [
                {
                    "label": f"{one.label}, {one.split}".rstrip(", "),
                    "colour": one.colour,
                    "dashed": one.split == "validation",
                    "steps": [round(float(step)) for step in one.steps],
                    "values": [float(f"{value:.5g}") for value in one.values],
                }
                for one in series
            ],
        },
    )


def _lines(series: list[Series], x: Axis, y: Axis) -> list[Line]:
    """Thin records at the bottom, then running means, validation on top with its points where they are few."""
    records, means, checks = [], [], []
    for one in series:
        path = _path(one.steps, one.values, x, y)
        if one.split == "validation":
            checks.append(Line(path, one.colour, "validation"))
            if len(one.values) <= MOST_DOTS:
                checks.append(Line(path.replace("L", "h0M") + "h0", one.colour, "dots"))
        else:
            smoothed = one.smoothed if one.split == "training" else one.values
            means.append(Line(_path(one.steps, smoothed, x, y), one.colour))
            if smoothed is not one.values:
                records.append(Line(path, one.colour, "record"))
    return records + means + checks


def _path(steps: NDArray[np.float64], values: NDArray[np.float64], x: Axis, y: Axis) -> str:
    """SVG path; a single point becomes a dot (a line of no length with round ends)."""
    points = [f"{10 * x.percent(s):.1f} {1000 - 10 * y.percent(v):.1f}" for s, v in zip(steps, values, strict=True)]
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def _alternative(shown: Quantity, series: list[Series]) -> str:
    parts = [
        f"{one.label} {one.split}".strip()
        + f" from {number_text(float(one.values[0]), shown.unit)} to {number_text(float(one.values[-1]), shown.unit)}"
        for one in series
    ]
    return f"{shown.title} over training steps: " + "; ".join(parts) + "."


def runs_table(runs: list[RunCurves]) -> list[tuple[str, list[str]]]:
    """(heading, one cell per run): every fact, then last values (validation where there is one, else training)."""
    table = [
        (fact, [run.facts.get(fact, "–") for run in runs]) for fact in unique(f for run in runs for f in run.facts)
    ]
    for name, quantity in QUANTITIES.items():
        last = [_last(run, name) for run in runs]
        if any(value is not None for value in last):
            cells = ["–" if value is None else number_text(value, quantity.unit) for value in last]
            table.append((f"final {quantity.title.lower()}", cells))
    return table


def _last(run: RunCurves, quantity: str) -> float | None:
    for split in ("validation/", "train/"):
        _, values = run.curves.get(split + quantity, (None, np.array([])))
        if len(values) and np.isfinite(values[-1]):
            return float(values[-1])
    return None
