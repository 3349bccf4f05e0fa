"""Frozen labelled benchmarks: every number that could move a score is written down and never changes under its name.

soundworld-1 judges any encoder on 14 generated tasks by the two classifiers of X-ARES (`xares_probe`). What is
improved later gets a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from bestrq2 import soundworld
from bestrq2.data.labels import LabelledClips, LabelledTask, soundworld_tasks
from bestrq2.errors import DataError
from bestrq2.evaluate.probe import FeatureExtractor, ProbeRows, event_present, probe_task, score_answers
from bestrq2.evaluate.scores import ACCURACY, BALANCED_ACCURACY, ProbeScore, domain_means
from bestrq2.evaluate.xares_probe import xares_knn_predict, xares_linear_predict

METHODS = ("linear", "knn")


@dataclass(frozen=True)
class BenchmarkTask:
    """What a frozen task is called, the domain its score counts for, and the metric it is scored by."""

    name: str
    domain: str
    metric: str = ACCURACY


@dataclass(frozen=True)
class Benchmark:
    """A protocol; two scores made under the same name are comparable.

    Attributes:
        name: of the protocol.
        tasks: what is scored, in order.
        train: labelled clips a task that classifiers are fitted on.
        test: clips a task that they are scored on.
        world_seed: of SoundWorld.
        soundworld_version: of the generator; other versions make other audio.
        synthesiser: what must speak; others have other voices.
        epochs: of the linear probe. X-ARES makes 10 over some thousand clips; 100 over 400 are as many updates as 10
            over 4000.
        batch_clips: clips in a step of the linear probe.
        lr: its learning rate at the start; cosine decay to 0.
        seed: of its weights and order, and of the bootstrap over clips.
        knn_k: neighbours.
        knn_temperature: of their votes.
        frame_grid_seconds: frame tasks are scored at one moment each so many seconds, which takes the answer of the
            encoder's nearest frame, so that encoders of any hop are judged on the same moments.
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
        """Every frozen number but the name, as plain JSON types."""
        values = asdict(self)
        del values["name"]
        return {**values, "tasks": list(values["tasks"])}


SOUNDWORLD_1 = Benchmark(
    name="soundworld-1",
    tasks=(
        BenchmarkTask("speech/language", "speech"),
        BenchmarkTask("speech/voice", "speech"),
        BenchmarkTask("speech/word", "speech"),
        BenchmarkTask("speech/speakers", "speech"),
        BenchmarkTask("music/instrument", "music"),
        BenchmarkTask("music/chord", "music"),
        BenchmarkTask("music/key", "music"),
        BenchmarkTask("music/tempo", "music"),
        BenchmarkTask("music/melody", "music"),
        BenchmarkTask("environment/event", "environment"),
        BenchmarkTask("environment/count", "environment"),
        BenchmarkTask("environment/rhythm", "environment"),
        BenchmarkTask("environment/distance", "environment"),
        BenchmarkTask("environment/presence", "environment", BALANCED_ACCURACY),
    ),
)
"""14 tasks of three domains, 400 clips each to fit on and 200 to score on."""

BENCHMARKS = {SOUNDWORLD_1.name: SOUNDWORLD_1}


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of that name; a DataError lists those there are."""
    if name not in BENCHMARKS:
        raise DataError(f"there is no benchmark {name!r}; the benchmarks are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def run_benchmark(
    features: Sequence[FeatureExtractor], benchmark: Benchmark = SOUNDWORLD_1, progress: bool = True
) -> list[ProbeScore]:
    """Score features on every task of a benchmark by a linear probe and by k-NN.

    Clip tasks are scored by accuracy with a Wilson interval. Frame tasks are fitted on the encoder's own frames and
    scored at the moments of a common grid, by balanced accuracy with a bootstrap interval over clips.

    Args:
        features: encoders and baselines, each of its own name.
        benchmark: the protocol.
        progress: show bars on a terminal.

    Returns:
        One score per features, task and method, in this order.

    Raises:
        DataError: if the audio would be other than the frozen one (another version of SoundWorld, no espeak-ng), two
            kinds of features have one name, a clip is rejected, or a task cannot be probed (see `probe.embed_split`).
    """
    names = [one.name for one in features]
    if len(set(names)) < len(names):
        raise DataError(f"{benchmark.name} needs a name of its own for every kind of features, but got {names}.")
    tasks = benchmark_tasks(benchmark, progress=progress)
    scores: list[ProbeScore] = []
    for one in features:
        for task in tasks:
            scores += probe_task(one, task, partial(_score, one.name, task, benchmark), progress=progress)
    return scores


def benchmark_tasks(benchmark: Benchmark, train: int | None = None, progress: bool = True) -> list[LabelledTask]:
    """The labelled audio of a benchmark, generated once and cached.

    Args:
        benchmark: the protocol.
        train: training clips a task; the benchmark's by default. Fewer or more begin with the same clips.
        progress: show progress.

    Raises:
        DataError: if the audio would be other than the frozen one, or cannot be cached.
    """
    check_world(benchmark)
    count = benchmark.train if train is None else train
    names = [task.name for task in benchmark.tasks]
    return soundworld_tasks(names, count, benchmark.test, benchmark.world_seed, progress=progress)


def check_world(benchmark: Benchmark) -> None:
    """Raise a DataError if SoundWorld here makes other audio than the benchmark was frozen with."""
    if benchmark.soundworld_version != soundworld.VERSION:
        raise DataError(
            f"{benchmark.name} is frozen at version {benchmark.soundworld_version} of SoundWorld, but this is version "
            f"{soundworld.VERSION}: its audio is another; install the release of bestrq2 that made the scores you "
            "compare with"
        )
    if benchmark.synthesiser != soundworld.synthesiser():
        raise DataError(
            f"{benchmark.name} needs the {benchmark.synthesiser} synthesiser, but here speech comes from the "
            f"{soundworld.synthesiser()} synthesiser, whose scores would not be comparable: "
            "pip install 'bestrq2[demo]'"
        )


def benchmark_means(scores: Sequence[ProbeScore]) -> dict[str, dict[str, dict[str, float]]]:
    """{features: {method: {domain: mean over its tasks, ..., "mean": mean over the domains}}}, in order of appearance.

    Raises:
        DataError: if the kinds of features were not scored on the same tasks.
    """
    pairs = dict.fromkeys((score.features, score.method) for score in scores)
    means: dict[str, dict[str, dict[str, float]]] = {}
    for features, method in pairs:
        means.setdefault(features, {})[method] = domain_means(scores, method, features)
    return means


def grid_points(clips: LabelledClips, seconds: float) -> list[np.ndarray]:
    """Moments at which a frame task is scored: the centres of as many stretches of `seconds` as fit each clip.

    Args:
        clips: waveforms with their sampling rate.
        seconds: length of a stretch, and so from one moment to the next.

    Returns:
        For every clip float64 [points >= 1], in seconds.

    Raises:
        DataError: if the clips are files.
    """
    if clips.sampling_rate is None:
        raise DataError("The grid of moments needs waveforms with their sampling rate, but got files.")
    lengths = [len(np.asarray(clips.audio[place])) / clips.sampling_rate for place in range(len(clips))]
    # a length that is a whole number of stretches but for rounding holds all of them
    return [(np.arange(max(1, int(length / seconds + 1e-6))) + 0.5) * seconds for length in lengths]


def nearest_frames(timestamps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """For every point the place of the frame whose centre is nearest, the earlier of two.

    Args:
        timestamps: float [frames >= 1], centres of frames in seconds.
        points: float [points], seconds.

    Returns:
        int64 [points].
    """
    # rounded to the nanosecond, so that a tie is one on every machine
    return np.asarray(np.abs(points[:, None] - timestamps).round(9).argmin(axis=1))


def answers_on_grid(
    task: LabelledTask, test: ProbeRows, answers: np.ndarray, seconds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers for the frames of an encoder, read off at the moments of the common grid.

    Args:
        task: of kind "frame".
        test: its embedded test split.
        answers: int [rows of test].
        seconds: from one moment to the next.

    Returns:
        Truth, answers, and the clip of each moment: int64 [moments] each. Clips that were skipped have none.
    """
    truths, given, clips = [], [], []
    for place, points in enumerate(grid_points(task.test, seconds)):
        rows = np.flatnonzero(test.clip == place)
        if len(rows) == 0:
            continue
        truths.append(event_present(points, task.test.labels[place]))
        given.append(answers[rows[nearest_frames(test.seconds[rows], points)]])
        clips.append(np.full(len(points), place))
    return np.concatenate(truths), np.concatenate(given), np.concatenate(clips)


def score_on_benchmark(
    name: str,
    task: LabelledTask,
    method: str,
    train_labels: np.ndarray,
    test: ProbeRows,
    answers: np.ndarray,
    benchmark: Benchmark,
) -> ProbeScore:
    """Score answers for the rows of an embedded test split by the metric of the task; see `run_benchmark`.

    Args:
        name: of the features.
        task: one of the benchmark.
        method: how the answers were found.
        train_labels: int [training rows], for the chance level.
        test: the embedded test split.
        answers: int [rows of test].
        benchmark: the protocol.
    """
    truth, clip = test.labels, test.clip
    if task.kind == "frame":
        truth, answers, clip = answers_on_grid(task, test, answers, benchmark.frame_grid_seconds)
    return score_answers(name, task, method, train_labels, truth, answers, clip, seed=benchmark.seed)


def _score(name: str, task: LabelledTask, benchmark: Benchmark, train: ProbeRows, test: ProbeRows) -> list[ProbeScore]:
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"The train split of {task.name} shows one class only: a probe needs at least two.")
    if skipped := train.skipped + test.skipped:
        raise DataError(
            f"{name} cannot be scored on {benchmark.name}, which counts every clip: it rejects {len(skipped)} "
            f"of {task.name}, the first: {skipped[0]}"
        )
    return [
        score_on_benchmark(
            name, task, method, train.labels, test, _answers(method, task, train, test, benchmark), benchmark
        )
        for method in METHODS
    ]


def _answers(method: str, task: LabelledTask, train: ProbeRows, test: ProbeRows, benchmark: Benchmark) -> np.ndarray:
    frames = task.kind == "frame"
    if method == "linear":
        return xares_linear_predict(
            train.features,
            train.labels,
            test.features,
            groups=train.clip if frames else None,
            epochs=benchmark.epochs,
            batch=benchmark.batch_clips,
            lr=benchmark.lr,
            seed=benchmark.seed,
        )
    return xares_knn_predict(
        train.features,
        train.labels,
        test.features,
        balanced=frames,
        k=benchmark.knn_k,
        temperature=benchmark.knn_temperature,
    )
