"""Self-contained HTML pages: the report of a run, of X-ARES results, or of anything gathered in `ReportContents`."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bestrq2._version import __version__
from bestrq2.convert.weights import load_model_folder
from bestrq2.errors import DataError
from bestrq2.evaluate.result import Result, TaskScore
from bestrq2.evaluate.xares.results import read_xares_result
from bestrq2.evaluate.xares.run import result_files
from bestrq2.files import disk_errors, write_text
from bestrq2.inference.embedder import Embedder
from bestrq2.inference.info import model_info
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.report import embeddings
from bestrq2.report.charts import domain_colours
from bestrq2.report.curves import FURTHER, RunCurves, curve_charts, run_colours, run_labels, runs_table
from bestrq2.report.embeddings import EmbeddedClip, embedded_recordings, map_figure, map_sounds, neighbour_figure
from bestrq2.report.patches import MaskExample, level_gradient, mask_example, mask_figure
from bestrq2.report.recordings import Recordings
from bestrq2.report.runs import at_step, find_probes, find_xares, read_curves
from bestrq2.report.scores import probe_section, short_task, xares_section
from bestrq2.report.sounds import OUTLINE_POINTS, cut_seconds
from bestrq2.run_records import newest_step
from bestrq2.text import counted

FOLDER = Path(__file__).parent
EXAMPLES = 3


@dataclass(frozen=True)
class ReportContents:
    """Contents of a report; a section without data is left out.

    Attributes:
        title: heading of the page.
        lead: one paragraph: what was trained on what.
        facts: name → value, shown beside the lead.
        runs: curves of every run, drawn over each other.
        examples: clips with hidden patches.
        probes: scores; domains, tasks and features are shown in the order of their first appearance.
        xares: result of X-ARES; a model called by a run's name or label shares its colour.
        clips: embedded clips for the map and the neighbours, all from the same encoder.
        grouped_by: what the domains of the clips are, such as "folder".
        notes: paragraphs at the end of the page, for instance how the figures were made.
    """

    title: str
    lead: str
    facts: dict[str, str] = field(default_factory=dict)
    runs: list[RunCurves] = field(default_factory=list)
    examples: list[MaskExample] = field(default_factory=list)
    probes: list[TaskScore] = field(default_factory=list)
    xares: Result | None = None
    clips: list[EmbeddedClip] = field(default_factory=list)
    grouped_by: str = "domain"
    notes: list[str] = field(default_factory=list)


def write_run_report(run: Path, recordings: Recordings) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: folder with `model/`, `metrics.csv` and `config.yaml`.
        recordings: recordings to show.

    Returns:
        Path of the report.

    Raises:
        BestRQ2Error: the run folder is not complete.
    """
    model = load_model_folder(run / "model", BestRQ2ForPreTraining)
    facts = model_info(run)
    xares, unread = None, []
    curves, probes = read_curves(run), list[TaskScore]()
    try:
        xares, probes = find_xares(run), _own_scores(run)
    except DataError as error:  # a damaged result must not cost the report
        unread = [f"{error}."]
    contents = ReportContents(
        title=f"Audio encoder trained on {corpus_name(facts['data'])}",
        lead=_lead(facts),
        facts={"run": run.resolve().name, **{name: text for name, text in facts.items() if name != "model"}},
        runs=[replace(curves, facts={name: text for name, text in curves.facts.items() if name not in facts})],
        examples=[
            mask_example(model, recordings.waveforms[place] / np.float32(32768), recordings.names[place], seed=place)
            for place in _examples(recordings)
        ],
        probes=probes,
        xares=xares,
        clips=embedded_recordings(Embedder(model.bestrq2), recordings),
        grouped_by=recordings.grouped_by,
        notes=[*run_warnings(run / "warnings.txt"), *unread, _origin(recordings, model.config.max_seconds)],
    )
    write_report(run / "report.html", contents)
    return run / "report.html"


def _own_scores(run: Path) -> list[TaskScore]:
    """Scores on labels of one's own that are of the step which the run is at."""
    step = newest_step(run / "metrics.csv")
    return [score for one in at_step(find_probes(run), step) for score in one.scores]


def corpus_name(data: str) -> str:
    """Short name of a --data argument: the last part of a path, everything else as it is."""
    return data if ":" in data else Path(data).name or data


def _examples(recordings: Recordings) -> list[int]:
    """Long recordings of different groups, as far as there are any."""
    longest_first = sorted(range(len(recordings.names)), key=lambda place: -len(recordings.waveforms[place]))
    of_groups = {recordings.groups[place]: place for place in reversed(longest_first)}
    return list(dict.fromkeys([*reversed(of_groups.values()), *longest_first]))[:EXAMPLES]


def _lead(facts: Mapping[str, str]) -> str:
    """What the model is and how it learns, for readers who know nothing of the method."""
    corpus = corpus_name(facts["data"]) + (f" ({facts['corpus']})" if "corpus" in facts else "")
    return (
        f"This model ({facts['recipe']}, {facts['encoder parameters']} parameters) learnt from {corpus} without "
        "labels, by filling gaps: a part of each recording is hidden, and it predicts that part from the rest. It "
        "turns a recording into a list of numbers, its embedding; recordings that the model takes to be alike have "
        "similar embeddings. This page shows how well it learnt to fill the gaps, and a map of recordings to hear."
    )


def _origin(recordings: Recordings, seconds: float) -> str:
    """How the figures of a run were made."""
    held_out = f"{recordings.held_out} of them held out of training, " if recordings.held_out else ""
    return (
        f"{counted(len(recordings.names), 'recording')} are shown, {held_out}each by up to {seconds:g} s at a place "
        "that the seed draws. Made by: bestrq2 pretrain"
    )


def write_xares_pages(model: str | os.PathLike[str], output: Path | None) -> list[Path]:
    """Write a page beside each JSON file of `bestrq2 xares`: averages and tasks beside the published rows.

    Args:
        model: the model that was scored; a run folder holds its result.
        output: JSON file given by --output; None for none.

    Returns:
        Paths of the pages.

    Raises:
        BestRQ2Error: a file cannot be written, or a JSON file is damaged.
    """
    lead = "Scores of frozen embeddings on the tasks of the X-ARES benchmark, beside those published for other models."
    pages = []
    for file in result_files(model, output):
        result = read_xares_result(file)
        pages.append(file.with_suffix(".html"))
        with disk_errors(file):
            write_report(pages[-1], ReportContents(f"X-ARES: {result.model}", lead, xares=result))
    return pages


def write_report(output: Path, contents: ReportContents) -> None:
    """Write a report as one HTML file, atomically; missing folders are made.

    Raises:
        OSError: the file cannot be written; an earlier one is then unchanged.
    """
    output = Path(output)
    page = render(contents)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)


def render(contents: ReportContents) -> str:
    """HTML of a report; clips whose embedding holds NaN are left out."""
    charts = curve_charts(contents.runs)
    further = charts.pop(FURTHER, [])
    clips = [clip for clip in contents.clips if np.isfinite(clip.vector).all()]
    on_map, neighbours = map_figure(clips), neighbour_figure(clips)
    probes = probe_section(contents.probes, contents.runs)
    labels, colours = run_labels(contents.runs), run_colours(contents.runs)
    return render_page(
        "report.html.jinja",
        title=contents.title,
        lead=contents.lead,
        facts=contents.facts,
        run_rows=runs_table(contents.runs),
        run_legend={labels[run.name]: colours[run.name] for run in contents.runs},
        validated=any(column.startswith("validation/") for run in contents.runs for column in run.curves),
        charts=charts,
        further=further,
        examples=[mask_figure(example) for example in contents.examples],
        level_gradient=level_gradient(),
        scores=[one for one in (probes, xares_section(contents.xares, contents.runs)) if one],
        map=on_map,
        map_width=embeddings.MAP_WIDTH,
        sounds=map_sounds(clips, on_map, neighbours),
        cut_seconds=cut_seconds(len(clips)),
        neighbours=neighbours,
        grouped_by=contents.grouped_by,
        outline_width=OUTLINE_POINTS,
        domain_colours=domain_colours(
            [*(one.domain for one in contents.probes), *(clip.domain for clip in contents.clips)]
        ),
        notes=contents.notes,
        short=short_task,
    )


def refresh_scores(run: Path) -> None:
    """Draw the scores in the report of a run again, such as after a probe; other pages stay as they are.

    Args:
        run: run folder.

    Raises:
        DataError: a result in the run folder cannot be read.
    """
    report = run / "report.html"
    page = report.read_text(encoding="utf-8") if report.is_file() else ""
    if not all(f"<!-- end of {name} -->" in page for name in ("scores", "links to scores")):
        return
    curves = [read_curves(run)]
    scores = _own_scores(run)
    sections = [one for one in (probe_section(scores, curves), xares_section(find_xares(run), curves)) if one]
    links = "".join(f'<a href="#{section.name}">{section.title}</a>' for section in sections)
    drawn = _templates().get_template("scores.html.jinja").render(scores=sections, domain_colours={})
    for name, new in {"scores": drawn, "links to scores": links}.items():
        before, start, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        page = f"{before}{start}{new}{end}{after}"
    write_text(report, page)


def render_page(template: str, **values: Any) -> str:
    """HTML of a page from a template of this folder, with style sheet and script inside."""
    style, script = (Markup((FOLDER / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    page = _templates().get_template(template).render(version=__version__, css=style, javascript=script, **values)
    return page.lstrip()


@functools.cache
def _templates() -> Environment:
    """Templates of this folder; they are kept because compiling them takes longer than filling them."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def run_warnings(path: Path) -> list[str]:
    """Warnings of a run, one line each."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [f"Warning at {line}" for line in lines]
