"""Frozen benchmark soundworld-2: every number that could change a score is fixed, and never changes under its name.

It scores any encoder on 12 generated tasks by the probes of `task_probe`. Settings are chosen on one half of the tasks,
and scores reported on the other. An improved protocol gets another name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bestrq2 import soundworld
from bestrq2.data.labels import LabelledTask, soundworld_tasks
from bestrq2.errors import DataError
from bestrq2.evaluate.classifiers import FOLDS, REGULARISATION_GRID
from bestrq2.evaluate.metrics import ACCURACY
from bestrq2.evaluate.result import CHOOSE, REPORT, Result, TaskScore, check_result, read_result
from bestrq2.evaluate.task_probe import METHODS, FeatureExtractor, probe_features


@dataclass(frozen=True)
class Benchmark:
    """Protocol of a benchmark; two scores made under the same name are comparable.

    Attributes:
        name: name of the protocol.
        tasks: half of each task by its name "domain/what": `CHOOSE` or `REPORT`.
        train: labelled clips per task that classifiers are fitted to.
        test: clips per task that they are scored on.
        world_seed: seed of SoundWorld.
        soundworld_version: version of the generator; other versions make other audio.
        synthesiser: speech synthesiser; others have other voices.
        seed: random seed of validation folds and intervals.
    """

    name: str
    tasks: dict[str, str]
    train: int = 400
    test: int = 400
    world_seed: int = 0
    soundworld_version: str = "2"
    synthesiser: str = "espeak"
    seed: int = 0

    def protocol(self) -> dict[str, Any]:
        """Every frozen number except the name, as plain JSON types."""
        own = {name: value for name, value in vars(self).items() if name != "name"}
        return own | {"methods": list(METHODS), "regularisation": list(REGULARISATION_GRID), "folds": FOLDS}


SOUNDWORLD_2 = Benchmark(
    "soundworld-2",
    {
        "speech/voice": CHOOSE,
        "speech/speakers": CHOOSE,
        "speech/language": REPORT,
        "speech/word": REPORT,
        "music/instrument": CHOOSE,
        "music/key": CHOOSE,
        "music/tempo": CHOOSE,
        "music/chord": REPORT,
        "music/melody": REPORT,
        "environment/count": CHOOSE,
        "environment/event": REPORT,
        "environment/rhythm": REPORT,
    },
)
"""12 tasks of three domains. Of SoundWorld's tasks it leaves out distance, which no features solve above chance, and
presence, whose frames have no statistics over time."""

BENCHMARKS = {SOUNDWORLD_2.name: SOUNDWORLD_2}


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
    features: Sequence[FeatureExtractor], benchmark: Benchmark = SOUNDWORLD_2, progress: bool = True
) -> list[TaskScore]:
    """Score features on every task of a benchmark; see `probe_features`.

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
    tasks = benchmark_tasks(benchmark, progress)
    scores: list[TaskScore] = []
    for one in features:
        for score in probe_features(one, tasks, seed=benchmark.seed, progress=progress):
            if score.skipped:
                raise DataError(
                    f"{one.name} cannot be scored on {benchmark.name}, which counts every clip: it rejects "
                    f"{len(score.skipped)} of {score.task}, the first: {score.skipped[0]}"
                )
            scores.append(replace(score, half=benchmark.tasks[score.task]))
    return scores


def benchmark_tasks(benchmark: Benchmark, progress: bool = True) -> list[LabelledTask]:
    """The labelled audio of a benchmark, generated once and cached.

    Raises:
        DataError: the audio would differ from the frozen one, or cannot be cached.
    """
    check_world(benchmark)
    return soundworld_tasks(
        list(benchmark.tasks), benchmark.train, benchmark.test, benchmark.world_seed, progress=progress
    )


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


def read_benchmark_result(path: str | os.PathLike[str], benchmark: Benchmark = SOUNDWORLD_2) -> Result:
    """Read the result of a frozen benchmark.

    Raises:
        DataError: the file cannot be read, or its scores were not made by the benchmark's protocol; the message names
            the file, what differs and the command that writes a new one.
    """
    return read_result(path, benchmark.name, lambda result: check_benchmark_result(result, benchmark))


def check_benchmark_result(result: Result, benchmark: Benchmark = SOUNDWORLD_2) -> None:
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
        if missing := [name for name in benchmark.tasks if name not in own]:
            raise DataError(f"{features} ({method}) has no score on {', '.join(missing)}")


def _check_score(benchmark: Benchmark, score: TaskScore) -> None:
    what = f"the score of {score.features} on {score.task}"
    if score.task not in benchmark.tasks:
        raise DataError(f"{what}: {benchmark.name} has no such task")
    expected = {
        "metric": ACCURACY, "domain": score.task.split("/")[0], "n_test": benchmark.test,
        "half": benchmark.tasks[score.task],
    }  # fmt: skip
    for name, value in expected.items():
        if getattr(score, name) != value:
            raise DataError(f"{what} has {name} {getattr(score, name)!r}, where {benchmark.name} has {value!r}")
    if score.method not in METHODS:
        raise DataError(f"{what} has the method {score.method!r}, but {benchmark.name} has {', '.join(METHODS)}")
    if not score.low <= score.score <= score.high:
        raise DataError(f"{what} has no interval")
    if len(score.clips) != score.n_test:
        raise DataError(f"{what} has outcomes of {len(score.clips)} clips, where {benchmark.name} has {score.n_test}")
    if abs(sum(score.clips) / score.n_test - score.score) > 1e-6:
        raise DataError(f"{what} is not the mean of the outcomes of its clips")
