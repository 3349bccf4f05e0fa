"""Probe of labelled tasks: embed all clips once, fit simple classifiers to training clips, score the test clips.

Tasks of one corpus have whole groups held out in turn instead of a test split, and retrieval across groups.
"""

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
    RANKS,
    RECALL,
    accuracy_with_interval,
    balanced_accuracy_with_interval,
    chance_accuracy,
    clip_outcomes,
    is_uneven,
    wilson_interval,
)
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.score_table import mean_of_means
from bestrq2.inference.embedder import Embeddings
from bestrq2.progress import Progress
from bestrq2.text import counted

logger = logging.getLogger(__name__)

METHODS = ("linear", "statistics", "knn")
RETRIEVAL_METHODS = ("statistics", "knn")
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
        DataError: no clip is usable, or an embedding is not finite.
    """
    clips: LabelledClips = task.train if split == "train" else task.test
    where = f"{split} split of {task.name}"
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
    skipped = train.skipped + test.skipped
    return [
        score_predictions(
            name, task, method, train.labels, test.labels, predicted, test.clip, skipped, seed, balanced=balanced
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
    task: LabelledTask | HeldOutTask,
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
        task: task that is scored.
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
    try:
        if balanced:
            metric, chance = BALANCED_ACCURACY, 1 / len(np.unique(truth))
            score, low, high = balanced_accuracy_with_interval(truth, predicted, clip, seed)
        else:
            metric, chance = ACCURACY, chance_accuracy(train_labels, truth)
            score, low, high = accuracy_with_interval(truth, predicted)
    except DataError as error:
        raise DataError(f"{task.name} cannot be scored. {error}") from error
    n_test = len(np.unique(clip))
    clips = tuple(clip_outcomes(truth, predicted, clip, balanced=balanced).round(6).tolist())
    return TaskScore(
        name, task.name, method, metric, score, low, high, chance, n_test, task.domain, skipped=skipped, clips=clips
    )


# --- whole groups held out in turn ---


@dataclass(frozen=True)
class HeldOutTask:
    """Labelled recordings in folds: each is tested once, by a probe that was fitted without its group.

    Attributes:
        name: "domain/what".
        clips: place of each recording in the corpus, int64 [rows].
        labels: class of each, or the item that it is a recording of, int64 [rows].
        groups: group of each, such as its speaker, int64 [rows]; a fold keeps them whole.
        fold: fold in which each is tested, int64 [rows].
        retrieval: find the recordings of the same item in the other folds, instead of classifying.
    """

    name: str
    clips: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    fold: np.ndarray
    retrieval: bool = False

    @property
    def domain(self) -> str:
        """First part of the name."""
        return self.name.split("/")[0]


def score_held_out(
    features: FeatureExtractor,
    audio: Sequence[ClipAudio],
    tasks: Sequence[HeldOutTask],
    seed: int = 0,
    progress: bool = True,
) -> list[TaskScore]:
    """Score features on tasks that share a corpus, each of whose recordings is embedded once.

    Predictions of all folds are scored together, by balanced accuracy with an interval over the recordings.

    Args:
        features: features to score.
        audio: the corpus.
        tasks: labelled parts of it.
        seed: random seed of validation folds and of the bootstrap.
        progress: show progress.

    Returns:
        One score per task and method, tasks in the given order, methods within; retrieval has no method "linear".

    Raises:
        DataError: a recording is rejected, or embeddings are not finite.
    """
    start = time.perf_counter()
    unlabelled = LabelledClips(audio, np.zeros(len(audio), np.int64))
    everything = LabelledTask("all tasks", "", "clip", (), unlabelled, unlabelled)
    rows = embed_split(features, everything, "train", progress=progress)
    if rows.skipped:
        raise DataError(f"{features.name} rejects {len(rows.skipped)} recordings, the first: {rows.skipped[0]}")
    logger.info("%s: embedded %d recordings in %.1f s", features.name, len(audio), time.perf_counter() - start)
    scores = []
    with Progress(f"{features.name}: probes", len(tasks), "tasks", leave=False, shown=progress) as shown:
        for task in tasks:
            shown.show(details=task.name)
            count = np.arange(len(task.clips))
            own = replace(rows.part(task.clips), labels=task.labels, clip=count, groups=task.groups)
            if task.retrieval:
                scores += retrieval_scores(features.name, own, task)
            else:
                scores += _classification_scores(features.name, own, task, seed)
            shown.advance()
    return scores


def _classification_scores(name: str, rows: ProbeRows, task: HeldOutTask, seed: int) -> list[TaskScore]:
    predicted = {method: np.empty_like(task.labels) for method in METHODS}
    for fold in np.unique(task.fold):
        tested = task.fold == fold
        found = predict_by(METHODS, rows.part(~tested), rows.part(tested), seed, balanced=True)
        for method, values in found.items():
            predicted[method][tested] = values
    return [
        score_predictions(name, task, method, task.labels, task.labels, values, rows.clip, seed=seed, balanced=True)
        for method, values in predicted.items()
    ]


def retrieval_scores(name: str, rows: ProbeRows, task: HeldOutTask) -> list[TaskScore]:
    """Recall at 10 of the same item among the recordings of the other folds, by cosine similarity.

    The vectors are those of the probes: time statistics for "statistics", embeddings of clips for "knn". Each group is
    standardised on its own, so that what all recordings of a speaker share does not count.

    Args:
        name: name of the features.
        rows: one row per recording.
        task: items, groups and folds of the rows.
    """
    scores = []
    for method, vectors in zip(RETRIEVAL_METHODS, (rows.statistics, rows.features), strict=True):
        assert vectors is not None
        hits, chances = np.zeros(len(vectors)), np.zeros(len(vectors))
        scaled = np.empty(vectors.shape)
        for group in np.unique(task.groups):
            own = task.groups == group
            scaled[own] = Standardiser.fit(vectors[own])(vectors[own])
        scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
        for fold in np.unique(task.fold):
            asked = task.fold == fold
            similarity = scaled[asked] @ scaled[~asked].T
            right = task.labels[asked][:, None] == task.labels[~asked]
            best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
            # rank of the most similar recording of the item; a tie counts against it
            hits[asked] = ((similarity >= best) & ~right).sum(axis=1) < RANKS
            chances[asked] = _chance(right.sum(axis=1), right.shape[1])
        low, high = wilson_interval(float(hits.sum()), len(hits))
        found, chance, clips = float(hits.mean()), float(chances.mean()), tuple(hits.tolist())
        facts = (RECALL, found, low, high, chance, len(hits), task.domain)
        scores.append(TaskScore(name, task.name, method, *facts, clips=clips))
    return scores


def _chance(right: np.ndarray, candidates: int) -> np.ndarray:
    """Probability that one of `right` recordings, int [queries], is among the first candidates in random order."""
    drawn = np.arange(min(RANKS, candidates))
    return 1 - np.prod(np.clip((candidates - right[:, None] - drawn) / (candidates - drawn), 0, 1), axis=1)


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
