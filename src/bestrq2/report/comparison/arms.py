"""Runs that differ in nothing but their seed form an arm, the unit that is compared."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bestrq2.errors import DataError
from bestrq2.inference.cost import Cost, cost
from bestrq2.report.comparison.runs import Run
from bestrq2.report.run_folder import value_text

# What does not change what is learned: where and how fast a run ran, what it wrote and watched.
INCIDENTAL = {"recipe", "description", "extends", "output", "seed", "resume", "loader.num_workers"} | {
    f"trainer.{name}"
    for name in (
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "log_every_n_steps",
        "val_every_n_steps",
        "checkpoint_every_n_steps",
        "keep_last",
        "keep_every_n_steps",
        "gradient_checkpointing",
    )
}
INCIDENTAL_GROUPS = ("probe", "watch", "logging")
# How labels call settings; others go by the last part of their name.
SHORT = {
    "data": "data",
    "trainer.max_steps": "steps",
    "loader.batch_size": "batch size",
    "optimizer.lr": "lr",
    "model.hidden_size": "width",
    "model.num_hidden_layers": "layers",
    "model.codebook_size": "codes",
    "model.num_codebooks": "codebooks",
    "model.mask_ratio": "hidden share",
    "model.objective": "objective",
}
MOST_NAMED = 3


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings, apart from their seeds.

    Attributes:
        label: unique among the arms.
        runs: by seed.
        settings: those that matter, under dotted names.
    """

    label: str
    runs: tuple[Run, ...]
    settings: dict[str, Any]

    @property
    def first(self) -> Run:
        """Any of the runs: what they share can be read there."""
        return self.runs[0]

    @functools.cached_property
    def cost(self) -> Cost:
        """Size of the model, and what a clip costs in training."""
        return cost(self.first.model)

    def gflops(self, steps: int) -> float:
        """Training GFLOPs up to a step, for clips of full length."""
        return self.cost.training_gflops * self.first.batch_size * steps


def settings_that_matter(run: Run) -> dict[str, Any]:
    """The settings that change what is learned."""
    return {
        key: value
        for key, value in run.settings.items()
        if key not in INCIDENTAL and key.split(".")[0] not in INCIDENTAL_GROUPS
    }


def group(runs: Sequence[Run]) -> list[Arm]:
    """The arms in order of their first run; reference runs and runs at different steps are arms of their own.

    Raises:
        DataError: an arm has the same seed twice.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.reference, run.steps, settings_that_matter(run)], sort_keys=True, default=str)
        grouped.setdefault(key, []).append(run)
    for members in grouped.values():
        seeds: dict[int, Run] = {}
        for run in members:
            if run.seed in seeds:
                raise DataError(
                    f"{seeds[run.seed].folder} and {run.folder} are the same run twice, with seed {run.seed}: the "
                    "same seed twice is not two samples; leave one out"
                )
            seeds[run.seed] = run
    parts = [tuple(sorted(members, key=lambda run: run.seed)) for members in grouped.values()]
    return [
        Arm(label, members, settings_that_matter(members[0]))
        for label, members in zip(_labels(parts), parts, strict=True)
    ]


def differing(settings: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all, those that people change most first."""
    every = list(settings)
    names = dict.fromkeys(key for one in every for key in one)
    found = [name for name in names if any(one.get(name) != every[0].get(name) for one in every)]
    order = list(SHORT)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _labels(parts: Sequence[tuple[Run, ...]]) -> list[str]:
    """Recipe names, made unique by the settings in which arms of one recipe differ, then marked where unfinished."""
    base = [f"reference: {runs[0].reference}" if runs[0].reference else runs[0].recipe for runs in parts]
    labels = list(base)
    for name in dict.fromkeys(base):
        places = [place for place, label in enumerate(base) if label == name]
        settings = [settings_that_matter(parts[place][0]) for place in places]
        for place, told in zip(places, _told_apart(settings), strict=True):
            labels[place] = ", ".join([name, *told])
    marked = []
    for label, runs in zip(labels, parts, strict=True):
        run = runs[0]
        mark = "" if run.finished else f" (unfinished, step {run.steps:,} of {run.max_steps:,})"
        marked.append(label + mark)
    found: list[str] = []
    for label, runs in zip(marked, parts, strict=True):
        unique = label if marked.count(label) == 1 else f"{label} ({runs[0].folder})"
        found.append(unique if unique not in found else f"{unique} #{len(found) + 1}")
    return found


def _told_apart(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each arm settings with their values: all that differ if they are few, else those that tell most, and "…"."""
    names, more = differing(settings), []
    if len(names) > MOST_NAMED:
        more = ["…"]
        chosen: list[str] = []
        while len(chosen) < MOST_NAMED:
            best = max(names, key=lambda name: (_distinct(settings, [*chosen, name]), -names.index(name)))
            if chosen and _distinct(settings, [*chosen, best]) == _distinct(settings, chosen):
                break
            chosen.append(best)
        names = chosen
    told = [[f"{SHORT.get(n, n.split('.')[-1])} {value_text(one.get(n), n)}" for n in names] for one in settings]
    return [[*one, *more] for one in told]


def _distinct(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> int:
    return len({json.dumps([one.get(name) for name in names], default=str) for one in settings})
