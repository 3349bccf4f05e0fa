"""Probes with whole groups held out in turn, and retrieval across groups, on recordings that are embedded once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bestrq2.data.labels import ClipAudio, LabelledClips, LabelledTask
from bestrq2.errors import DataError
from bestrq2.evaluate.classifiers import Standardiser
from bestrq2.evaluate.metrics import RANKS, RECALL, wilson_interval
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.task_probe import (
    METHODS,
    FeatureExtractor,
    ProbeRows,
    embed_split,
    predict_by,
    score_predictions,
)
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)

RETRIEVAL_METHODS = ("statistics", "knn")


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
            own = _labelled(rows, task)
            if task.retrieval:
                scores += retrieval_scores(features.name, own, task)
            else:
                scores += _classification_scores(features.name, own, task, seed)
            shown.advance()
    return scores


def _labelled(rows: ProbeRows, task: HeldOutTask) -> ProbeRows:
    """Rows of a task, numbered in its order."""
    part = rows.part(task.clips)
    count = np.arange(len(task.clips))
    return ProbeRows(part.features, task.labels, count, part.seconds, (), task.groups, part.statistics)


def _classification_scores(name: str, rows: ProbeRows, task: HeldOutTask, seed: int) -> list[TaskScore]:
    predicted = {method: np.empty_like(task.labels) for method in METHODS}
    for fold in np.unique(task.fold):
        tested = task.fold == fold
        found = predict_by(METHODS, rows.part(~tested), rows.part(tested), seed, balanced=True)
        for method, values in found.items():
            predicted[method][tested] = values
    place, truth = (task.name, task.domain), task.labels
    return [
        score_predictions(name, place, method, truth, truth, values, rows.clip, seed=seed, balanced=True)
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
