"""Charts of curves and scores, for pages with the values under the pointer and as SVG files.

Colours are CSS variables of page.css with one set for light and one for dark pages; files have the light set.
"""

from __future__ import annotations

import functools
import html
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from bestrq2.report.scales import Axis, Tick, Unit, number_text, padded_axis

STYLE_SHEET = Path(__file__).parent / "page.css"
SERIES_COLOURS, DOMAIN_COLOURS, GROUP_COLOURS = 8, 6, 8
# Where colours repeat, strokes tell series apart.
DASHES = ("", "7 3", "2 2.5")
MOST_POINTS, SMOOTH_FROM, MOST_DOTS = 400, 60, 40
# The steep beginning of training may leave a chart, so that the rest keeps its resolution.
BEGINNING = 0.03

Values = NDArray[np.float64]


def series_style(index: int) -> tuple[str, str]:
    """CSS colour and dash pattern of the series at a place."""
    return f"var(--s{index % SERIES_COLOURS})", DASHES[index // SERIES_COLOURS % len(DASHES)]


def domain_colours(domains: Iterable[str]) -> dict[str, str]:
    """CSS colour of every domain; speech, music and environment always keep theirs, other groups have eight in turn."""
    names = list(dict.fromkeys(domains))
    usual = {"speech": 0, "music": 1, "environment": 2}
    if not any(name.casefold() in usual for name in names):
        return {name: f"var(--c{index % GROUP_COLOURS})" for index, name in enumerate(names)}
    others = [name for name in names if name.casefold() not in usual]
    numbers = usual | {name.casefold(): 3 + index % (DOMAIN_COLOURS - 3) for index, name in enumerate(others)}
    return {name: f"var(--d{numbers[name.casefold()]})" for name in names}


# --- curves ---


@dataclass(frozen=True)
class Series:
    """One curve of a line chart.

    Attributes:
        label: name in legends and beside the pointer.
        colour: CSS colour.
        x, y: float64 [N], finite, x rising.
        low, high: float64 [N], band around y; None for a curve without one.
        kind: "mean", "noisy" (its running mean is drawn thick, the values thin) or "checks" (dashed, a dot per value).
        dash: SVG dash pattern of the curve, "" for a solid one.
    """

    label: str
    colour: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    kind: str = "mean"
    dash: str = ""

    @property
    def smoothed(self) -> Values:
        """Running mean [N] over a twentieth of the values of a long noisy curve, else the values."""
        half = len(self.y) // 40
        # differences of cumulative sums give every window mean at once; windows are cut at the ends
        if self.kind != "noisy" or len(self.y) < SMOOTH_FROM or half == 0:
            return self.y
        total = np.concatenate([[0.0], np.cumsum(self.y)])
        index = np.arange(len(self.y))
        start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(self.y))
        return np.asarray((total[stop] - total[start]) / (stop - start))

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest value to show."""
        late = self.x >= BEGINNING * self.x[-1]
        low = self.smoothed if self.low is None else self.low
        high = self.smoothed if self.high is None else self.high
        return float(low[late].min()), float(high[late].max())


def thinned(x: Values, *rows: Values, most: int = MOST_POINTS) -> tuple[Values, ...]:
    """At most `most` points of x [N] and rows [N]: means over equal groups, the last point kept as it is."""
    if len(x) <= most:
        return (x, *rows)
    edges = np.linspace(0, len(x) - 1, most).astype(int)
    counts = np.diff(edges)
    return tuple(np.append(np.add.reduceat(row[:-1], edges[:-1]) / counts, row[-1]) for row in (x, *rows))


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Curves over a common axis.

    Attributes:
        title, y_label, x_label: texts around the chart.
        series: curves in the order of the legend; none where `empty` says why.
        unit: unit of the vertical axis.
        better: "lower" or "higher" where such values are better, else "".
        shared_y: vertical axis shared with another chart; None for one that holds the series and the reference.
        pointer: text of the pointer's place, such as "step {}".
        explanation: sentence below the chart, "" for none.
        reference: value with a line across, None for none.
        empty: text in place of the curves.
    """

    title: str
    y_label: str
    series: Sequence[Series]
    x_label: str = "step"
    unit: Unit = "number"
    better: str = ""
    shared_y: Axis | None = None
    pointer: str = "step {}"
    explanation: str = ""
    reference: float | None = None
    empty: str = "not logged"

    @functools.cached_property
    def x(self) -> Axis:
        """Horizontal axis, from 0 or the first value to the last."""
        if not self.series:
            return Axis(0, 1)
        first = min(0.0, *(float(one.x[0]) for one in self.series))
        last = max(float(one.x[-1]) for one in self.series)
        return Axis(first, last) if last > first else padded_axis(first, last)

    @functools.cached_property
    def y(self) -> Axis:
        """Vertical axis."""
        if self.shared_y is not None or not self.series:
            return self.shared_y or Axis(0, 1)
        ends = [end for one in self.series for end in one.limits]
        ends += [] if self.reference is None else [self.reference]
        if self.unit == "count":
            return Axis(0, 1.06 * max(1.0, *ends), self.unit)
        return padded_axis(min(ends), max(ends), self.unit)

    @property
    def x_ticks(self) -> list[Tick]:
        """Ticks of the horizontal axis."""
        return self.x.ticks(4) if self.series else []

    @property
    def y_ticks(self) -> list[Tick]:
        """Ticks of the vertical axis."""
        return self.y.ticks(5) if self.series else []

    @property
    def alternative(self) -> str:
        """The chart in words."""
        parts = [
            f"{one.label} from {number_text(float(one.y[0]), self.y.unit)} to "
            f"{number_text(float(one.y[-1]), self.y.unit)}"
            for one in self.series
        ]
        better = f", {self.better} is better" if self.better else ""
        return f"{self.title} by {self.x_label}{better}: {'; '.join(parts) or self.empty}."

    @property
    def readings(self) -> dict[str, object]:
        """Values for the pointer, as plain JSON types."""
        return {
            "low": self.x.low,
            "high": self.x.high,
            "unit": self.y.unit,
            "pointer": self.pointer,
            "series": [
                {
                    "label": one.label,
                    "colour": one.colour,
                    "dashed": one.kind == "checks" or bool(one.dash),
                    "x": [round(float(x), 2) for x in one.x],
                    "y": _digits(one.y),
                    **(
                        {}
                        if one.low is None or one.high is None
                        else {"low": _digits(one.low), "high": _digits(one.high)}
                    ),
                }
                for one in self.series
            ],
        }

    def plot(self, left: float = 0, top: float = 0, width: float = 1000, height: float = 1000) -> Markup:
        """Grid and curves as SVG elements in a box; strokes keep their width when the box is stretched."""

        def level(percent: float) -> str:
            return f"M{left:g} {top + height * (1 - percent / 100):.1f}h{width:g}"

        parts = [_path(level(tick.at), "var(--grid)", 1) for tick in self.y_ticks]
        if self.reference is not None and self.series:
            parts.append(_path(level(self.y.percent(self.reference)), "var(--muted)", 1, "2 3"))

        def line(x: Values, y: Values) -> str:
            across = left + width * (x - self.x.low) / (self.x.high - self.x.low)
            down = top + height * (1 - (y - self.y.low) / (self.y.high - self.y.low))
            points = [f"{a:.1f} {b:.1f}" for a, b in zip(across, down, strict=True)]
            # a single point becomes a line of no length, which round ends make a dot
            return "L".join(points if len(points) > 1 else points * 2)

        bands, records, means, checks = [], [], [], []
        for one in self.series:
            curve = "M" + line(one.x, one.y)
            if one.low is not None and one.high is not None and np.any(one.high > one.low):
                outline = f"M{line(one.x, one.low)}L{line(one.x[::-1], one.high[::-1])}Z"
                bands.append(f'<path style="fill:{one.colour};fill-opacity:.15" d="{outline}"/>')
            if one.kind == "checks":
                checks.append(_path(curve, one.colour, 1.5, "5 4"))
                if len(one.y) <= MOST_DOTS:
                    checks.append(_path(curve.replace("L", "h0M") + "h0", one.colour, 6))
                continue
            if one.smoothed is not one.y:
                records.append(_path(curve, one.colour, 1, opacity=0.28))
            # a single value is a dot as large as those of checks
            stroke, dash = (2, one.dash) if len(one.y) > 1 else (6, "")
            means.append(_path("M" + line(one.x, one.smoothed), one.colour, stroke, dash))
        return Markup("".join(parts + bands + records + means + checks))


def _digits(values: Values) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _path(shape: str, colour: str, width: float, dash: str = "", opacity: float = 1) -> str:
    ends = "butt" if dash else "round"
    style = f"stroke:{colour};stroke-width:{width:g};stroke-linecap:{ends};stroke-linejoin:round;fill:none"
    style += f";stroke-dasharray:{dash}" if dash else ""
    style += f";opacity:{opacity:g}" if opacity < 1 else ""
    return f'<path style="{style}" vector-effect="non-scaling-stroke" d="{shape}"/>'


# --- scores ---

PERCENT = Axis(0, 100)


@dataclass(frozen=True)
class Score:
    """One value in percent of a score chart.

    Attributes:
        method: name of the method, such as "linear probe".
        value: percent.
        text: the value as printed.
        low, high: ends of its interval in percent; None for a value without one.
        seeds: values in percent that it is the mean of.
    """

    method: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class ScoreRow:
    """One model in a score chart; `note` stands in place of scores that are missing or would mislead."""

    label: str
    colour: str
    scores: tuple[Score, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class ScoreChart:
    """Scores of several models on one task, or their means over tasks.

    Attributes:
        title: task or domain.
        detail: metric or number of entries.
        rows: one per model.
        chance: percent, drawn across the rows; None for none.
        axis: axis in percent; bars start at its low end where that is 0, else scores are dots.
    """

    title: str
    detail: str
    rows: tuple[ScoreRow, ...]
    chance: float | None = None
    axis: Axis = PERCENT

    @property
    def bars(self) -> bool:
        """Whether scores are bars from zero instead of dots."""
        return self.axis == PERCENT

    @property
    def ticks(self) -> list[Tick]:
        """Ticks of the axis."""
        return self.axis.ticks(4)

    def at(self, value: float) -> float:
        """Position of a value in percent of the chart's width, inside it."""
        return round(min(max(self.axis.percent(value), 0.0), 100.0), 2)

    def reading(self, row: ScoreRow, score: Score) -> str:
        """Text beside the pointer."""
        lines = [f"{row.label}, {score.method}: {score.text} %"]
        if interval := _interval(score):
            lines.append(interval.removeprefix(", "))
        if len(score.seeds) > 1:
            lines.append(f"seeds {', '.join(f'{value:.1f}' for value in score.seeds)} %")
        if self.chance is not None:
            lines.append(f"chance {self.chance:.1f} %")
        return "\n".join(lines)

    @property
    def alternative(self) -> str:
        """The chart in words."""
        rows = [
            f"{row.label} "
            + (row.note or ", ".join(f"{one.method} {one.text} %{_interval(one)}" for one in row.scores))
            for row in self.rows
        ]
        chance = "" if self.chance is None else f"; chance {self.chance:.1f} %"
        return f"{self.title} ({self.detail}): {'; '.join(rows)}{chance}."


def _interval(score: Score) -> str:
    """The interval of a score as the end of a phrase; "" for a score without one."""
    if score.low is None or score.high is None:
        return ""
    return f", 95 % interval {max(score.low, 0):.1f} to {min(score.high, 100):.1f} %"


def score_axis(scores: Iterable[Score]) -> Axis:
    """Axis in percent that shows scores, intervals and seeds as large as fits."""
    values = [v for one in scores for v in (one.value, one.low, one.high, *one.seeds) if v is not None]
    axis = padded_axis(min(values), max(values), padding=0.08)
    return Axis(max(axis.low, -2.0), min(axis.high, 102.0))


# --- SVG files ---

WIDTH, PANEL_HEIGHT = 940, 190
SCORE_MARKS = (
    "Means over seeds with 95 % intervals; small dots are seeds, hollow ones single seeds, grey ones baselines."
)
_LETTER = 5.9  # average width of a letter of 11 px


def svg_of_lines(rows: Sequence[Sequence[LineChart]]) -> str:
    """SVG file with rows of line charts above their common legend."""
    columns = max(map(len, rows))
    cell, top = WIDTH / columns, 46
    parts, row_height = [], PANEL_HEIGHT + 96
    for line, charts in enumerate(rows):
        for column, chart in enumerate(charts):
            parts.append(_panel(chart, column * cell + 44, line * row_height + top, cell - 62, PANEL_HEIGHT))
    legend = {one.label: one for charts in rows for chart in charts for one in chart.series}
    x, y = 14.0, len(rows) * row_height + 2.0
    for one in legend.values():
        size = 46 + _LETTER * len(one.label)
        if x > 14 and x + size > WIDTH:
            x, y = 14.0, y + 18
        dash = one.dash or ("5 4" if one.kind == "checks" else "")
        parts += [_path(f"M{x:g} {y - 4:g}h24", one.colour, 2, dash), _text(x + 31, y, one.label)]
        x += size
    return _file(y + 14, parts)


def _panel(chart: LineChart, left: float, top: float, width: float, height: float) -> str:
    """One line chart with its texts; `left`, `top`, `width` and `height` are those of the plot."""
    # dots at the sides stay whole
    name, inside = f"clip{left:g}-{top:g}", f"M{left - 4:g} {top - 3:g}h{width + 8:g}v{height + 6:g}h-{width + 8:g}z"
    better = f" · {chart.better} is better" if chart.better else ""
    parts = [
        _text(left, top - 24, chart.title, size=12, weight=600),
        _text(left, top - 9, chart.y_label + better, "var(--muted)"),
        f'<clipPath id="{name}"><path d="{inside}"/></clipPath>',
        f'<g clip-path="url(#{name})">{chart.plot(left, top, width, height)}</g>',
        _text(left + width, top + height + 31, chart.x_label, "var(--muted)", "end"),
    ]
    for tick in chart.y_ticks:
        parts.append(_text(left - 6, top + height * (1 - tick.at / 100) + 4, tick.text, "var(--muted)", "end"))
    for tick in chart.x_ticks:
        parts.append(_text(left + width * tick.at / 100, top + height + 16, tick.text, "var(--muted)", "middle"))
    if not chart.series:
        parts.append(_text(left + width / 2, top + height / 2, chart.empty, "var(--muted)", "middle"))
    return "".join(parts)


def svg_of_scores(rows: Sequence[tuple[str, Sequence[ScoreChart]]]) -> str:
    """SVG file with rows of score charts under headings; charts of a row share the labels of the first."""
    charts = [chart for _, line in rows for chart in line]
    labels = {row.label: textwrap.wrap(row.label, 34) or [""] for chart in charts for row in chart.rows}
    indent = 22 + _LETTER * max(len(line) for lines in labels.values() for line in lines)
    cell, top, parts = (WIDTH - indent) / max(len(line) for _, line in rows), 0.0, []
    for heading, line in rows:
        parts.append(_text(14, top + 22, heading, size=13, weight=600))
        tops = np.cumsum([top + 52, *(8 + 14 * len(labels[row.label]) for row in line[0].rows)])
        for column, chart in enumerate(line):
            left, width = indent + column * cell, cell - 22
            parts += [_text(left, top + 40, chart.title, weight=600)]
            for tick in chart.ticks:
                at = left + width * tick.at / 100
                parts.append(_path(f"M{at:.1f} {top + 48:.1f}V{tops[-1]:.1f}", "var(--grid)", 1))
                parts.append(_text(at, tops[-1] + 15, tick.text, "var(--muted)", "middle"))
            for row, start, end in zip(chart.rows, tops[:-1], tops[1:], strict=True):
                middle = (start + end) / 2
                if column == 0:
                    base = middle + 4 - 7 * (len(labels[row.label]) - 1)
                    parts += [
                        _text(indent - 12, base + 14 * i, text, anchor="end")
                        for i, text in enumerate(labels[row.label])
                    ]
                parts.append(_score_marks(chart, row, left, width, middle))
        parts.append(_text(WIDTH - 22, tops[-1] + 31, "score (%)", "var(--muted)", "end"))
        top = tops[-1] + 40
    parts.append(_text(14, top + 12, SCORE_MARKS, "var(--muted)"))
    return _file(top + 24, parts)


def _score_marks(chart: ScoreChart, row: ScoreRow, left: float, width: float, y: float) -> str:
    """Scores of one row as dots with intervals, and smaller dots below for the seeds."""
    if not row.scores:
        return _text(left + width / 2, y + 4, row.note, "var(--muted)", "middle")
    parts = []
    for one in row.scores:
        if one.low is not None and one.high is not None:
            low, high = (left + width * chart.at(end) / 100 for end in (one.low, one.high))
            parts.append(
                _path(
                    f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8", row.colour, 1.5
                )
            )
        if len(one.seeds) > 1:
            dots = "".join(f"M{left + width * chart.at(seed) / 100:.1f} {y + 7:.1f}h0" for seed in one.seeds)
            parts.append(_path(dots, row.colour, 3.5, opacity=0.75))
        parts.append(_path(f"M{left + width * chart.at(one.value) / 100:.1f} {y:.1f}h0", row.colour, 8))
        if len(one.seeds) == 1:  # a hollow dot: one seed has no interval
            parts.append(_path(f"M{left + width * chart.at(one.value) / 100:.1f} {y:.1f}h0", "var(--card)", 4.5))
    return "".join(parts)


def _text(
    x: float, y: float, text: str, colour: str = "var(--ink)", anchor: str = "start", size: int = 11, weight: int = 400
) -> str:
    style = f"fill:{colour};font-size:{size}px;font-weight:{weight};text-anchor:{anchor}"
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{html.escape(text)}</text>'


def _file(height: float, parts: Sequence[str]) -> str:
    """A whole SVG file in the light colours, which every program can read: CSS variables are replaced by values."""
    fonts = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
    body = re.sub(r"var\((--\w+)\)", lambda found: light_colours()[found[1]], "".join(parts))
    size = f'width="{WIDTH}" height="{math.ceil(height)}" viewBox="0 0 {WIDTH} {math.ceil(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{fonts}">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>\n'
    )


@functools.cache
def light_colours() -> dict[str, str]:
    """CSS variables of light pages: {"--s0": "#0067a5", ...}."""
    first_rule = STYLE_SHEET.read_text(encoding="utf-8").partition("}")[0]
    return dict(re.findall(r"(--[\w-]+):\s*(#\w+)", first_rule))
