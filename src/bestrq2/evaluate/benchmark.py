"""Frozen benchmarks: every number that could change a score is fixed, and never changes under its name.

soundworld-2 scores any encoder on 12 generated tasks, realworld-1 on real recordings, both by the probes of
`task_probe`. Settings are chosen on one half of the tasks, and scores reported on the other. An improved protocol gets
another name.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2 import realworld, soundworld
from bestrq2.data.labels import AudioAt, LabelledClips, LabelledTask, soundworld_tasks
from bestrq2.errors import DataError
from bestrq2.evaluate.classifiers import FOLDS, REGULARISATION_GRID
from bestrq2.evaluate.metrics import ACCURACY, BALANCED_ACCURACY, RECALL
from bestrq2.evaluate.result import CHOOSE, REPORT, Result, TaskScore, check_result, read_result
from bestrq2.evaluate.task_probe import (
    METHODS,
    RETRIEVAL_METHODS,
    FeatureExtractor,
    HeldOutTask,
    probe_features,
    score_held_out,
)


@dataclass(frozen=True)
class Benchmark(ABC):
    """Protocol of a benchmark; two scores made under the same name are comparable.

    Attributes:
        name: name of the protocol.
        tasks: half of each task by its name "domain/what": `CHOOSE` or `REPORT`.
        seed: random seed of validation folds and intervals.
    """

    name: str
    tasks: dict[str, str]
    seed: int = field(default=0, kw_only=True)

    def protocol(self) -> dict[str, Any]:
        """Every frozen number except the name, as plain JSON types."""
        own = {name: value for name, value in vars(self).items() if name not in ("name", "folder")}
        return own | {"methods": list(METHODS), "regularisation": list(REGULARISATION_GRID), "folds": FOLDS}

    @abstractmethod
    def check(self) -> None:
        """Raise a DataError if the audio here would not be the frozen one."""

    @abstractmethod
    def scorer(self, progress: bool) -> Callable[[FeatureExtractor], list[TaskScore]]:
        """Load the audio, and return the function that scores features on it."""

    @abstractmethod
    def choosing_tasks(self, progress: bool) -> list[LabelledTask]:
        """The classification tasks to choose settings on."""

    @abstractmethod
    def expected(self, task: str) -> tuple[str, int, tuple[str, ...]]:
        """Metric, number of test clips and methods of a task."""


@dataclass(frozen=True)
class SoundWorldBenchmark(Benchmark):
    """Benchmark on generated sound.

    Attributes:
        train: labelled clips per task that classifiers are fitted to.
        test: clips per task that they are scored on.
        world_seed: seed of SoundWorld.
        soundworld_version: version of the generator; other versions make other audio.
        synthesiser: speech synthesiser; others have other voices.
    """

    train: int = 400
    test: int = 400
    world_seed: int = 0
    soundworld_version: str = "2"
    synthesiser: str = "espeak"

    def check(self) -> None:
        if self.soundworld_version != soundworld.VERSION:
            raise DataError(
                f"{self.name} is frozen at version {self.soundworld_version} of SoundWorld, but this is version "
                f"{soundworld.VERSION}, whose audio differs; install the release of bestrq2 that made the scores you "
                "compare with"
            )
        if self.synthesiser != soundworld.synthesiser():
            raise DataError(
                f"{self.name} needs the {self.synthesiser} synthesiser, but speech comes from the "
                f"{soundworld.synthesiser()} synthesiser here, and scores would not be comparable: "
                "pip install 'bestrq2[demo]'"
            )

    def load(self, progress: bool = True, half: str | None = None) -> list[LabelledTask]:
        """The labelled audio of all tasks, or of a half, generated once and cached."""
        names = [name for name, own in self.tasks.items() if half in (None, own)]
        return soundworld_tasks(names, self.train, self.test, self.world_seed, progress=progress)

    def choosing_tasks(self, progress: bool) -> list[LabelledTask]:
        return self.load(progress, CHOOSE)

    def scorer(self, progress: bool) -> Callable[[FeatureExtractor], list[TaskScore]]:
        tasks = self.load(progress)
        return lambda features: probe_features(features, tasks, seed=self.seed, progress=progress)

    def expected(self, task: str) -> tuple[str, int, tuple[str, ...]]:
        return ACCURACY, self.test, METHODS


@dataclass(frozen=True)
class RealWorldBenchmark(Benchmark):
    """Benchmark on real recordings, whose probes are tested on groups that they were not fitted to.

    Attributes:
        manifest: checksum of the recordings, labels and folds.
        folder: folder that `bestrq2 realworld` wrote; None for the last one.
    """

    manifest: str
    folder: Path | None = None

    def check(self) -> None:
        self._files()

    def _files(self) -> dict[int, Path]:
        return realworld.places(self.folder or realworld.find_folder(), realworld.load_manifest())

    def _corpus(self) -> tuple[list[Path], list[HeldOutTask]]:
        """Files of all recordings, and the tasks, which refer to their places."""
        manifest, files = realworld.load_manifest(), self._files()
        rows_of = {name: rows for name, rows in manifest.tasks.items() if name in self.tasks}
        tested = {number for rows in rows_of.values() for number in rows.recordings.tolist()}
        # clips of a batch are padded to the longest
        numbers = sorted(tested, key=lambda number: manifest.recordings[number].seconds)
        place = {number: place for place, number in enumerate(numbers)}
        tasks = [
            HeldOutTask(
                name,
                np.array([place[number] for number in rows.recordings.tolist()]),
                np.unique(rows.labels, return_inverse=True)[1],
                np.unique(rows.groups, return_inverse=True)[1],
                rows.fold,
                realworld.TASKS[name].retrieval,
            )
            for name, rows in rows_of.items()
        ]
        return [files[number] for number in numbers], tasks

    def scorer(self, progress: bool) -> Callable[[FeatureExtractor], list[TaskScore]]:
        audio, tasks = self._corpus()
        return lambda features: score_held_out(features, audio, tasks, self.seed, progress=progress)

    def choosing_tasks(self, progress: bool) -> list[LabelledTask]:
        """The classification tasks to choose settings on; their first fold is the test split."""
        audio, every = self._corpus()
        tasks = []
        for task in every:
            if self.tasks[task.name] == CHOOSE and not task.retrieval:
                clips = LabelledClips(AudioAt(audio.__getitem__, task.clips), task.labels, groups=task.groups)
                first = task.fold == task.fold.min()
                classes = tuple(str(label) for label in np.unique(task.labels))
                train, test = (clips.part(np.flatnonzero(part)) for part in (~first, first))
                tasks.append(LabelledTask(task.name, task.domain, "clip", classes, train, test))
        return tasks

    def expected(self, task: str) -> tuple[str, int, tuple[str, ...]]:
        count = len(realworld.load_manifest().tasks[task].recordings)
        return (
            (RECALL, count, RETRIEVAL_METHODS)
            if realworld.TASKS[task].retrieval
            else (BALANCED_ACCURACY, count, METHODS)
        )


SOUNDWORLD_2 = SoundWorldBenchmark(
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


def realworld_1(folder: str | os.PathLike[str] | None = None) -> RealWorldBenchmark:
    """The benchmark on real recordings; see docs/realworld.md.

    Args:
        folder: folder that `bestrq2 realworld` wrote; None for the last one.
    """
    tasks = {name: task.half for name, task in realworld.TASKS.items()}
    place = None if folder is None else Path(folder)
    return RealWorldBenchmark(realworld.NAME, tasks, realworld.load_manifest().checksum, place)


def find_benchmark(labelled: str) -> Benchmark | None:
    """The benchmark of a name, or of a folder of real recordings; None for other labelled audio.

    Raises:
        DataError: the name is that of a benchmark that does not exist.
    """
    if labelled == SOUNDWORLD_2.name:
        return SOUNDWORLD_2
    # unlike Path.is_file, False for the long names that lists of shards can have
    if os.path.isfile(os.path.join(labelled, realworld.MARKER)):
        return realworld_1(labelled)
    if labelled == realworld.NAME:
        return realworld_1()
    if labelled.startswith(("soundworld-", "realworld-")) and not Path(labelled).exists():
        known = f"{SOUNDWORLD_2.name}, {realworld.NAME}"
        raise DataError(f"there is no benchmark {labelled!r}; the benchmarks are: {known}")
    return None


def run_benchmark(
    features: Sequence[FeatureExtractor], benchmark: Benchmark = SOUNDWORLD_2, progress: bool = True
) -> list[TaskScore]:
    """Score features on every task of a benchmark; see `probe_features` and `score_held_out`.

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
    benchmark.check()
    score_features = benchmark.scorer(progress)
    scores: list[TaskScore] = []
    for one in features:
        for score in score_features(one):
            if score.skipped:
                raise DataError(
                    f"{one.name} cannot be scored on {benchmark.name}, which counts every clip: it rejects "
                    f"{len(score.skipped)} of {score.task}, the first: {score.skipped[0]}"
                )
            scores.append(replace(score, half=benchmark.tasks[score.task]))
    return scores


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
        if missing := [name for name in benchmark.tasks if name not in own and method in benchmark.expected(name)[2]]:
            raise DataError(f"{features} ({method}) has no score on {', '.join(missing)}")


def _check_score(benchmark: Benchmark, score: TaskScore) -> None:
    what = f"the score of {score.features} on {score.task}"
    if score.task not in benchmark.tasks:
        raise DataError(f"{what}: {benchmark.name} has no such task")
    metric, clips, methods = benchmark.expected(score.task)
    half = benchmark.tasks[score.task]
    expected = {"metric": metric, "domain": score.task.split("/")[0], "n_test": clips, "half": half}
    for name, value in expected.items():
        if getattr(score, name) != value:
            raise DataError(f"{what} has {name} {getattr(score, name)!r}, where {benchmark.name} has {value!r}")
    if score.method not in methods:
        raise DataError(f"{what} has the method {score.method!r}, but {benchmark.name} has {', '.join(methods)}")
    if not score.low <= score.score <= score.high:
        raise DataError(f"{what} has no interval")
    if len(score.clips) != score.n_test:
        raise DataError(f"{what} has outcomes of {len(score.clips)} clips, where {benchmark.name} has {clips}")
    if abs(sum(score.clips) / score.n_test - score.score) > 1e-5:  # outcomes are stored with six digits
        raise DataError(f"{what} is not the mean of the outcomes of its clips")
