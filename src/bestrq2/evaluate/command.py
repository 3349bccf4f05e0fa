"""Probing a model on labelled audio, beside the baselines that could win."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2.data.labelled import LabelledTask, load_labelled
from bestrq2.evaluate.baselines import LogMelStatistics
from bestrq2.evaluate.probe import FeatureExtractor, probe_features
from bestrq2.evaluate.scores import ProbeScore
from bestrq2.evaluate.table import write_scores
from bestrq2.files import check_writable, disk_errors
from bestrq2.inference.embedder import Embedder, load, random_encoder
from bestrq2.model.modeling_bestrq2 import BestRQ2Model


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
            tasks, table with path and label, or "soundworld".
        baselines: also probe log-mel statistics and a randomly initialised encoder of the same architecture.
        output: JSON file for the scores.
        seed: of splits and probes.
        device: such as "cpu" or "cuda:0"; CUDA where there is one by default.

    Returns:
        One score per features, task and method.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    if output is not None:
        check_writable(Path(output))
    embedder = load(model, device)
    tasks = load_labelled(os.fspath(labelled), seed=seed)
    features: list[FeatureExtractor] = [embedder]
    if baselines:
        features += [random_twin(embedder), LogMelStatistics()]
    scores = probe_all(features, tasks, seed)
    if output is not None:
        with disk_errors(Path(output)):
            write_scores(output, scores)
    return scores


def probe_all(features: Sequence[FeatureExtractor], tasks: Sequence[LabelledTask], seed: int) -> list[ProbeScore]:
    """Probe several kinds of features on the same tasks."""
    return [score for one in features for score in probe_features(one, tasks, seed=seed)]


def random_twin(embedder: Embedder, seed: int = 0) -> Embedder:
    """The same architecture with random weights; it keeps the input statistics, which are measured and not learned."""
    twin: BestRQ2Model = random_encoder(embedder.config, seed)
    twin.statistics.load_state_dict(embedder.model.statistics.state_dict())
    return Embedder(twin, embedder.device, name="random encoder")
