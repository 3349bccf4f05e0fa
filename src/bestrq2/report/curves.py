"""Training curves of runs: what was logged, how each quantity is presented, and one chart per quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bestrq2.report.charts import LineChart, Series, series_style, thinned
from bestrq2.report.scales import Unit, number_text
from bestrq2.run_records import Curve


@dataclass(frozen=True)
class RunCurves:
    """Logged quantities of one run.

    Attributes:
        name: unique short name, such as the name of the run folder.
        label: name in legends; scores whose model is called by the name or the label share the run's colour.
        facts: settings that distinguish the run, for instance {"parameters": "1.2 M"}.
        curves: column of metrics.csv ("train/loss", "validation/accuracy", "probe/speech") → (steps int [N] rising,
            values float [N]). Losses and entropies in nats, shares and scores in 0..1, code perplexity as an effective
            number of codes.
    """

    name: str
    label: str
    facts: dict[str, str]
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Quantity:
    """How one logged quantity is presented."""

    title: str
    y_label: str
    unit: Unit = "number"
    better: str = ""
    explanation: str = ""
    reference: float | None = None


QUANTITIES = {
    "loss": Quantity("Loss", "cross-entropy (nats)", better="lower", explanation="On the codes of hidden patches."),
    "excess_loss": Quantity(
        "Excess loss",
        "loss − target entropy (nats)",
        better="lower",
        explanation="Minus the entropy of all training codes so far: below 0, predictions are better than the "
        "frequencies of the codes.",
        reference=0.0,
    ),
    "accuracy": Quantity(
        "Accuracy", "hidden codes predicted (%)", "percent", "higher", "Share of codes predicted exactly."
    ),
    "code_perplexity": Quantity(
        "Code perplexity", "effective number of codes", explanation="exp(entropy) of all training codes so far."
    ),
    "code_coverage": Quantity(
        "Code coverage", "codebook in use (%)", "percent", explanation="Share of codes that occur at all."
    ),
    "top_code_share": Quantity(
        "Top code’s share",
        "share of patches (%)",
        "percent",
        explanation="Share of the most frequent code; high values mean that the targets collapse.",
    ),
    "target_entropy": Quantity(
        "Target entropy",
        "entropy of the codes (nats)",
        explanation="Of all training codes so far: loss of predicting by frequency alone.",
    ),
    "skipped_steps": Quantity(
        "Skipped steps",
        "optimiser steps",
        "count",
        "lower",
        explanation="Steps whose loss or gradient was not finite; they are skipped and left out of averages.",
    ),
}
GROUPS = {
    "Prediction of the codes": ["loss", "excess_loss", "accuracy"],
    "Use of the codebook": ["code_perplexity", "code_coverage", "top_code_share", "target_entropy"],
}
FURTHER = "Everything else that was logged"
# Prefix of columns in metrics.csv → its word in tables and charts.
STAGES = {"train": "training", "validation": "validation"}
_SPLITS = {**{f"{stage}/": words for stage, words in STAGES.items()}, "val/": "validation", "valid/": "validation"}


def run_colours(runs: Sequence[RunCurves]) -> dict[str, str]:
    """Run name → CSS colour."""
    return {run.name: series_style(index)[0] for index, run in enumerate(runs)}


def run_labels(runs: Sequence[RunCurves]) -> dict[str, str]:
    """Run name → label; runs that share a label, such as that of a recipe, go by their names."""
    labels = [run.label for run in runs]
    return {run.name: run.label if labels.count(run.label) == 1 else run.name for run in runs}


def model_colours(models: Sequence[str], runs: Sequence[RunCurves], baselines: Sequence[str] = ()) -> dict[str, str]:
    """Model → CSS colour: that of the run with this name or label, else one of `baselines`, else an unused one."""
    of_runs = run_colours(runs)
    known = {key.strip().casefold(): of_runs[run.name] for run in reversed(runs) for key in (run.label, run.name)}
    spare = [series_style(index)[0] for index in range(len(runs), len(runs) + len(models))]
    free = iter([*baselines, *spare])
    return {name: known.get(name.strip().casefold()) or next(free) for name in dict.fromkeys(models)}


def curve_charts(runs: Sequence[RunCurves]) -> dict[str, list[LineChart]]:
    """Charts of all logged quantities by heading, each with the curves of every run; `FURTHER` comes last.

    Quantities that never change are left out; `runs_table` has their values.
    """
    logged = list(dict.fromkeys(_split_of(column)[1] for run in runs for column in run.curves))
    groups = {title: [name for name in names if name in logged] for title, names in GROUPS.items()}
    groups["Probes during training"] = [name for name in logged if name.startswith("probe/")]
    groups[FURTHER] = [name for name in logged if not any(name in names for names in groups.values())]
    charts = {
        title: [LineChart(series=series, **vars(presented(name))) for name in names if (series := _series(name, runs))]
        for title, names in groups.items()
    }
    changing = {title: [chart for chart in drawn if not is_constant(chart)] for title, drawn in charts.items()}
    return {title: drawn for title, drawn in changing.items() if drawn}


def is_constant(chart: LineChart) -> bool:
    """Whether no curve of a chart changes, although one has several values."""
    return any(len(one.y) > 1 for one in chart.series) and all(np.ptp(one.y) == 0 for one in chart.series)


def presented(name: str) -> Quantity:
    """How a quantity is presented; unknown ones by their names, probes as scores in percent."""
    if name in QUANTITIES:
        return QUANTITIES[name]
    words = name.removeprefix("probe/").replace("_", " ").replace("/", " · ")
    title = words[:1].upper() + words[1:]
    return Quantity(title, "score (%)", "percent", "higher") if name.startswith("probe/") else Quantity(title, words)


def _split_of(column: str) -> tuple[str, str]:
    """("training" | "validation" | "", quantity) of a column of metrics.csv."""
    for prefix, split in _SPLITS.items():
        if column.startswith(prefix):
            return split, column.removeprefix(prefix)
    return "", column


def _series(name: str, runs: Sequence[RunCurves]) -> list[Series]:
    """Training and validation curves of a quantity for every run that logged a finite value."""
    labels, found = run_labels(runs), []
    kinds = {"training": "noisy", "validation": "checks", "": "mean"}
    for index, run in enumerate(runs):
        colour, dash = series_style(index)
        for column, (steps, values) in run.curves.items():
            split, quantity = _split_of(column)
            x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
            keep = np.isfinite(x) & np.isfinite(y)
            if quantity == name and keep.any():
                x, y = thinned(x[keep], y[keep])
                label = f"{labels[run.name]}, {split}".rstrip(", ")
                found.append(Series(label, colour, np.round(x), y, kind=kinds[split], dash=dash))
    return found


def runs_table(runs: Sequence[RunCurves]) -> list[tuple[str, list[str]]]:
    """(heading, one cell per run): every fact, then the last values in training and in validation, then constants."""
    facts = dict.fromkeys(fact for run in runs for fact in run.facts)
    table = [(fact, [run.facts.get(fact, "–") for run in runs]) for fact in facts]
    for name, quantity in QUANTITIES.items():
        for stage, words in STAGES.items():
            last = [_last(run, f"{stage}/{name}") for run in runs]
            if any(value is not None for value in last):
                cells = ["–" if value is None else number_text(value, quantity.unit) for value in last]
                of_stage = "" if quantity.unit == "count" else f" ({words})"
                table.append((f"final {quantity.title.lower()}{of_stage}", cells))
    for column in dict.fromkeys(column for run in runs for column in run.curves):
        name = _split_of(column)[1]
        if name not in QUANTITIES and is_constant(LineChart(series=_series(name, runs), **vars(presented(name)))):
            cells = ["–" if (value := _last(run, column)) is None else number_text(value) for run in runs]
            table.append((f"{presented(name).title.lower()} (constant)", cells))
    return table


def _last(run: RunCurves, column: str) -> float | None:
    _, values = run.curves.get(column, (None, np.array([])))
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None
