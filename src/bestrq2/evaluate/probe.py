"""Entry point of `bestrq2 probe`: a model on labelled audio or on a frozen benchmark, beside baselines."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2.convert.loading import random_encoder
from bestrq2.data.labels import LabelledTask, load_labelled
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.baselines import LogMelStatistics
from bestrq2.evaluate.benchmark import Benchmark, benchmark_result, check_world, find_benchmark, run_benchmark
from bestrq2.evaluate.provenance import is_run_folder, model_name, model_provenance
from bestrq2.evaluate.result import PROBE, Result, TaskScore, write_result
from bestrq2.evaluate.score_table import all_means
from bestrq2.evaluate.task_probe import FeatureExtractor, probe_features
from bestrq2.files import check_writable, disk_errors
from bestrq2.inference.embedder import Embedder, load
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

logger = logging.getLogger(__name__)

RANDOM_ENCODER = "random encoder"
BASELINE_NAMES = (RANDOM_ENCODER, LogMelStatistics.name, "supervised")
"""Names of other features than the model's; a model of that name could not be told from them."""


def run_probe(
    model: str | os.PathLike[str],
    labelled: str | os.PathLike[str],
    baselines: bool = True,
    output: Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Result:
    """Probe a model on labelled audio or on a frozen benchmark; see `bestrq2.probe` for the arguments.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    labelled = os.fspath(labelled)
    if (benchmark := find_benchmark(labelled)) is not None:
        if seed != 0:
            raise ConfigError(f"seed is {seed}, but {benchmark.name} is frozen with seeds of its own; leave it out")
        return _run_frozen(model, benchmark, baselines, output, device)
    if output is not None:
        check_writable(Path(output))
    embedder = load_named(model, device)
    scores = probe_all(features_to_probe(embedder, baselines), load_labelled(labelled, seed=seed), seed)
    provenance = model_provenance(model, embedder.config, ["bestrq2 probe", os.fspath(model), labelled])
    provenance["protocol"] = {"labelled": labelled, "seed": seed}
    result = Result(PROBE, embedder.name, tuple(scores), {}, provenance)
    if output is not None:
        with disk_errors(Path(output)):
            write_result(output, result, all_means(scores))
    return result


def _run_frozen(
    model: str | os.PathLike[str], benchmark: Benchmark, baselines: bool, output: Path | None, device: str | None
) -> Result:
    """Score a model and baselines on a frozen benchmark; see `run_probe`.

    The result is written to `output`, and into the folder of a pretraining run as NAME.json.
    """
    check_world(benchmark)
    files = [] if output is None else [Path(output)]
    if is_run_folder(model):
        files.insert(0, Path(model) / f"{benchmark.name}.json")
    for file in files:
        check_writable(file)
    embedder = load_named(model, device)
    # before the scores are made: what a run folder says of itself may change meanwhile
    provenance = model_provenance(model, embedder.config, ["bestrq2 probe", os.fspath(model), benchmark.name])
    scores = run_benchmark(features_to_probe(embedder, baselines), benchmark)
    result = benchmark_result(benchmark, embedder.name, scores, provenance)
    for file in files:
        with disk_errors(file):
            write_result(file, result, all_means(scores))
        logger.info("%s: result of %s", file, benchmark.name)
    return result


def load_named(model: str | os.PathLike[str], device: str | None) -> Embedder:
    """Load an embedder that is called like the folder of the model, not "run" for every run folder.

    Raises:
        DataError: the name is that of a baseline.
        BestRQ2Error: there is no such model.
    """
    embedder = load(model, device)
    if Path(model).is_dir():
        embedder.name = model_name(model)
    if embedder.name in BASELINE_NAMES:
        raise DataError(f"{model}: {embedder.name!r} is the name of a baseline in results; rename the model's folder")
    return embedder


def features_to_probe(embedder: Embedder, baselines: bool) -> list[FeatureExtractor]:
    """The model, followed by the baselines where they are wanted."""
    found: list[FeatureExtractor] = [embedder]
    return [*found, random_twin(embedder), LogMelStatistics()] if baselines else found


def random_twin(embedder: Embedder, seed: int = 0) -> Embedder:
    """The same architecture with random weights; it keeps the input statistics, which are measured and not learned."""
    twin: BestRQ2Model = random_encoder(embedder.config, seed)
    twin.statistics.load_state_dict(embedder.model.statistics.state_dict())
    return Embedder(twin, embedder.device, name=RANDOM_ENCODER)


def probe_all(features: Sequence[FeatureExtractor], tasks: Sequence[LabelledTask], seed: int = 0) -> list[TaskScore]:
    """Probe several kinds of features on the same tasks; see `probe_features`."""
    return [score for one in features for score in probe_features(one, tasks, seed=seed)]
