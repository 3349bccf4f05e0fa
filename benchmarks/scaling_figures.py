"""The plots of benchmarks/scaling.py."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bestrq2.files import write_bytes

Point = dict[str, Any]
# Colours that colour-blind readers tell apart, after Okabe and Ito.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b38f00", "#6a4c93")
RC = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e1dc",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


class Law:
    """Expected milliseconds per clip, from three constants of the reference.

    Args:
        reference: the measured reference point
    """

    def __init__(self, reference: Point) -> None:
        clips = reference["batch"]
        self.front_end = reference["front_end"] / clips / reference["clip_seconds"]
        self.gflop = reference["network"] / clips / reference["gflops"]
        self.parameter = reference["optimiser"] / reference["parameters"]

    def clip(self, point: Point, gflops: str = "gflops") -> float:
        """Of one clip in a batch like the point's."""
        front, network = self.front_end * point["clip_seconds"], self.gflop * point[gflops]
        return front + network + self.parameter * point["parameters"] / point["batch"]


def measured_clip(point: Point) -> float:
    """Measured milliseconds per clip."""
    return (point["front_end"] + point["network"] + point["optimiser"]) / point["batch"]


def _by_recipe(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point["recipe"], []).append(point)
    return found


def _dots(axes: Any, points: Sequence[Point], values: Sequence[float], colour: str, label: str) -> None:
    xs = [point["x"] for point in points]
    axes.plot(xs, values, "o", color=colour, markersize=5, label=label)


def _line(
    axes: Any, points: Sequence[Point], values: Sequence[float], colour: str, label: str, stroke: Any = "-"
) -> None:
    axes.plot([point["x"] for point in points], values, linestyle=stroke, color=colour, linewidth=1.4, label=label)


def _ticks(axes: Any, points: Sequence[Point]) -> None:
    xs = sorted({point["x"] for point in points})
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_length(axes: Any, points: list[Point], measured: dict[str, Any]) -> None:
    law = Law(measured["reference"])
    _dots(axes, points, [measured_clip(p) / p["x"] for p in points], COLOURS[0], "measured")
    _line(axes, points, [law.clip(p) / p["x"] for p in points], COLOURS[0], "law")
    _line(axes, points, [law.clip(p, "linear_gflops") / p["x"] for p in points], COLOURS[1],
          "law without the quadratic part of attention", "--")  # fmt: skip
    axes.set_xscale("log")
    _ticks(axes, points)
    axes.set_xlabel("length of a clip (s); 160 s of audio in a batch")
    axes.set_ylabel("ms per second of audio")
    axes.set_ylim(bottom=0)


def draw_batch(axes: Any, points: list[Point], measured: dict[str, Any]) -> None:
    law = Law(measured["reference"])
    _dots(axes, points, [measured_clip(p) for p in points], COLOURS[0], "measured")
    _line(axes, points, [law.clip(p) for p in points], COLOURS[0], "law: the optimiser is shared by the batch")
    axes.set_xscale("log")
    _ticks(axes, points)
    axes.set_xlabel("clips in a batch")
    axes.set_ylabel("ms a clip")
    axes.set_ylim(bottom=0)


def draw_model(axes: Any, points: list[Point], measured: dict[str, Any]) -> None:
    law, peak = Law(measured["reference"]), measured["peak_gflops"]
    points = sorted(points, key=lambda point: point["x"])
    for stage, colour in (("two steps", COLOURS[0]), ("one stage", COLOURS[1])):
        some = [point for point in points if ("vit" in point["recipe"]) == (stage == "one stage")]
        _dots(axes, some, [measured_clip(p) for p in some], colour, stage)
    _line(axes, points, [law.clip(p) for p in points], COLOURS[0], "law: GFLOP at the rate of the reference")
    _line(axes, points, [1000 * p["gflops"] / peak for p in points], "#5b5e66", f"floor: {peak:.0f} GFLOP/s", "--")
    for point in points:
        name = point["recipe"].removeprefix("best-rq-")
        name = f"{name}-base" if name == "2" else name
        above = measured_clip(point) > law.clip(point) or "vit" in name
        place, side = ((-6, 6), "right") if above else ((6, -11), "left")
        at = point["x"], measured_clip(point)
        axes.annotate(name, at, place, textcoords="offset points", fontsize=7.5, ha=side)
    axes.margins(x=0.12)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("GFLOP a clip, forward and backward")
    axes.set_ylabel("ms a clip")


def draw_ratio(axes: Any, points: list[Point], measured: dict[str, Any]) -> None:
    law = Law(measured["reference"])
    for (recipe, some), colour in zip(_by_recipe(points).items(), COLOURS, strict=False):
        stage = "one stage" if "vit" in recipe else "two steps"
        _dots(axes, some, [measured_clip(p) for p in some], colour, f"{stage}, measured")
        _line(axes, some, [law.clip(p) for p in some], colour, f"{stage}, law")
    axes.set_xlabel("share of hidden patches")
    axes.set_ylabel("ms a clip")
    axes.set_ylim(bottom=0)


def draw_processes(axes: Any, points: list[Point], measured: dict[str, Any]) -> None:
    cores, first = measured["cpus"], points[0]["step"] / points[0]["batch"]
    _dots(axes, points, [p["step"] / p["batch"] for p in points], COLOURS[0], "measured")
    _line(axes, points, [first / min(p["x"], cores) for p in points], COLOURS[0], f"law: shared by up to {cores} cores")
    axes.set_xscale("log", base=2)
    _ticks(axes, points)
    axes.set_xlabel("processes, one thread each; 32 clips a step")
    axes.set_ylabel("ms a clip")
    axes.set_ylim(bottom=0)


PLOTS: dict[str, Callable[[Any, list[Point], dict[str, Any]], None]] = {
    "length": draw_length,
    "batch": draw_batch,
    "model": draw_model,
    "ratio": draw_ratio,
    "processes": draw_processes,
}


def write(measured: dict[str, Any], folder: Path) -> None:
    """Write scaling-NAME.png for every measured plot."""
    for name, points in measured["plots"].items():
        with rc_context(RC):
            figure = Figure(figsize=(5.2, 3.1), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            PLOTS[name](axes, points, measured)
            axes.legend(fontsize=7.5, loc="best")
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=110, facecolor="white")
        write_bytes(folder / f"scaling-{name}.png", content.getvalue())
