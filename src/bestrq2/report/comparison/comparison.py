"""Comparison of runs: from folders to tables, sentences, figures and a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.table import Table, parts_html, parts_text
from bestrq2.files import disk_errors, write_text
from bestrq2.report.charts import SCORE_MARKS, series_style
from bestrq2.report.comparison import sentences, tables
from bestrq2.report.comparison.arms import Arm, Difference, final_values, group
from bestrq2.report.comparison.figures import code_charts, comparison_figures, loss_charts, probe_charts
from bestrq2.report.comparison.probes import (
    NOT_PROBED,
    Pair,
    ProbeRow,
    disagreeing_baselines,
    pairs,
    probe_rows,
)
from bestrq2.report.page import render_page
from bestrq2.report.runs import BENCHMARK, read_run, reference_runs
from bestrq2.text import counted

TABLE, NUMBERS, PAGE = "table.md", "comparison.json", "comparison.html"
FIGURES = ("probes", "loss", "codes")


@dataclass(frozen=True)
class Comparison:
    """Result of `bestrq2 compare`.

    Attributes:
        arms: arms in the order of the runs; the first is the baseline.
        probes: method → rows: the arms, then the baselines; empty where no run was probed.
        pairs: differences between every two arms of at least two probed seeds each.
        tables: tables as printed.
        settings: settings that differ between arms, for table.md and the page; None where none does.
        sentences: differences of scores, limits of the comparison, health of the runs.
        output: folder of table.md, comparison.json, comparison.html and the figures.
    """

    arms: list[Arm]
    probes: dict[str, list[ProbeRow]]
    pairs: list[Pair]
    tables: list[Table]
    settings: Table | None
    sentences: list[str]
    output: Path

    @property
    def text(self) -> str:
        """Tables and sentences for a terminal."""
        return parts_text([*self.tables, "\n".join(self.sentences)])

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return parts_html([*self.tables, *self.sentences])

    @property
    def markdown(self) -> str:
        """Tables, sentences and figures as one Markdown page."""
        listed = "\n".join(f"- {sentence}" for sentence in self.sentences)
        figures = "\n".join(f"![{name}]({name}.svg)" for name in FIGURES if name != "probes" or self.probes)
        tables = [f"## {heading}\n\n{table.markdown()}" for heading, table in self.headed_tables.items()]
        return "\n\n".join(["# Comparison", "## In words", listed, *tables, figures]) + "\n"

    @property
    def headed_tables(self) -> dict[str, Table]:
        """Tables of the pages by heading: those printed, then the settings that differ."""
        every = [*self.tables, *([self.settings] if self.settings else [])]
        # names such as k-NN have no capital
        titles = [one.title if one.title.startswith("k-NN") else one.title[:1].upper() + one.title[1:] for one in every]
        return {title: replace(one, title="") for title, one in zip(titles, every, strict=True)}

    def html(self) -> str:
        """The comparison as one page with the values under the pointer."""
        count = sum(len(arm.runs) for arm in self.arms)
        return render_page(
            "comparison.html.jinja",
            title=f"Comparison of {counted(count, 'run')}",
            lead=f"{counted(count, 'training run')} in {counted(len(self.arms), 'arm')}. The runs of an arm have the "
            "same settings and differ in their seed only, so what lies between them is chance; what lies between arms "
            "counts where it is larger than that.",
            arms=self.arms,
            styles=[series_style(place) for place in range(len(self.arms))],
            sentences=self.sentences,
            probes=probe_charts(self.probes, self.arms),
            score_marks=SCORE_MARKS,
            losses=loss_charts(self.arms),
            codes=code_charts(self.arms),
            tables=self.headed_tables,
        )

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything that the tables show, unrounded, as plain JSON types; shares in 0..1."""
        return {
            "format": 1,
            "baseline": self.arms[0].label,
            "arms": [_arm_numbers(arm) for arm in self.arms],
            "probes": {method: [_row_numbers(row) for row in rows] for method, rows in self.probes.items()},
            "pairs": [_pair_numbers(pair) for pair in self.pairs],
            "sentences": self.sentences,
        }

    def json(self) -> str:
        """`numbers` as JSON text."""
        return json.dumps(self.numbers, indent=1, allow_nan=False) + "\n"


def compare_runs(
    runs: Sequence[str | os.PathLike[str]],
    output: Path = Path("compare"),
    reference: bool = False,
    unfinished: bool = False,
) -> Comparison:
    """Compare runs over their seeds, as tables, figures and a page; see `bestrq2.compare` for the arguments.

    Raises:
        ConfigError: the output cannot be written.
        DataError: a run cannot be compared; the message names it and says what to do.
    """
    output = Path(output)
    with disk_errors(output):
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output}: is a file; name a folder with --output")
    folders = [Path(run) for run in runs if not _is_earlier_output(Path(run), output)]
    if not folders:
        raise DataError("there is no run to compare; name one or more run folders")
    read = [read_run(folder, unfinished) for folder in folders]
    arms = group([*read, *(reference_runs() if reference else [])])
    comparison = assemble(arms, output, health_check=reference)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / TABLE, comparison.markdown)
        write_text(output / NUMBERS, comparison.json())
        write_text(output / PAGE, comparison.html())
        figures = comparison_figures(arms, comparison.probes)
        for name in FIGURES:
            (output / f"{name}.png").unlink(missing_ok=True)  # of an earlier version
            if name in figures:
                write_text(output / f"{name}.svg", figures[name])
            else:
                (output / f"{name}.svg").unlink(missing_ok=True)
    return comparison


def assemble(arms: list[Arm], output: Path, health_check: bool = False) -> Comparison:
    """Tables and sentences about arms; nothing is written.

    Raises:
        DataError: the arms were probed in different ways.
    """
    rows = probe_rows(arms)
    found = pairs(arms, rows)
    shown = [
        *(tables.probe_table(method, of_method, arms) for method, of_method in rows.items()),
        *tables.difference_tables(arms, found),
        *tables.own_probe_tables(arms),
        *tables.xares_tables(arms),
        tables.cost_table(arms),
        tables.final_table(arms),
    ]
    remedy = NOT_PROBED.partition(": ")[2]
    listed = [
        *sentences.pair_sentences(arms, found, rows),
        *sentences.spread_sentences(rows),
        *([] if rows else [f"No run was probed on {BENCHMARK}, so its tables are missing: {remedy}."]),
        *sentences.notes(arms),
        *disagreeing_baselines(arms),
        *(sentences.health(arms) if health_check else []),
        "± is half of the 95 % interval: of probe scores over test clips and seeds, of other "
        "values over seeds (Student's t); operations are for clips of full length.",
    ]
    return Comparison(arms, rows, found, shown, tables.settings_table(arms), listed, output)


def _is_earlier_output(folder: Path, output: Path) -> bool:
    """Whether a folder is the output of an earlier comparison, as `runs/*` names it."""
    return (
        folder.resolve() == output.resolve() and (folder / NUMBERS).is_file() and not (folder / "config.yaml").exists()
    )


def _arm_numbers(arm: Arm) -> dict[str, Any]:
    metrics = sorted({name for run in arm.runs for name in run.curves if name.startswith(("train/", "validation/"))})
    final = {name: final_values(arm, name) for name in metrics}
    return {
        "label": arm.label,
        "reference": arm.first.reference,
        "runs": [
            {"folder": str(run.folder), "seed": run.seed, "steps": run.steps, "seconds": run.seconds()}
            for run in arm.runs
        ],
        "steps": arm.first.steps,
        "max_steps": arm.first.max_steps,
        "encoder_parameters": arm.cost.encoder_parameters,
        "training_gflops_per_clip": arm.cost.training_gflops,
        "training_gflops": arm.gflops(arm.first.steps),
        "xares": tables.xares_numbers(arm),
        "final": {name: asdict(value) for name, value in final.items() if value is not None},
        # JSON has no infinity
        "settings": {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in arm.settings.items()
        },
    }


def _row_numbers(row: ProbeRow) -> dict[str, Any]:
    numbers = asdict(row)
    return numbers if row.missing else {name: value for name, value in numbers.items() if name != "missing"}


def _pair_numbers(pair: Pair) -> dict[str, Any]:
    def numbers(one: Difference) -> dict[str, Any]:
        return {**asdict(one), "clear": one.clear}

    named = {"method": pair.method, "arm": pair.arm, "baseline": pair.baseline}
    return {
        **named, **numbers(pair.difference), "domains": {name: numbers(one) for name, one in pair.domains.items()}
    }  # fmt: skip
