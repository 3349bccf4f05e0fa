"""Probe of labelled tasks: embed all clips once, fit simple classifiers to training clips, score the test clips."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np

from bestrq2.data.labels import ClipAudio, LabelledClips, LabelledTask
from bestrq2.errors import AudioError, DataError
from bestrq2.evaluate.classifiers import LinearProbe, Standardiser, knn_predict
from bestrq2.evaluate.metrics import (
    ACCURACY,
    BALANCED_ACCURACY,
    accuracy_with_interval,
    balanced_accuracy_with_interval,
    chance_accuracy,
    clip_outcomes,
    is_uneven,
)
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.score_table import mean_of_means
from bestrq2.inference.embedder import Embeddings
from bestrq2.progress import Progress
from bestrq2.text import counted

logger = logging.getLogger(__name__)

METHODS = ("linear", "statistics", "knn")
_Embedded: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Embedding of one clip without padding: clip [D], frames [T, D], timestamps [T] in seconds."""
MAX_TRAIN_FRAMES = 20_000
"""Frame tasks are fitted on at most this many frames, drawn at random."""


class FeatureExtractor(Protocol):
    """Interface of what can be probed: an `Embedder` or a baseline."""

    @property
    def name(self) -> str:
        """Name of the features in tables."""

    def embed(self, audio: list[ClipAudio], sampling_rate: int | None = None) -> Embeddings:
        """Embed waveforms [samples] at `sampling_rate` Hz, or files; AudioError if one of them is unusable."""


@dataclass(frozen=True)
class ProbeRows:
    """Features and labels of one split: one row per clip, or per frame for frame tasks.

    Attributes:
        features: float32 [rows, D].
        labels: int64 [rows].
        clip: place in the split of the clip that each row comes from, int64 [rows].
        groups: group of each row that validation folds keep whole, int64 [rows]: the clip's group, or the clip of a
            frame; None for independent clips.
        statistics: `time_statistics` of each clip, float32 [rows, 6D]; None for frame tasks.
        seconds: centre of the frame, float64 [rows]; NaN for clip tasks.
        skipped: clips whose audio was rejected, with the reason.
    """

    features: np.ndarray
    labels: np.ndarray
    clip: np.ndarray
    seconds: np.ndarray
    skipped: tuple[str, ...]
    groups: np.ndarray | None = None
    statistics: np.ndarray | None = None

    def part(self, rows: np.ndarray) -> ProbeRows:
        """Some of the rows, int64 [part], in this order."""
        return replace(self, **{name: one[rows] for name, one in vars(self).items() if isinstance(one, np.ndarray)})


def probe_features(
    features: FeatureExtractor,
    tasks: Sequence[LabelledTask],
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    batch: int = 32,
    progress: bool = True,
) -> list[TaskScore]:
    """Score features on every task by every method.

    A clip task is scored by accuracy with a Wilson interval, or, where its classes are uneven, by balanced accuracy
    with a bootstrap interval. A frame task asks whether an event covers the centre of each frame; it is scored by
    balanced accuracy with a bootstrap over clips. Clips whose audio is rejected are left out of both splits and listed
    in `TaskScore.skipped`.

    Args:
        features: features to probe.
        tasks: labelled audio.
        methods: any of "linear" (`LinearProbe` on the embeddings of clips, or frames), "statistics" (the same on
            `time_statistics` of the frames of each clip; not for frame tasks) and "knn" (10 nearest neighbours of the
            embeddings by cosine), all on features standardised on the training clips.
        seed: random seed of validation folds, the choice of training frames and the bootstrap.
        batch: number of clips embedded at a time.
        progress: show progress.

    Returns:
        One score per task and method, tasks in the given order, methods within.

    Raises:
        DataError: a split has no usable clip, training clips show fewer than two classes, or embeddings are not finite.
    """
    scores: list[TaskScore] = []
    for task in tasks:
        start = time.perf_counter()
        train, test = (embed_split(features, task, split, batch, progress) for split in ("train", "test"))
        embedded = time.perf_counter()
        if len(np.unique(train.labels)) < 2:
            raise DataError(f"The train split of {task.name} shows one class only: a probe needs at least two.")
        with Progress(f"{features.name}: probes of {task.name}", unit="", leave=False, shown=progress):
            scores += _scores(features.name, task, methods, seed, train, test)
        what = f"{features.name} on {task.name}: embedded {counted(len(task.train) + len(task.test), 'clip')}"
        logger.info("%s in %.1f s, probed in %.1f s", what, embedded - start, time.perf_counter() - embedded)
    return scores


def embed_split(
    features: FeatureExtractor, task: LabelledTask, split: str, batch: int = 32, progress: bool = False
) -> ProbeRows:
    """Embed the "train" or "test" clips of a task and put their labels beside them.

    Raises:
        DataError: no clip is usable, labels and audio differ in number, or an embedding is not finite.
    """
    clips: LabelledClips = task.train if split == "train" else task.test
    where = f"{split} split of {task.name}"
    if len(clips.labels) != len(clips):
        raise DataError(f"The {where} has {counted(len(clips), 'clip')} but {counted(len(clips.labels), 'label')}.")
    rows, statistics, labels, clip, seconds, skipped = [], [], [], [], [], []
    shown = Progress(f"{features.name}: {task.name} {split}", len(clips), "clips", leave=False, shown=progress)
    for place, embedded in enumerate(_embed_batches(features, clips, batch, shown)):
        if isinstance(embedded, AudioError):
            skipped.append(f"{split} clip {place}: {embedded}")
            continue
        vector, vectors, moments = embedded
        if task.kind == "clip":
            statistics.append(time_statistics(vectors))
            vectors, truth, moments = vector[None], np.asarray(clips.labels[place])[None], np.array([np.nan])
        else:
            truth = event_present(moments, clips.labels[place])
        if not np.isfinite(vectors).all():
            raise DataError(f"{features.name} gives embeddings that are not finite for clip {place} of the {where}.")
        rows.append(vectors)
        labels.append(truth)
        clip.append(np.full(len(vectors), place))
        seconds.append(moments)
    if not any(len(vectors) for vectors in rows):
        reason = f" (first: {skipped[0]})" if skipped else ""
        raise DataError(f"The {where} has no usable clip out of {len(clips)}{reason}.")
    if skipped:
        of = counted(len(clips), "clip")
        logger.warning("skipped %d of %s in the %s, the first: %s", len(skipped), of, where, skipped[0])
    places = np.concatenate(clip)
    groups = places if task.kind == "frame" else None
    if clips.groups is not None:
        groups = clips.groups[places]
    truths = np.concatenate(labels).astype(np.int64)
    over_time = np.stack(statistics) if statistics else None
    return ProbeRows(np.concatenate(rows), truths, places, np.concatenate(seconds), tuple(skipped), groups, over_time)


def time_statistics(frames: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and the means of four quarters of float [T, D] frames, [6D]; quarters may share frames.

    All kinds of features get the same statistics, so that none owes its score to knowing order in time.
    """
    count = len(frames)
    quarters = [frames[part * count // 4 : max(part * count // 4 + 1, (part + 1) * count // 4)] for part in range(4)]
    return np.concatenate([frames.mean(axis=0), frames.std(axis=0), *(quarter.mean(axis=0) for quarter in quarters)])


def event_present(timestamps: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Whether any event covers each moment, both ends included.

    Args:
        timestamps: moments in seconds, float [frames].
        events: onset and offset in seconds, float [events, 2]; may be empty.

    Returns:
        int64 [frames], 1 where an event is present.
    """
    events = np.asarray(events, dtype=np.float64).reshape(-1, 2)
    inside = (events[:, 0] <= timestamps[:, None]) & (timestamps[:, None] <= events[:, 1])
    return np.asarray(inside.any(axis=1), dtype=np.int64)


def _embed_batches(
    features: FeatureExtractor, clips: LabelledClips, batch: int, progress: Progress
) -> Iterator[_Embedded | AudioError]:
    """Yield the embedding of every clip in order, or the error that rejects it."""
    with progress:
        for first in range(0, len(clips), batch):
            places = range(first, min(first + batch, len(clips)))
            yield from _embed_batch(features, clips, places)
            progress.advance(len(places))


def _embed_batch(features: FeatureExtractor, clips: LabelledClips, places: range) -> list[_Embedded | AudioError]:
    try:
        # The lookup of a clip in a tar or dataset may fail, too.
        embeddings = features.embed([clips.audio[place] for place in places], clips.sampling_rate)
    except AudioError as error:
        if len(places) == 1:
            return [error]
        # one bad clip must not cost the others
        return [result for one in places for result in _embed_batch(features, clips, range(one, one + 1))]
    masks = embeddings.frame_mask
    return [
        (embeddings.clip[row], embeddings.frames[row][masks[row]], embeddings.timestamps[row][masks[row]])
        for row in range(len(places))
    ]


def _scores(
    name: str, task: LabelledTask, methods: Sequence[str], seed: int, train: ProbeRows, test: ProbeRows
) -> list[TaskScore]:
    frames = task.kind == "frame"
    balanced = frames or is_uneven(train.labels)
    if frames and len(train.labels) > MAX_TRAIN_FRAMES:
        kept = np.sort(np.random.default_rng(seed).choice(len(train.labels), MAX_TRAIN_FRAMES, replace=False))
        train = train.part(kept)
    predictions = predict_by(methods, train, test, seed, balanced=balanced)
    place, skipped = (task.name, task.domain), train.skipped + test.skipped
    return [
        score_predictions(
            name, place, method, train.labels, test.labels, predicted, test.clip, skipped, seed, balanced=balanced
        )
        for method, predicted in predictions.items()
    ]


def predict_by(
    methods: Sequence[str], train: ProbeRows, test: ProbeRows, seed: int = 0, *, balanced: bool
) -> dict[str, np.ndarray]:
    """Predict the classes of test rows, int64 [rows], by each method that applies; see `probe_features`.

    Args:
        methods: names of methods.
        train: rows to fit to.
        test: rows to predict.
        seed: random seed of validation folds.
        balanced: weigh all classes equally.
    """
    inputs = {"linear": (train.features, test.features)}
    if train.statistics is not None and test.statistics is not None:
        inputs["statistics"] = (train.statistics, test.statistics)
    predictions = {}
    for method in methods:
        if method == "knn":
            # a common offset, as in decibels, would make every cosine nearly 1
            standardise = Standardiser.fit(train.features)
            fitted, asked = standardise(train.features), standardise(test.features)
            predictions[method] = knn_predict(fitted, train.labels, asked, balanced=balanced)
        elif method in inputs:
            fitted, asked = inputs[method]
            probe = LinearProbe(fitted, train.labels, groups=train.groups, balanced=balanced, seed=seed)
            predictions[method] = probe.predict(asked)
    return predictions


def score_predictions(
    name: str,
    task: tuple[str, str],
    method: str,
    train_labels: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    clip: np.ndarray,
    skipped: tuple[str, ...] = (),
    seed: int = 0,
    *,
    balanced: bool,
) -> TaskScore:
    """Score predictions, with interval and chance.

    Args:
        name: name of the features.
        task: name and domain of the task.
        method: method that made the predictions.
        train_labels: int [training rows], for the chance level.
        truth: true classes, int [rows], one row per test clip, or per moment of a test clip.
        predicted: predicted classes, int [rows].
        clip: test clip of each row, int [rows].
        skipped: clips left out.
        seed: random seed of the bootstrap.
        balanced: score balanced accuracy instead of accuracy.

    Raises:
        DataError: balanced accuracy is scored, but the truth shows one class only.
    """
    task_name, domain = task
    try:
        if balanced:
            metric, chance = BALANCED_ACCURACY, 1 / len(np.unique(truth))
            score, low, high = balanced_accuracy_with_interval(truth, predicted, clip, seed)
        else:
            metric, chance = ACCURACY, chance_accuracy(train_labels, truth)
            score, low, high = accuracy_with_interval(truth, predicted)
    except DataError as error:
        raise DataError(f"{task_name} cannot be scored. {error}") from error
    n_test = len(np.unique(clip))
    clips = tuple(clip_outcomes(truth, predicted, clip, balanced=balanced).round(6).tolist())
    return TaskScore(
        name, task_name, method, metric, score, low, high, chance, n_test, domain, skipped=skipped, clips=clips
    )


# --- repeated during pretraining ---


class OnlineProbe:
    """Linear probes on a fixed subset of labelled tasks, for curves during pretraining.

    The clips are chosen once, so that scores of different steps are comparable.

    Args:
        tasks: labelled tasks.
        max_train: largest number of training clips per task, drawn at random.
        max_test: largest number of test clips per task, drawn at random.
        seed: random seed of the choice and of the probes.
        batch: number of clips embedded at a time.
    """

    def __init__(
        self, tasks: Sequence[LabelledTask], max_train: int = 200, max_test: int = 200, seed: int = 0, batch: int = 32
    ) -> None:
        self.tasks = [
            replace(task, train=draw_clips(task.train, max_train, seed), test=draw_clips(task.test, max_test, seed))
            for task in tasks
        ]
        self.seed = seed
        self.batch = batch

    def run(self, features: FeatureExtractor, first: bool = False) -> dict[str, float]:
        """Probe the features of the encoder as it is now.

        Args:
            features: features to probe.
            first: raise the error of a task that cannot be scored, as before the first training step.

        Returns:
            "probe/<task>" for every task (see `probe_features`); relative to chance, "probe/<domain>" for the mean of
            its tasks and "probe/mean" for the mean over domains. A task that cannot be scored later, e.g. because the
            encoder gives NaN, is NaN, and so are the means over it; a warning gives the reason.

        Raises:
            BestRQ2Error: a task cannot be scored although `first` is set.
        """
        results: dict[str, float] = {}
        relative: list[tuple[str, float]] = []
        for task in self.tasks:
            value = above = math.nan
            try:
                (score,) = probe_features(features, [task], methods=("linear",), seed=self.seed, batch=self.batch)
                value, above = score.score, score.relative
            except (DataError, AudioError) as error:
                if first:
                    raise
                logger.warning("online probe: %s", error)
            results[task.name] = value
            relative.append((task.domain or "other", above))
        if relative:
            results |= mean_of_means(relative)
        return {f"probe/{name}": value for name, value in results.items()}


def draw_clips(clips: LabelledClips, most: int, seed: int) -> LabelledClips:
    """At most `most` clips, drawn at random, in their original order."""
    if len(clips) <= most:
        return clips
    return clips.part(np.sort(np.random.default_rng(seed).permutation(len(clips))[:most]))
