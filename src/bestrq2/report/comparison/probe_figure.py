"""The figure of probe scores: a row of panels a method, a panel a domain, an arm a line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bestrq2.report.comparison.contents import ProbeRow
from bestrq2.report.comparison.results import SUPERVISED, SUPERVISED_ROW

TITLES = {"linear": "Linear probe", "knn": "k-NN"}
SANITY = {
    "chance": ("#9b9a96", (0, (1, 1.6))),
    "log-mel statistics": ("#5b5e66", (0, (4, 2))),
    "random encoder": ("#1c1e26", (0, (4, 1.5, 1, 1.5))),
    SUPERVISED: ("#1c1e26", (0, (8, 2))),
}
NAMES = {SUPERVISED: SUPERVISED_ROW}
QUIET: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "color": "#77767a",
    "fontsize": 7.5,
    "bbox": {"fc": "white", "ec": "none", "pad": 1},
}
# The name of the method stands above the labels and needs its room too.
LABEL_INCH, LONGEST_LABEL, LEAST_LEFT = 0.068, 30, 1.35


def draw_probes(
    probes: Mapping[str, Sequence[ProbeRow]], styles: Mapping[str, tuple[str, Any, str]], width: float
) -> Any:
    """One panel for every method and domain: arms with intervals over seeds, single seeds as dots, sanity lines.

    Args:
        probes: method → rows.
        styles: label of an arm → colour, stroke and mark.
        width: of the figure in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(styles)
    rows = next(iter(probes.values()))
    domains = list(next(row.scores for row in rows if row.scores))
    texts = ["\n".join(textwrap.wrap(label, LONGEST_LABEL)) for label in labels]
    line = 0.11 + 0.14 * max(1 + text.count("\n") for text in texts)
    panel, top, between, bottom = 0.34 + line * len(labels), 0.32, 0.62, 0.86
    height = top + len(probes) * panel + (len(probes) - 1) * between + bottom
    left = max(LEAST_LEFT, 0.25 + LABEL_INCH * max(len(line) for text in texts for line in text.splitlines()))
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(probes), len(domains), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.12 / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.1,
        hspace=between / panel,
    )
    for row, (method, of_method) in zip(axes, probes.items(), strict=True):
        for one, domain in zip(row, domains, strict=True):
            _panel(one, of_method, domain, styles)
            one.set_yticks(range(len(labels)), texts if one is row[0] else [""] * len(labels))
            title = "mean of domains" if domain == "mean" else domain or "other"
            one.set_title(title, loc="left", fontsize=8.5, fontweight="normal")
        row[0].annotate(
            TITLES[method],
            (0.1 / width, 1),
            xycoords=("figure fraction", "axes fraction"),
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=9.5,
            fontweight="bold",
        )
    for one in axes[-1]:
        one.set_xlabel("score (%)")
    _legend(figure, rows)
    return figure


def _panel(axes: Any, rows: Sequence[ProbeRow], domain: str, styles: Mapping[str, tuple[str, Any, str]]) -> None:
    labels = list(styles)
    randoms = [row for row in rows if row.kind == "random encoder" and row.scores]
    for row in rows:
        if not row.scores:
            if row.kind == "arm":
                axes.text(0.5, labels.index(row.label), "not probed", transform=axes.get_yaxis_transform(), **QUIET)
            continue
        value = 100 * row.scores[domain].mean
        if row.kind == "arm":
            _arm(axes, labels.index(row.label), row, domain, styles[row.label])
            continue
        colour, stroke = SANITY[row.kind]
        if row.kind == "random encoder" and len(randoms) > 1:
            # Every architecture has its own: a line across the arms it belongs to.
            for place in (labels.index(label) for label in row.arms):
                axes.plot([value] * 2, [place - 0.5, place + 0.5], color=colour, linestyle=stroke, linewidth=1.2)
        else:
            axes.axvline(value, color=colour, linestyle=stroke, linewidth=1.2, zorder=1)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0.0), min(high, 100.0))
    axes.locator_params(axis="x", nbins=5)


def _arm(axes: Any, place: int, row: ProbeRow, domain: str, style: tuple[str, Any, str]) -> None:
    score, (colour, _, mark) = row.scores[domain], style
    seeds = [100 * value for value in score.values]
    # Seeds lie a little below their mean, so that neither hides the other.
    if len(seeds) > 1:
        axes.plot(seeds, [place + 0.2] * len(seeds), "o", color=colour, markersize=2.6, alpha=0.75, markeredgewidth=0)
    half = None if score.half_width is None else 100 * score.half_width
    face = colour if half is not None else "white"
    looks = {
        "fmt": mark,
        "color": colour,
        "markerfacecolor": face,
        "markersize": 4.5,
        "capsize": 2.5,
        "elinewidth": 1.5,
    }
    axes.errorbar(100 * score.mean, place, xerr=half, zorder=3, **looks)


def _legend(figure: Any, rows: Sequence[ProbeRow]) -> None:
    from matplotlib.lines import Line2D

    kinds = [kind for kind in SANITY if any(row.kind == kind and row.scores for row in rows)]
    handles = [Line2D([], [], color=SANITY[kind][0], linestyle=SANITY[kind][1], linewidth=1.3) for kind in kinds]
    names = [NAMES.get(kind, kind) for kind in kinds]
    counts = [len(row.scores["mean"].values) for row in rows if row.kind == "arm" and row.scores]
    looks: dict[str, Any] = {"color": "#5b5e66", "marker": "o"}
    if max(counts) > 1:
        handles.append(Line2D([], [], markersize=5, linewidth=1.5, **looks))
        handles.append(Line2D([], [], markersize=2.6, linewidth=0, **looks))
        names += ["mean, 95 % interval", "its seeds"]
    if min(counts) == 1:
        handles.append(Line2D([], [], markersize=5, linewidth=0, markerfacecolor="white", **looks))
        names.append("one seed only")
    figure.legend(handles, names, loc="lower center", ncols=min(7, len(names)), fontsize=7.4, handlelength=2.4)
