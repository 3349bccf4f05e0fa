"""Frozen benchmark soundworld-1: every number that could change a score is fixed, and never changes under its name.

It scores any encoder on 14 generated tasks by the protocol of X-ARES: LayerNorm and a linear layer trained by Adam, and
cosine k-NN, both on embeddings as they are. An improved protocol gets another name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2 import soundworld
from bestrq2.data.labels import LabelledClips, LabelledTask, soundworld_tasks
from bestrq2.errors import DataError
from bestrq2.evaluate.adam_probe import adam_probe_predict
from bestrq2.evaluate.classifiers import knn_predict
from bestrq2.evaluate.metrics import ACCURACY, BALANCED_ACCURACY
from bestrq2.evaluate.result import Result, TaskScore, check_result, read_result
from bestrq2.evaluate.task_probe import (
    METHODS,
    FeatureExtractor,
    ProbeRows,
    event_present,
    probe_task,
    score_predictions,
)


@dataclass(frozen=True)
class BenchmarkTask:
    """Name of a frozen task, the domain that it counts for, and its metric."""

    name: str
    domain: str
    metric: str = ACCURACY


@dataclass(frozen=True)
class Benchmark:
    """Protocol of a benchmark; two scores made under the same name are comparable.

    Attributes:
        name: name of the protocol.
        tasks: tasks in order.
        train: labelled clips per task that classifiers are fitted to.
        test: clips per task that they are scored on.
        world_seed: seed of SoundWorld.
        soundworld_version: version of the generator; other versions make other audio.
        synthesiser: speech synthesiser; others have other voices.
        epochs: epochs of the linear probe. X-ARES makes 10 over some thousand clips; 100 over 400 are as many updates
            as 10 over 4000.
        batch_clips: clips per step of the linear probe.
        lr: learning rate of the linear probe at the start; cosine decay to 0.
        seed: random seed of the weights and clip order of the linear probe, and of the bootstrap over clips.
        knn_k: number of neighbours.
        knn_temperature: temperature of the neighbours' votes.
        frame_grid_seconds: spacing of the moments at which frame tasks are scored. Each takes the prediction of the
            encoder's nearest frame, so that encoders of any hop are scored on the same moments.
    """

    name: str
    tasks: tuple[BenchmarkTask, ...]
    train: int = 400
    test: int = 200
    world_seed: int = 0
    soundworld_version: str = "2"
    synthesiser: str = "espeak"
    epochs: int = 100
    batch_clips: int = 32
    lr: float = 1e-3
    seed: int = 42
    knn_k: int = 10
    knn_temperature: float = 0.07
    frame_grid_seconds: float = 0.04

    def protocol(self) -> dict[str, Any]:
        """Every frozen number except the name, as plain JSON types."""
        values = asdict(self)
        del values["name"]
        return {**values, "tasks": list(values["tasks"])}


SOUNDWORLD_1 = Benchmark(
    name="soundworld-1",
    tasks=(
        *(BenchmarkTask(f"speech/{name}", "speech") for name in ("language", "voice", "word", "speakers")),
        *(BenchmarkTask(f"music/{name}", "music") for name in ("instrument", "chord", "key", "tempo", "melody")),
        *(BenchmarkTask(f"environment/{name}", "environment") for name in ("event", "count", "rhythm", "distance")),
        BenchmarkTask("environment/presence", "environment", BALANCED_ACCURACY),
    ),
)
"""14 tasks of three domains, with 400 training and 200 test clips each."""

BENCHMARKS = {SOUNDWORLD_1.name: SOUNDWORLD_1}


def find_benchmark(labelled: str) -> Benchmark | None:
    """The benchmark named by an argument; None for other labelled audio.

    Raises:
        DataError: the name is that of a benchmark that does not exist.
    """
    if labelled in BENCHMARKS:
        return BENCHMARKS[labelled]
    if labelled.startswith("soundworld-") and not Path(labelled).exists():
        raise DataError(f"there is no benchmark {labelled!r}; the benchmarks are: {', '.join(BENCHMARKS)}")
    return None


def run_benchmark(
    features: Sequence[FeatureExtractor], benchmark: Benchmark = SOUNDWORLD_1, progress: bool = True
) -> list[TaskScore]:
    """Score features on every task of a benchmark by a linear probe and by k-NN.

    Clip tasks are scored by accuracy with a Wilson interval. Frame tasks are fitted on the encoder's own frames and
    scored at the moments of a common grid, by balanced accuracy with a bootstrap interval over clips.

    Args:
        features: encoders and baselines, each with its own name.
        benchmark: the protocol.
        progress: show bars on a terminal.

    Returns:
        One score per features, task and method, in this order.

    Raises:
        DataError: the audio would differ from the frozen one (another version of SoundWorld, no espeak-ng), two kinds
            of features have one name, a clip is rejected, or a task cannot be probed (see `embed_split`).
    """
    names = [one.name for one in features]
    if len(set(names)) < len(names):
        raise DataError(f"{benchmark.name} needs a different name for every kind of features, but got {names}.")
    tasks = benchmark_tasks(benchmark, progress=progress)
    scores: list[TaskScore] = []
    for one in features:
        for task in tasks:
            scores += probe_task(one, task, partial(_scores, one.name, task, benchmark), progress=progress)
    return scores


def benchmark_tasks(benchmark: Benchmark, train: int | None = None, progress: bool = True) -> list[LabelledTask]:
    """The labelled audio of a benchmark, generated once and cached.

    Args:
        benchmark: the protocol.
        train: training clips per task, by default the benchmark's. Fewer or more begin with the same clips.
        progress: show progress.

    Raises:
        DataError: the audio would differ from the frozen one, or cannot be cached.
    """
    check_world(benchmark)
    count = benchmark.train if train is None else train
    names = [task.name for task in benchmark.tasks]
    return soundworld_tasks(names, count, benchmark.test, benchmark.world_seed, progress=progress)


def check_world(benchmark: Benchmark) -> None:
    """Raise a DataError if SoundWorld makes other audio here than the benchmark was frozen with."""
    if benchmark.soundworld_version != soundworld.VERSION:
        raise DataError(
            f"{benchmark.name} is frozen at version {benchmark.soundworld_version} of SoundWorld, but this is version "
            f"{soundworld.VERSION}, whose audio differs; install the release of bestrq2 that made the scores you "
            "compare with"
        )
    if benchmark.synthesiser != soundworld.synthesiser():
        raise DataError(
            f"{benchmark.name} needs the {benchmark.synthesiser} synthesiser, but speech comes from the "
            f"{soundworld.synthesiser()} synthesiser here, and scores would not be comparable: "
            "pip install 'bestrq2[demo]'"
        )


def benchmark_result(
    benchmark: Benchmark, model: str, scores: Sequence[TaskScore], provenance: dict[str, Any]
) -> Result:
    """Assemble the result of a benchmark, with its protocol as part of the provenance."""
    return Result(benchmark.name, model, tuple(scores), {}, provenance | {"protocol": benchmark.protocol()})


def read_benchmark_result(path: str | os.PathLike[str], benchmark: Benchmark = SOUNDWORLD_1) -> Result:
    """Read the result of a frozen benchmark.

    Raises:
        DataError: the file cannot be read, or its scores were not made by the benchmark's protocol; the message names
            the file, what differs and the command that writes a new one.
    """
    return read_result(path, benchmark.name, lambda result: check_benchmark_result(result, benchmark))


def check_benchmark_result(result: Result, benchmark: Benchmark = SOUNDWORLD_1) -> None:
    """Raise a DataError unless the scores of a result were made by the protocol of the benchmark."""
    check_result(result)
    protocol = result.provenance.get("protocol")
    for key, value in benchmark.protocol().items():
        found = protocol.get(key) if isinstance(protocol, dict) else None
        if found != value:
            what = "other tasks" if key == "tasks" else f"{key} {found!r}, where {benchmark.name} has {value!r}"
            raise DataError(f"the protocol has {what}")
    if not result.of_model():
        raise DataError(f"no score is of {result.model!r}, the model itself")
    for score in result.scores:
        _check_score(benchmark, score)
    for features, method in dict.fromkeys((score.features, score.method) for score in result.scores):
        own = [score.task for score in result.scores if (score.features, score.method) == (features, method)]
        if missing := [task.name for task in benchmark.tasks if task.name not in own]:
            raise DataError(f"{features} ({method}) has no score on {', '.join(missing)}")


def _check_score(benchmark: Benchmark, score: TaskScore) -> None:
    what = f"the score of {score.features} on {score.task}"
    task = next((task for task in benchmark.tasks if task.name == score.task), None)
    if task is None:
        raise DataError(f"{what}: {benchmark.name} has no such task")
    expected = {"metric": task.metric, "domain": task.domain, "n_test": benchmark.test}
    for name, value in expected.items():
        if getattr(score, name) != value:
            raise DataError(f"{what} has {name} {getattr(score, name)!r}, where {benchmark.name} has {value!r}")
    if score.method not in METHODS:
        raise DataError(f"{what} has the method {score.method!r}, but {benchmark.name} has {' and '.join(METHODS)}")
    if not score.low <= score.score <= score.high:
        raise DataError(f"{what} has no interval")


def grid_points(clips: LabelledClips, seconds: float) -> list[np.ndarray]:
    """Moments at which a frame task is scored: the centres of as many stretches of `seconds` as fit each clip.

    Args:
        clips: waveforms with their sampling rate.
        seconds: spacing of the moments.

    Returns:
        Moments of every clip in seconds, float64 [points >= 1].

    Raises:
        DataError: the clips are files.
    """
    if clips.sampling_rate is None:
        raise DataError("The grid of moments needs waveforms with their sampling rate, but got files.")
    lengths = [len(np.asarray(clips.audio[place])) / clips.sampling_rate for place in range(len(clips))]
    # a length that is a whole number of stretches up to rounding holds all of them
    return [(np.arange(max(1, int(length / seconds + 1e-6))) + 0.5) * seconds for length in lengths]


def nearest_frames(timestamps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Index of the frame whose centre is nearest to each point, the earlier of two.

    Args:
        timestamps: centres of frames in seconds, float [frames >= 1].
        points: moments in seconds, float [points].

    Returns:
        int64 [points].
    """
    # rounded to the nanosecond, so that a tie is one on every machine
    return np.asarray(np.abs(points[:, None] - timestamps).round(9).argmin(axis=1))


def predictions_on_grid(
    task: LabelledTask, test: ProbeRows, predicted: np.ndarray, seconds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions for the frames of an encoder, read off at the moments of the common grid.

    Args:
        task: task of kind "frame".
        test: embedded test split of the task.
        predicted: int [rows of test].
        seconds: spacing of the moments.

    Returns:
        Truth, predictions, and the clip of each moment: int64 [moments] each. Skipped clips have none.
    """
    truths, given, clips = [], [], []
    for place, points in enumerate(grid_points(task.test, seconds)):
        rows = np.flatnonzero(test.clip == place)
        if len(rows) == 0:
            continue
        truths.append(event_present(points, task.test.labels[place]))
        given.append(predicted[rows[nearest_frames(test.seconds[rows], points)]])
        clips.append(np.full(len(points), place))
    return np.concatenate(truths), np.concatenate(given), np.concatenate(clips)


def score_on_benchmark(
    name: str,
    task: LabelledTask,
    method: str,
    train_labels: np.ndarray,
    test: ProbeRows,
    predicted: np.ndarray,
    benchmark: Benchmark,
) -> TaskScore:
    """Score predictions for the rows of an embedded test split by the metric of the task; see `run_benchmark`.

    Args:
        name: name of the features.
        task: task of the benchmark.
        method: method that made the predictions.
        train_labels: int [training rows], for the chance level.
        test: the embedded test split.
        predicted: int [rows of test].
        benchmark: the protocol.
    """
    truth, clip, frames = test.labels, test.clip, task.kind == "frame"
    if frames:
        truth, predicted, clip = predictions_on_grid(task, test, predicted, benchmark.frame_grid_seconds)
    return score_predictions(
        name, task, method, train_labels, truth, predicted, clip, seed=benchmark.seed, balanced=frames
    )


def _scores(name: str, task: LabelledTask, benchmark: Benchmark, train: ProbeRows, test: ProbeRows) -> list[TaskScore]:
    if skipped := train.skipped + test.skipped:
        raise DataError(
            f"{name} cannot be scored on {benchmark.name}, which counts every clip: it rejects {len(skipped)} "
            f"of {task.name}, the first: {skipped[0]}"
        )
    frames = task.kind == "frame"
    linear = adam_probe_predict(
        train.features, train.labels, test.features, groups=train.clip if frames else None, epochs=benchmark.epochs,
        batch=benchmark.batch_clips, lr=benchmark.lr, seed=benchmark.seed,
    )  # fmt: skip
    neighbours = knn_predict(
        train.features, train.labels, test.features, k=benchmark.knn_k, temperature=benchmark.knn_temperature,
        balanced=frames,
    )  # fmt: skip
    predictions = {"linear": linear, "knn": neighbours}
    return [
        score_on_benchmark(name, task, method, train.labels, test, predictions[method], benchmark) for method in METHODS
    ]
