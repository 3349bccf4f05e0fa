"""Run folders as training leaves them, with curves and benchmark results of given numbers and no training."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import bestrq2
from bestrq2.evaluate.benchmark import SOUNDWORLD_2, benchmark_result
from bestrq2.evaluate.result import Result, TaskScore, write_result
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.report.comparison import Comparison
from bestrq2.report.comparison.arms import group
from bestrq2.report.comparison.comparison import assemble
from bestrq2.report.runs import Run, read_run

BASELINES = {"random encoder": 0.42, "log-mel statistics": 0.5}
CHANCE = 0.0
DOMAINS = {"speech": 0.05, "music": 0.0, "environment": -0.05}
ONE_STAGE = {"model.objective": "one_stage"}


def write_run(
    folder: Path,
    recipe: str = "best-rq-2-tiny",
    seed: int = 0,
    steps: int = 400,
    reached: int | None = None,
    probe: float | None = 0.6,
    quality: float = 1.0,
    timing: bool = True,
    validation: bool = True,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a run folder.

    Args:
        probe: mean over the domains of the linear probe; k-NN scores 0.1 less. None for a run without a result.
        quality: how many times faster than usual the loss falls.
        changes: settings by dotted name.
    """
    folder.mkdir(parents=True)
    settings = bestrq2.recipe("best-rq-2-tiny")
    settings.pop("description")
    settings |= {"recipe": recipe, "data": "soundworld", "output": str(folder), "seed": seed}
    settings["model"] |= {"num_hidden_layers": 2, "predictor_num_layers": 1}
    settings["trainer"] |= {"max_steps": steps, "log_every_n_steps": 20, "val_every_n_steps": 100}
    for name, value in (changes or {}).items():
        *group, key = name.split(".")
        (settings.setdefault(group[0], {}) if group else settings)[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    done = steps if reached is None else reached
    _write_metrics(folder / "metrics.csv", seed, steps, done, quality, validation)
    if timing:
        rows = "".join(f"{step},{0.11 * step * quality}\n" for step in range(20, done + 1, 20))
        (folder / "timing.csv").write_text("step,seconds\n" + rows)
    if probe is not None:
        write_result(folder / "soundworld-2.json", result(probe, seed, done, steps))
    return folder


def result(probe: float, seed: int = 0, step: int = 400, steps: int = 400) -> Result:
    """A result of given means, equal within a domain."""
    provenance = {"seed": seed, "step": step, "steps": steps, "synthesiser": "espeak", "soundworld": "2"}
    rows = {"best-rq-2": probe, **BASELINES}
    scores = tuple(score(name, mean, method) for name, mean in rows.items() for method in METHODS)
    flat = tuple(one for group in scores for one in group)
    return benchmark_result(SOUNDWORLD_2, "best-rq-2", flat, provenance)


def score(features: str, mean: float, method: str) -> list[TaskScore]:
    """Scores on all tasks."""
    lower = 0.1 if method == "knn" else 0.0
    found = []
    for task, half in SOUNDWORLD_2.tasks.items():
        domain = task.split("/")[0]
        share = mean + DOMAINS[domain] - lower
        found.append(
            TaskScore(
                features=features,
                task=task,
                domain=domain,
                method=method,
                metric="accuracy",
                score=share,
                low=0.0,
                high=1.0,
                chance=CHANCE,
                n_test=SOUNDWORLD_2.test,
                half=half,
                clips=(share,) * SOUNDWORLD_2.test,  # all alike, so that intervals are those over seeds
            )
        )
    return found


def read(*folders: Path, unfinished: bool = False) -> list[Run]:
    """The runs in folders."""
    return [read_run(folder, unfinished) for folder in folders]


def together(*folders: Path) -> Comparison:
    """All of a comparison but its files."""
    return assemble(group(read(*folders, unfinished=True)), Path("out"))


def _write_metrics(path: Path, seed: int, steps: int, done: int, quality: float, validation: bool) -> None:
    noise = np.random.default_rng(seed)
    every = set(range(20, done + 1, 20)) | {done}
    stages = ("train", "validation") if validation else ("train",)
    names = ("loss", "excess_loss", "accuracy", "target_entropy", "code_perplexity", "code_coverage", "top_code_share")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{stage}/{name}" for stage in stages for name in names), "train/learning_rate"])
        for step in sorted(every - {0}):
            row: list[Any] = [step]
            for stage in stages:
                if stage == "validation" and step % 100 and step != done:
                    row += [""] * len(names)
                    continue
                entropy = 4.6 + 0.3 * (1 - math.exp(-step / 60)) + 0.01 * noise.standard_normal()
                loss = 4.1 + 3.5 * math.exp(-quality * 4 * step / steps) + 0.03 * noise.standard_normal()
                accuracy = 0.4 * (1 - math.exp(-quality * 3 * step / steps))
                coverage, top = 0.3 + 0.02 * noise.standard_normal(), 0.12 + 0.01 * noise.standard_normal()
                row += [loss, loss - entropy, accuracy, entropy, math.exp(entropy), coverage, top]
            writer.writerow([*row, 1e-4])
