"""Comparing runs: from folders to tables, sentences and figures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bestrq2.errors import ConfigError, DataError
from bestrq2.files import disk_errors, write_text
from bestrq2.report.comparison import figures, probes, training
from bestrq2.report.comparison.arms import Arm, group
from bestrq2.report.comparison.contents import Comparison, Pair, ProbeRow
from bestrq2.report.comparison.notes import notes, settings_table
from bestrq2.report.comparison.references import health, reference_runs
from bestrq2.report.comparison.runs import read_run
from bestrq2.report.comparison.statistics import Estimate
from bestrq2.report.comparison.xares import xares_numbers, xares_tables

TABLE, NUMBERS = "table.md", "comparison.json"


def compare(
    runs: Sequence[str | os.PathLike[str]],
    output: Path = Path("compare"),
    reference: bool = False,
    unfinished: bool = False,
) -> Comparison:
    """Compare runs: probes, cost and losses with 95 % intervals over seeds, as tables and figures.

    Runs that differ in nothing but their seed form an arm; the arm of the first run is the baseline.

    Args:
        runs: run folders.
        output: folder for table.md, comparison.json and the figures; files of an earlier comparison are replaced.
        reference: put the reference runs that come with the package beside them, and check the runs' health by them.
        unfinished: compare runs that have not done all their steps too, marked as such.

    Raises:
        ConfigError: the output cannot be written.
        DataError: with one sentence that names the run that cannot be compared and says what to do.
    """
    output = Path(output)
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
        write_text(output / TABLE, comparison.markdown + figures.markdown(comparison))
        write_text(output / NUMBERS, comparison.json())
        figures.write(comparison)
    return comparison


def _is_earlier_output(folder: Path, output: Path) -> bool:
    """Whether `runs/*` has named the folder of an earlier comparison, which is to be written again."""
    return (
        folder.resolve() == output.resolve() and (folder / NUMBERS).is_file() and not (folder / "config.yaml").exists()
    )


def assemble(arms: list[Arm], output: Path, health_check: bool = False) -> Comparison:
    """What there is to say about arms; nothing is written.

    Raises:
        DataError: the arms were probed in different ways.
    """
    rows = probes.probe_rows(arms)
    pairs = probes.pairs(arms, rows)
    tables = [probes.probe_table(method, of_method, arms) for method, of_method in rows.items()]
    tables += [
        *probes.difference_tables(arms, pairs),
        *xares_tables(arms),
        training.cost_table(arms),
        training.final_table(arms),
    ]
    sentences = [
        *probes.pair_sentences(arms, pairs, rows),
        *probes.spread_sentences(rows),
        *(
            []
            if rows
            else [f"No run was probed, so there are no probe tables: {probes.NOT_PROBED.partition(': ')[2]}."]
        ),
        *notes(arms),
        *probes.disagreeing_baselines(arms),
        *(health(arms) if health_check else []),
        "± is half of the 95 % interval over seeds (Student's t); operations are of clips of full length.",
    ]
    numbers = _numbers(arms, rows, pairs, sentences)
    return Comparison(arms, rows, pairs, tables, settings_table(arms), sentences, numbers, output)


def _numbers(
    arms: Sequence[Arm], rows: dict[str, list[ProbeRow]], pairs: Sequence[Pair], sentences: Sequence[str]
) -> dict[str, Any]:
    """All that the tables show, unrounded; shares in 0..1."""
    return {
        "format": 1,
        "baseline": arms[0].label,
        "arms": [_arm_numbers(arm) for arm in arms],
        "probes": {
            method: [
                {
                    "label": row.label,
                    "kind": row.kind,
                    **({"missing": row.missing} if row.missing else {}),
                    "scores": {domain: _estimate(score) for domain, score in row.scores.items()},
                }
                for row in of_method
            ]
            for method, of_method in rows.items()
        },
        "pairs": [
            {
                "method": pair.method,
                "arm": pair.ahead,
                "baseline": pair.baseline,
                "difference": pair.difference.difference,
                "half_width": pair.difference.half_width,
                "clear": pair.difference.clear,
                "domains": {
                    domain: {"difference": apart.difference, "half_width": apart.half_width, "clear": apart.clear}
                    for domain, apart in pair.domains.items()
                },
            }
            for pair in pairs
        ],
        "sentences": list(sentences),
    }


def _arm_numbers(arm: Arm) -> dict[str, Any]:
    metrics = sorted({name for run in arm.runs for name in run.curves if name.startswith(("train/", "validation/"))})
    final = {name: training.final_values(arm, name) for name in metrics}
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
        "xares": xares_numbers(arm),
        "final": {name: _estimate(value) for name, value in final.items() if value is not None},
        "settings": {name: _plain(value) for name, value in arm.settings.items()},
    }


def _plain(value: Any) -> Any:
    """A setting as JSON has it: infinity is text there."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(value: Estimate) -> dict[str, Any]:
    return {"mean": value.mean, "half_width": value.half_width, "values": list(value.values)}
