"""The reference runs that ship with the package, and the health of a run measured by them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from bestrq2.errors import DataError
from bestrq2.report.comparison.arms import Arm, differing
from bestrq2.report.comparison.runs import Run, read_run
from bestrq2.report.comparison.training import at
from bestrq2.report.scales import Unit, number_text

# Quantity → the smallest distance from the reference's mean that ever counts as outside.
QUANTITIES = {"train/excess_loss": 0.05, "train/code_perplexity": 1.0, "train/accuracy": 0.01}
SPREADS, SHARE = 3.0, 0.2
MOST_NAMED = 6


def reference_folder() -> Path:
    """Where the reference runs lie: NAME/seed-N/."""
    return Path(str(resources.files("bestrq2") / "references"))


def reference_runs() -> list[Run]:
    """All reference runs.

    Raises:
        DataError: none ship with this version.
    """
    folders = sorted(path.parent for path in reference_folder().glob("*/seed-*/config.yaml"))
    if not folders:
        raise DataError("no reference runs come with this version of bestrq2; leave out --reference")
    return [read_run(folder, reference=folder.parent.name) for folder in folders]


def health(arms: Sequence[Arm]) -> list[str]:
    """A sentence a quantity on every run that has a reference of its recipe, and one on every run that has none."""
    references = [arm for arm in arms if arm.first.reference]
    sentences = []
    for arm in arms:
        if arm.first.reference:
            continue
        alike = [one for one in references if one.first.recipe == arm.first.recipe]
        if not alike:
            names = ", ".join(sorted({one.first.recipe for one in references}))
            sentences.append(
                f"{arm.label}: no health check, for no reference is of the recipe {arm.first.recipe} ({names} only)."
            )
            continue
        # Of several references of one recipe, that with the fewest other settings.
        reference = min(alike, key=lambda one: len(differing([arm.settings, one.settings])))
        changed = differing([arm.settings, reference.settings])
        if changed:
            sentences.append(
                f"{arm.label}: its settings are not the reference's, so expect differences: {_list(changed)}."
            )
        for run in arm.runs:
            sentences += [_sentence(run, reference, metric, floor) for metric, floor in QUANTITIES.items()]
    return sentences


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _sentence(run: Run, reference: Arm, metric: str, floor: float) -> str:
    """One quantity of a run, at its last step, against the reference at the same share of its own steps."""
    name = metric.partition("/")[2].replace("_", " ")
    curves = [one.curves[metric] for one in reference.runs if metric in one.curves]
    if metric not in run.curves or not curves:
        return f"{run.folder}: {name} was not logged, so it cannot be checked."
    share = min(1.0, run.steps / run.max_steps)
    values = np.array([at(curve, np.array([share * reference.first.max_steps]))[0] for curve in curves])
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    margin = max(SPREADS * spread, SHARE * abs(mean), floor)
    value = float(run.curves[metric][1][-1])
    unit: Unit = "percent" if metric == "train/accuracy" else "number"
    where = "inside" if abs(value - mean) <= margin else "OUTSIDE"
    low, high = number_text(mean - margin, unit), number_text(mean + margin, unit)
    return (
        f"{run.folder}: {name} is {number_text(value, unit)} at {100 * share:.0f} % of its steps, {where} of the "
        f"reference's range ({low} to {high})."
    )
