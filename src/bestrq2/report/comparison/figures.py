"""The figures of a comparison as PNG files, in colours that colour-blind readers tell apart."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bestrq2.files import write_bytes
from bestrq2.report.comparison import training
from bestrq2.report.comparison.arms import Arm, group
from bestrq2.report.comparison.contents import Comparison
from bestrq2.report.comparison.probe_figure import draw_probes
from bestrq2.report.comparison.runs import Run
from bestrq2.report.comparison.training import Band, band, stage

WIDTH, DPI = 9.4, 150
INK, GRID = "#1c1e26", "#e3e1dc"
# Okabe and Ito's, without black and with a darker yellow; further arms repeat them with other strokes and marks.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b38f00", "#6a4c93")
STROKES, MARKS = ("-", (0, (5, 2)), (0, (1.2, 1.2))), ("o", "s", "^")
QUANTITIES = {
    "loss": "cross-entropy (nats)",
    "excess_loss": "loss − target entropy (nats)",
    "code_perplexity": "effective number of codes",
    "code_coverage": "codes in use (%)",
    "top_code_share": "commonest code (%)",
}
TITLES = {
    "loss": "Loss",
    "excess_loss": "Excess loss",
    "code_perplexity": "Code perplexity",
    "code_coverage": "Code coverage",
    "top_code_share": "Top code share",
}
PERCENT = ("code_coverage", "top_code_share")
MOST_POINTS = 150
START = 0.03
CODES = ("code_perplexity", "code_coverage", "top_code_share")
RC = {
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#8a8984",
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": "#4b4c52",
    "ytick.color": "#4b4c52",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
}


def style(index: int) -> tuple[str, Any, str]:
    """Colour, stroke and mark of an arm by its place."""
    round_ = (index // len(COLOURS)) % len(STROKES)
    return COLOURS[index % len(COLOURS)], STROKES[round_], MARKS[round_]


def write(comparison: Comparison) -> None:
    """Write probes.png (where runs were probed), loss.png and codes.png into the comparison's folder."""
    for name, content in _as_png(lambda: draw(comparison)).items():
        write_bytes(comparison.output / f"{name}.png", content)
    if not comparison.probes:
        (comparison.output / "probes.png").unlink(missing_ok=True)


def training_figures(run: Run) -> dict[str, bytes]:
    """The curves of one run as PNG files: loss and codes."""
    arms = group([run])
    return _as_png(lambda: {"loss": draw_losses(arms), "codes": draw_codes(arms)})


def _as_png(draw: Callable[[], dict[str, Any]]) -> dict[str, bytes]:
    """The figures that a function draws, in the style of this package."""
    from matplotlib import rc_context

    files = {}
    with rc_context(RC):
        for name, figure in draw().items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
            files[name] = buffer.getvalue()
    return files


def markdown(comparison: Comparison) -> str:
    """The figures as the end of table.md."""
    names = [*(["probes"] if comparison.probes else []), "loss", "codes"]
    return "\n" + "\n".join(f"![{name}]({name}.png)" for name in names) + "\n"


def draw(comparison: Comparison) -> dict[str, Any]:
    """The figures by the names of their files."""
    figures = {"loss": draw_losses(comparison.arms), "codes": draw_codes(comparison.arms)}
    if comparison.probes:
        styles = {arm.label: style(index) for index, arm in enumerate(comparison.arms)}
        figures["probes"] = draw_probes(comparison.probes, styles, WIDTH)
    return figures


def draw_losses(arms: Sequence[Arm]) -> Any:
    """Loss and excess loss against steps, operations and wall time."""
    figure, axes, height = _grid(2, 3, arms)
    for row, quantity in enumerate(("loss", "excess_loss")):
        name, bands = _bands(arms, quantity)
        for column, against in enumerate(("steps", "gflops", "seconds")):
            _panel(axes[row][column], bands, quantity, against)
            if column:
                axes[row][column].tick_params(labelleft=False)
                axes[row][column].set_ylabel("")
        axes[row][0].set_title(f"{TITLES[quantity]}{f' ({name})' if name else ''}", loc="left")
        _share_limits(axes[row], bands)
    _legend(figure, axes, arms, height)
    return figure


def draw_codes(arms: Sequence[Arm]) -> Any:
    """How the codes are used, against steps."""
    figure, axes, height = _grid(1, 3, arms)
    for column, quantity in enumerate(CODES):
        name, bands = _bands(arms, quantity)
        _panel(axes[0][column], bands, quantity, "steps")
        axes[0][column].set_title(f"{TITLES[quantity]}{f' ({name})' if name else ''}", loc="left")
        _share_limits([axes[0][column]], bands, 100 if quantity in PERCENT else 1)
    _legend(figure, axes, arms, height)
    return figure


def legend_rows(labels: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of a legend below a figure, so that its texts do not overlap."""
    longest = max(map(len, labels))
    most = max(1, min(len(labels), 4, int(WIDTH / (0.75 + 0.075 * longest))))
    rows = math.ceil(len(labels) / most)
    return math.ceil(len(labels) / rows), rows


def _grid(rows: int, columns: int, arms: Sequence[Arm]) -> tuple[Any, Any, float]:
    """A figure with panels above room for a legend; its height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    legend = 0.22 * legend_rows([arm.label for arm in arms])[1] + 0.12
    height = 2.5 * rows + 0.1 + legend
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes, height


def _legend(figure: Any, axes: Any, arms: Sequence[Arm], height: float) -> None:
    from matplotlib.lines import Line2D

    labels = [arm.label for arm in arms]
    columns, rows = legend_rows(labels)
    handles = []
    for index in range(len(arms)):
        colour, stroke, _ = style(index)
        handles.append(Line2D([], [], color=colour, linestyle=stroke, linewidth=1.8))
    figure.tight_layout(rect=(0, (0.22 * rows + 0.12) / height, 1, 1), w_pad=1.2, h_pad=1.2)
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=8.5, handlelength=2.6, columnspacing=2)


def _bands(arms: Sequence[Arm], quantity: str) -> tuple[str | None, list[Band | None]]:
    """Which stage is drawn (never both in one panel), and a band or None for every arm."""
    name = stage(arms, quantity, 2)
    found = [band(arm, f"{name}/{quantity}") if name else None for arm in arms]
    return name, [one and _thinned(one) for one in found]


def _thinned(one: Band) -> Band:
    """Means over as few neighbouring values as make a line of at most MOST_POINTS points, to still the noise."""
    block = math.ceil(len(one.steps) / MOST_POINTS)
    if block == 1:
        return one
    starts = np.arange(0, len(one.steps), block)
    sizes = np.diff([*starts, len(one.steps)])

    def thin(values: Any) -> Any:
        return None if values is None else np.add.reduceat(values, starts) / sizes

    return Band(*(thin(getattr(one, field.name)) for field in dataclasses.fields(one)))


def _panel(axes: Any, bands: Sequence[Band | None], quantity: str, against: str) -> None:
    factor, label = _unit(bands, against)
    scale = 100 if quantity in PERCENT else 1
    width, alpha = (1.5, 0.16) if len(bands) <= 6 else (1.2, 0.08)
    drawn = False
    for index, one in enumerate(bands):
        x = None if one is None else getattr(one, against)
        if one is None or x is None:
            continue
        drawn = True
        colour, stroke, mark = style(index)
        single = {"marker": mark, "markersize": 4} if len(x) == 1 else {}
        axes.plot(x / factor, scale * one.mean, color=colour, linestyle=stroke, linewidth=width, **single)
        if np.any(one.high > one.low):
            axes.fill_between(x / factor, scale * one.low, scale * one.high, color=colour, alpha=alpha, linewidth=0)
    axes.set(xlabel=label, ylabel=QUANTITIES[quantity])
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(left=0)
    if quantity == "excess_loss":
        axes.axhline(0, color="#8a8984", linewidth=0.8, zorder=1)
    if not drawn:
        axes.set_xticks([])
        axes.grid(visible=False)
        why = "not recorded" if any(bands) and against == "seconds" else "not logged"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="#77767a")
    elif against == "steps" and max(float(one.steps[-1]) for one in bands if one) >= 10_000:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")


def _unit(bands: Sequence[Band | None], against: str) -> tuple[float, str]:
    """What values along the x axis are divided by, and what the axis says."""
    ends = [float(values[-1]) for one in bands if one and (values := getattr(one, against)) is not None]
    end = max(ends, default=1.0)
    if against == "gflops":
        factor, unit = training.flops_unit(end)
        return factor, f"training {unit}"
    if against == "seconds":
        factor, unit = training.time_unit(end)
        return factor, f"wall time ({unit})"
    return 1.0, "steps"


def _share_limits(axes: Sequence[Any], bands: Sequence[Band | None], scale: float = 1) -> None:
    """The same y limits for panels of one quantity; the steep start of training may leave them."""
    shown = [(one, one.steps >= START * one.steps[-1]) for one in bands if one]
    lows, highs = (
        [float(one.low[late].min()) for one, late in shown],
        [float(one.high[late].max()) for one, late in shown],
    )
    if not lows:
        return
    low, high = scale * min(lows), scale * max(highs)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    for one in axes:
        one.set_ylim(low - pad, high + pad)
