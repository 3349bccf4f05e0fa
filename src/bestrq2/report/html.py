"""Writes the report: one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bestrq2._version import __version__
from bestrq2.files import write_text
from bestrq2.report import embedding_map, neighbours
from bestrq2.report.colours import domain_colours, feature_colours, run_colours, run_labels, short_task
from bestrq2.report.contents import ReportContents
from bestrq2.report.curves import curve_groups, runs_table
from bestrq2.report.embedding_map import MapFigure, map_figure
from bestrq2.report.neighbours import neighbour_figure
from bestrq2.report.probes import probe_cards, probe_table
from bestrq2.report.spectrogram import colour_bar, mask_figure
from bestrq2.report.xares import xares_section

FOLDER = Path(__file__).parent


def write_report(output: Path, contents: ReportContents) -> None:
    """Write `contents` as one self-contained HTML page to `output`, whole or not at all.

    The page is written under a temporary name in the same folder, synced, then renamed over `output`; missing
    folders are made.

    Raises:
        OSError: the file cannot be written; what was at `output` before is then still there.
    """
    output = Path(output)
    page = render(contents)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)


def render(contents: ReportContents) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.jinja").render(_drawn(contents)).lstrip()


def _drawn(contents: ReportContents) -> dict[str, object]:
    """Everything the template draws; parts without data are empty or None, clips that hold NaN are passed over."""
    groups, further_figures = curve_groups(contents.runs)
    domains = domain_colours([one.domain for one in contents.probes] + [clip.domain for clip in contents.clips])
    means, tasks = probe_cards(contents.probes, contents.runs, domains)
    clips = [clip for clip in contents.clips if np.isfinite(clip.vector).all()]
    on_map = map_figure(clips)
    colours, labels = run_colours(contents.runs), run_labels(contents.runs)
    return {
        "contents": contents,
        "version": __version__,
        "css": _inline("report.css"),
        "javascript": _inline("report.js"),
        "run_rows": runs_table(contents.runs),
        "run_legend": [(labels[run.name], colours[run.name]) for run in contents.runs],
        "validated": any(column.startswith("validation/") for run in contents.runs for column in run.curves),
        "short": short_task,
        "curve_groups": groups,
        "further_figures": further_figures,
        "examples": [mask_figure(example) for example in contents.examples],
        "colour_bar": colour_bar() if contents.examples else "",
        "probe_legend": feature_colours(contents.probes, contents.runs),
        "probe_means": means,
        "probe_domains": tasks,
        "probe_rows": probe_table(contents.probes),
        "xares": xares_section(contents.xares, contents.runs),
        "map": on_map,
        "map_data": _map_data(on_map),
        "map_box": (embedding_map.WIDTH, embedding_map.HEIGHT),
        "neighbours": neighbour_figure(clips),
        "outline_width": neighbours.OUTLINE_POINTS,
        "domain_colours": domains,
    }


def _map_data(figure: MapFigure | None) -> list[dict[str, object]]:
    return [] if figure is None else [asdict(point) for point in figure.points]


def _inline(name: str) -> Markup:
    """A style sheet or script of this folder, trusted as it is."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))
