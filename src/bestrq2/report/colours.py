"""Which colour and which name belong to what, the same in every section.

The colours themselves are CSS variables (report.css), one set for light and one for dark pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

from bestrq2.evaluate.result import TaskScore
from bestrq2.report.contents import RunCurves

Name = TypeVar("Name", bound=Hashable)

SERIES_COLOURS = 8
BASELINE_COLOURS = 2
DOMAIN_COLOURS = 6
PUBLISHED_FAMILY, PUBLISHED = "var(--b0)", "var(--b1)"


def unique(names: Iterable[Name]) -> list[Name]:
    """The distinct names in order of first appearance."""
    return list(dict.fromkeys(names))


def short_task(task: str, domain: str) -> str:
    """Name of a task under its domain's heading: "instrument" for "music/instrument"."""
    return task.removeprefix(f"{domain}/")


def run_colours(runs: list[RunCurves]) -> dict[str, str]:
    """Run name → CSS colour."""
    return {run.name: f"var(--s{index % SERIES_COLOURS})" for index, run in enumerate(runs)}


def run_labels(runs: list[RunCurves]) -> dict[str, str]:
    """Run name → label; runs that share a label, as of one recipe, go by their names."""
    labels = [run.label for run in runs]
    return {run.name: run.label if labels.count(run.label) == 1 else run.name for run in runs}


def feature_colours(probes: list[TaskScore], runs: list[RunCurves]) -> dict[str, str]:
    """Probed features → CSS colour: a run's own where name or label match, else greys, then unused colours."""
    features = unique(probe.features for probe in probes)
    baselines = [f"var(--b{index})" for index in range(BASELINE_COLOURS)] if runs else []
    return _colours(features, runs, baselines)


def result_colours(models: Iterable[str], runs: list[RunCurves]) -> dict[str, str]:
    """Models of a benchmark → CSS colour: a run's own where name or label match, else unused colours."""
    return _colours(unique(models), runs, [])


def _colours(names: list[str], runs: list[RunCurves], first: list[str]) -> dict[str, str]:
    of_runs = run_colours(runs)
    known = {key.strip().casefold(): of_runs[run.name] for run in reversed(runs) for key in (run.label, run.name)}
    spare = [f"var(--s{index % SERIES_COLOURS})" for index in range(len(runs), len(runs) + len(names))]
    free = iter(first + spare)
    return {name: known.get(name.strip().casefold()) or next(free) for name in names}


def domain_colours(domains: Iterable[str]) -> dict[str, str]:
    """Domain → CSS colour; the three usual domains always keep theirs."""
    usual = {"speech": 0, "music": 1, "environment": 2}
    others = [domain for domain in unique(domains) if domain.casefold() not in usual]
    numbers = usual | {domain.casefold(): 3 + index % (DOMAIN_COLOURS - 3) for index, domain in enumerate(others)}
    return {domain: f"var(--d{numbers[domain.casefold()]})" for domain in unique(domains)}
