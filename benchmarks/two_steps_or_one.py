"""Score runs that compare two steps with one: tables and learning curves of docs/results.md.

    python benchmarks/experiments.py examples/two-steps-or-one/*-*.yaml --lr 5e-4 1e-3 2e-3 4e-3 --seeds 0 --data CORPUS --probe no --output runs
    python benchmarks/two_steps_or_one.py choose runs
    python benchmarks/experiments.py examples/two-steps-or-one/*-*.yaml --lr 1e-3 --data CORPUS --probe no --output runs
    python benchmarks/experiments.py examples/two-steps-or-one/two-step.yaml --lr 1e-3 --steps 1419 --data CORPUS --probe no --output runs/longer
    python benchmarks/two_steps_or_one.py report --lr 1e-3 1e-3 --figure curves.svg runs

`choose` scores every run on the tasks to choose on. `report` scores the runs at the learning rates of both objectives
on the other tasks, at the kept checkpoints too: at equal clips, and at equal compute (runs/longer has as many steps as
cost the training compute of the one-stage runs). Scores are kept beside the runs and not computed again. Both use
soundworld-2 and realworld-1, which `bestrq2 realworld` fetches.
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import bestrq2
from bestrq2.convert.loading import random_encoder
from bestrq2.evaluate.benchmark import SOUNDWORLD_2, Benchmark, realworld_1, run_benchmark
from bestrq2.evaluate.intervals import Interval, difference_interval, holm, mean_interval
from bestrq2.evaluate.probe import LogMelStatistics
from bestrq2.evaluate.result import CHOOSE, REPORT, Result, TaskScore, read_result, write_result
from bestrq2.inference.cost import cost
from bestrq2.inference.embedder import Embedder
from bestrq2.report.charts import LineChart, Series, series_style, svg_of_lines

BENCHMARKS: list[Benchmark] = [SOUNDWORLD_2, realworld_1()]
DOMAINS = ("speech", "music", "environment")
METHODS = {"linear": "mean over time", "statistics": "statistics over time"}
Scores = list[TaskScore]


def scores_of(source: Path, benchmark: Benchmark, half: str, kept: Path) -> Scores:
    """Scores of a run, a checkpoint or a baseline on one half of the tasks, computed once and kept in `kept`."""
    file = kept / f"{source.name}-{benchmark.name}-{half}.json"
    if file.is_file():
        return list(read_result(file, benchmark.name, lambda result: None).scores)
    features: Embedder | LogMelStatistics
    if source.name == "log-mel":
        features = LogMelStatistics()
    elif source.name.startswith("random"):
        features = Embedder(random_encoder(bestrq2.load(source.parent).config, int(source.name[-1])))
    else:
        features = bestrq2.load(source)
    features.name = source.name
    tasks = {name: one for name, one in benchmark.tasks.items() if one == half}
    print(f"scoring {source} on {benchmark.name} ({half})", flush=True)
    scores = run_benchmark([features], replace(benchmark, tasks=tasks), progress=False)
    kept.mkdir(parents=True, exist_ok=True)
    write_result(file, Result(benchmark.name, source.name, tuple(scores)), {})
    return scores


def by_method(scores: Scores, method: str) -> Scores:
    """Scores of one method; retrieval has none by "linear"."""
    return [score for score in scores if score.method == method]


def percent(interval: Interval, sign: str = "") -> str:
    """Interval as "12.3 ± 4.5"."""
    return f"{100 * interval.estimate:{sign}.1f} ± {100 * interval.half_width:.1f}"


def choose(runs: Path) -> None:
    """Print the mean score of every run on the tasks to choose on."""
    print("| run | " + " | ".join(f"{b.name}, {title}" for b in BENCHMARKS for title in METHODS.values()) + " |")
    print("|---|" + "--:|" * 2 * len(BENCHMARKS))
    for run in sorted(runs.glob("*-lr*-seed0")):
        cells = [
            percent(mean_interval([by_method(scores_of(run, benchmark, CHOOSE, runs / "scores"), method)]))
            for benchmark in BENCHMARKS
            for method in METHODS
        ]
        print(f"| {run.name} | " + " | ".join(cells) + " |", flush=True)


def report(runs: Path, rates: Sequence[float], figure: Path | None, seeds: Sequence[int]) -> None:
    """Print scores of the arms on the tasks to report and their differences, and draw the learning curves."""
    two, one = (f"{name}-lr{rate:g}" for name, rate in zip(("two-step", "one-stage"), rates, strict=True))
    arms = {
        "one stage": [runs / f"{one}-seed{seed}" for seed in seeds],
        "two steps, equal clips": [runs / f"{two}-seed{seed}" for seed in seeds],
        "two steps, equal compute": [runs / "longer" / f"{two}-seed{seed}" for seed in seeds],
        "random weights": [runs / f"{one}-seed{seeds[0]}" / f"random{seed}" for seed in seeds],
        "log-mel statistics": [Path("log-mel")],
    }
    found = {
        (arm, benchmark.name): [
            scores_of(source, benchmark, REPORT, runs / "scores" / ("longer" if "longer" in source.parts else ""))
            for source in sources
        ]
        for arm, sources in arms.items()
        for benchmark in BENCHMARKS
    }
    print_scores(found, list(arms))
    print_differences(found, list(arms)[1:3], "one stage")
    print_differences(found, list(arms)[:3], "random weights")
    if figure is not None:
        draw(arms, figure, runs)


def print_scores(found: dict[tuple[str, str], list[Scores]], arms: Sequence[str]) -> None:
    """Means of every arm, by domain."""
    for benchmark in BENCHMARKS:
        print(f"\n{benchmark.name}")
        for method, title in METHODS.items():
            print(f"\n| {title} | speech | music | environment | mean of domains |\n|---|--:|--:|--:|--:|")
            for arm in arms:
                seeds = [by_method(scores, method) for scores in found[arm, benchmark.name]]
                domains = [
                    percent(mean_interval([[one for one in scores if one.domain == domain] for scores in seeds]))
                    for domain in DOMAINS
                ]
                print(f"| {arm} | " + " | ".join([*domains, percent(mean_interval(seeds))]) + " |")


def print_differences(found: dict[tuple[str, str], list[Scores]], arms: Sequence[str], base: str) -> None:
    """Differences of arms from another one, with p-values corrected over all rows."""
    rows = []
    for benchmark in BENCHMARKS:
        for method, title in METHODS.items():
            for arm in arms:
                later, earlier = (
                    [by_method(scores, method) for scores in found[name, benchmark.name]] for name in (arm, base)
                )
                rows.append((f"{benchmark.name}, {title} | {arm}", difference_interval(later, earlier)))
    print(f"\n| above {base} | | points | p by Holm |\n|---|---|--:|--:|")
    for (label, one), corrected in zip(rows, holm([one.p_value for _, one in rows]), strict=True):
        print(f"| {label} | {percent(one, '+')} | {corrected:.3f} |")


def draw(arms: dict[str, list[Path]], figure: Path, runs: Path) -> None:
    """Scores of the first seed at its kept checkpoints and its end, against training compute."""
    charts = []
    for benchmark in BENCHMARKS:
        series = []
        for place, arm in enumerate(("one stage", "two steps, equal compute")):
            run = arms[arm][0]
            config, settings = bestrq2.load(run).config, read_settings(run)
            rows = settings["loader"]["batch_seconds"] / config.max_seconds
            step = cost(config).training_gflops * rows / 1000
            kept = runs / "scores" / ("longer" if "longer" in run.parts else "")
            sources = [
                (int(file.stem[5:]), file, kept / run.name) for file in (run / "checkpoints").glob("step-*.ckpt")
            ]
            *earlier, _ = sorted(sources)
            points = []
            for steps, source, folder in [*earlier, (settings["trainer"]["max_steps"], run, kept)]:
                scores = by_method(scores_of(source, benchmark, REPORT, folder), "statistics")
                mean = mean_interval([scores])
                points.append((steps * step, 100 * mean.estimate, 100 * mean.half_width))
            x, y, half = np.array(points).T
            colour, dash = series_style(place)
            series.append(Series(arm.partition(",")[0], colour, x, y, y - half, y + half, "checks", dash))
        charts.append(
            LineChart(title=benchmark.name, y_label="mean of domains (%)", x_label="TFLOPs", series=tuple(series))
        )
    figure.write_text(svg_of_lines([charts]), encoding="utf-8")


def read_settings(run: Path) -> dict[str, Any]:
    """Settings of a run."""
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["choose", "report"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--lr", nargs=2, type=float, metavar=("TWO-STEP", "ONE-STAGE"), default=[1e-3, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    if options.what == "choose":
        choose(options.runs)
    else:
        report(options.runs, options.lr, options.figure, options.seeds)


if __name__ == "__main__":
    main()
