"""Curves of arms over their seeds, and the tables of what training cost and where it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.report.comparison.arms import Arm
from bestrq2.report.comparison.contents import Table
from bestrq2.report.comparison.runs import Run
from bestrq2.report.comparison.statistics import Estimate, estimate
from bestrq2.report.scales import number_text
from bestrq2.run_records import Curve

FINAL = {
    "loss": "loss",
    "excess_loss": "excess loss",
    "accuracy": "accuracy (%)",
    "code_perplexity": "code perplexity",
    "code_coverage": "coverage (%)",
}
SHARES = ("accuracy", "code_coverage")
NONE = "–"


@dataclass(frozen=True)
class Band:
    """A metric of one arm: its mean over seeds, between the lowest and the highest seed.

    Attributes:
        steps: int64 [N], rising.
        mean, low, high: float64 [N].
        seconds: float64 [N], mean over seeds of the seconds of training at those steps; None where not recorded.
        gflops: float64 [N], of training up to those steps.
    """

    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seconds: NDArray[np.float64] | None
    gflops: NDArray[np.float64]


def stage(arms: Sequence[Arm], quantity: str, points: int) -> str | None:
    """Where every run logged a quantity that often in validation, "validation", else "train"; None if neither."""
    for name in ("validation", "train"):
        counts = [len(run.curves[m][0]) if (m := f"{name}/{quantity}") in run.curves else 0 for run in _runs(arms)]
        if counts and min(counts) >= points:
            return name
    return "train" if any(f"train/{quantity}" in run.curves for run in _runs(arms)) else None


def band(arm: Arm, metric: str) -> Band | None:
    """A metric over the seeds of an arm, at the steps of its first run that all logged; None if there are none."""
    curves = [(run, run.curves[metric]) for run in arm.runs if metric in run.curves]
    if not curves:
        return None
    first, last = max(int(steps[0]) for _, (steps, _) in curves), min(int(steps[-1]) for _, (steps, _) in curves)
    grid = curves[0][1][0]
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) == 0:
        return None
    values = np.stack([at(curve, grid) for _, curve in curves])
    timings = [run.timing for run, _ in curves if run.timing is not None]
    seconds = None
    if timings:
        seconds = np.mean([at((np.r_[0, steps], np.r_[0.0, times]), grid) for steps, times in timings], axis=0)
    gflops = np.array([arm.gflops(int(step)) for step in grid])
    return Band(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0), seconds, gflops)


def at(curve: Curve, steps: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of a curve at other steps, on the straight line between its points."""
    return np.asarray(np.interp(steps, curve[0], curve[1]), dtype=np.float64)


def final_values(arm: Arm, metric: str) -> Estimate | None:
    """The last value of a metric over the seeds; None unless all runs logged it."""
    values = [run.final(metric) for run in arm.runs]
    known = [value for value in values if value is not None]
    return estimate(known) if len(known) == len(values) else None


def cost_table(arms: Sequence[Arm]) -> Table:
    """Seeds, steps, size, operations and time of every arm."""
    header = ("", "seeds", "steps", "encoder", "GFLOPs a clip", "training in all", "wall time")
    rows = [
        (
            arm.label,
            ", ".join(str(run.seed) for run in arm.runs),
            f"{arm.first.steps:,}",
            f"{arm.cost.encoder_parameters / 1e6:.2f} M",
            f"{arm.cost.training_gflops:.4g}",
            flops_text(arm.gflops(arm.first.steps)),
            _wall_time(arm),
        )
        for arm in arms
    ]
    return Table("cost of training", header, tuple(rows))


def final_table(arms: Sequence[Arm]) -> Table:
    """Mean over seeds, with its interval, of what was logged last."""
    stages = {quantity: stage(arms, quantity, 1) for quantity in FINAL}
    used = {name for name in stages.values() if name}
    title = f"at the last step ({used.pop()})" if len(used) == 1 else "at the last step"
    header = ("", *(_header(quantity, stages[quantity], bool(used)) for quantity in FINAL))
    rows = [(arm.label, *(_cell(final_values(arm, f"{stages[q]}/{q}"), q in SHARES) for q in FINAL)) for arm in arms]
    return Table(title, header, tuple(rows))


def flops_text(gflops: float) -> str:
    """In the fitting unit: "1.23 PFLOPs"."""
    factor, unit = flops_unit(gflops)
    return f"{gflops / factor:.3g} {unit}"


def flops_unit(gflops: float) -> tuple[float, str]:
    """The largest unit of which there is at least one, and how many GFLOPs it has."""
    power = min(max(math.floor(math.log10(max(gflops, 1)) / 3), 0), 4)
    return 1000.0**power, ("GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs")[power]


def time_text(seconds: float) -> str:
    """In the fitting unit: "41 s", "12.5 min", "3.2 h"."""
    factor, unit = time_unit(seconds)
    return f"{seconds / factor:.3g} {unit}" if factor > 1 else f"{seconds:.0f} s"


def time_unit(seconds: float) -> tuple[float, str]:
    """A unit for durations up to this one, and its seconds."""
    return next((pair for pair in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")) if seconds >= 2 * pair[0]), (1.0, "s"))


def _wall_time(arm: Arm) -> str:
    times = [run.seconds() for run in arm.runs]
    known = [value for value in times if value is not None]
    if not known:
        return "not recorded"
    text = time_text(sum(known) / len(known))
    return text if len(known) == len(times) else f"{text} ({len(known)} of {len(times)} seeds)"


def _header(quantity: str, name: str | None, mixed: bool) -> str:
    return f"{FINAL[quantity]}, {name}" if mixed and name else FINAL[quantity]


def _cell(value: Estimate | None, share: bool) -> str:
    if value is None:
        return NONE
    factor = 100 if share else 1
    text = number_text(factor * value.mean)
    if value.half_width is None:
        return text
    places = len(text.partition(".")[2])
    return f"{text} ± {factor * value.half_width:.{places}f}"


def _runs(arms: Sequence[Arm]) -> list[Run]:
    return [run for arm in arms for run in arm.runs]
