"""Probing a model on labelled audio, beside the baselines that could win."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2.convert.loading import random_encoder
from bestrq2.data.labels import LabelledTask, load_labelled
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.baselines import LogMelStatistics
from bestrq2.evaluate.benchmark import BENCHMARKS, Benchmark, benchmark_named, check_world, run_benchmark
from bestrq2.evaluate.benchmark_result import is_run_folder, model_provenance, result_of, write_result
from bestrq2.evaluate.probe import FeatureExtractor, probe_features
from bestrq2.evaluate.scores import ProbeScore
from bestrq2.evaluate.table import write_scores
from bestrq2.files import check_writable, disk_errors
from bestrq2.inference.embedder import Embedder, load
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

logger = logging.getLogger(__name__)

RANDOM_ENCODER = "random encoder"
# Rows of other features; a model of that name could not be told from them.
RESERVED_NAMES = (RANDOM_ENCODER, LogMelStatistics.name, "supervised")


def probe(
    model: str | os.PathLike[str],
    labelled: str | os.PathLike[str],
    baselines: bool = True,
    output: Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[ProbeScore]:
    """Linear probe and k-NN on labelled audio, with 95 % intervals.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        labelled: folder with one subfolder a class (optionally inside `train` and `test`), folder of several such
            tasks, table with path and label, "soundworld", or "soundworld-1": the frozen benchmark, by the linear probe
            and k-NN of X-ARES, whose result is also written into a run folder as soundworld-1.json.
        baselines: also probe log-mel statistics and a randomly initialised encoder of the same architecture.
        output: JSON file for the scores; of a benchmark, for its result.
        seed: of splits and probes; a benchmark has its own.
        device: such as "cpu" or "cuda:0"; CUDA where there is one by default.

    Returns:
        One score per features, task and method.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    labelled = os.fspath(labelled)
    if (benchmark := _benchmark(labelled)) is not None:
        if seed != 0:
            raise ConfigError(f"seed is {seed}, but {benchmark.name} is frozen with seeds of its own; leave it out")
        return _probe_on_benchmark(model, benchmark, baselines, output, device)
    if output is not None:
        check_writable(Path(output))
    embedder = load(model, device)
    tasks = load_labelled(labelled, seed=seed)
    features: list[FeatureExtractor] = [embedder]
    if baselines:
        features += [random_twin(embedder), LogMelStatistics()]
    scores = probe_all(features, tasks, seed)
    if output is not None:
        with disk_errors(Path(output)):
            write_scores(output, scores)
    return scores


def _benchmark(labelled: str) -> Benchmark | None:
    """The benchmark that is asked for; None for other labelled audio."""
    if labelled in BENCHMARKS:
        return BENCHMARKS[labelled]
    if labelled.startswith("soundworld-") and not Path(labelled).exists():
        return benchmark_named(labelled)  # says which there are
    return None


def _probe_on_benchmark(
    model: str | os.PathLike[str], benchmark: Benchmark, baselines: bool, output: Path | None, device: str | None
) -> list[ProbeScore]:
    """Scores of the model and of the baselines; the result is written into a run folder, and to `output`."""
    check_world(benchmark)
    files = [] if output is None else [Path(output)]
    if is_run_folder(model):
        files.insert(0, Path(model) / f"{benchmark.name}.json")
    for file in files:
        check_writable(file)
    embedder = load(model, device)
    if is_run_folder(model):
        embedder.name = os.path.basename(os.path.abspath(model))  # of "." and "run/.." too
    if embedder.name in RESERVED_NAMES:
        raise DataError(
            f"{model}: {embedder.name!r} is what results call other features than this model's; rename its folder"
        )
    provenance = model_provenance(model, embedder.config)
    features: list[FeatureExtractor] = [embedder]
    if baselines:
        features += [random_twin(embedder), LogMelStatistics()]
    scores = run_benchmark(features, benchmark)
    for file in files:
        with disk_errors(file):
            write_result(file, result_of(benchmark, embedder.name, scores, provenance))
        logger.info("%s: result of %s", file, benchmark.name)
    return scores


def probe_all(features: Sequence[FeatureExtractor], tasks: Sequence[LabelledTask], seed: int) -> list[ProbeScore]:
    """Probe several kinds of features on the same tasks."""
    return [score for one in features for score in probe_features(one, tasks, seed=seed)]


def random_twin(embedder: Embedder, seed: int = 0) -> Embedder:
    """The same architecture with random weights; it keeps the input statistics, which are measured and not learned."""
    twin: BestRQ2Model = random_encoder(embedder.config, seed)
    twin.statistics.load_state_dict(embedder.model.statistics.state_dict())
    return Embedder(twin, embedder.device, name=RANDOM_ENCODER)
