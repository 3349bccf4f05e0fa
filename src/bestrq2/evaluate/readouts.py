"""Choice of a readout for a task: linear probes on several, compared on validation folds of the training clips."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bestrq2.convert.numpy_front_end import pool
from bestrq2.convert.readout import choose_readout, set_readout
from bestrq2.data.labels import ClipAudio, LabelledTask
from bestrq2.errors import DataError
from bestrq2.evaluate.classifiers import LinearProbe
from bestrq2.evaluate.metrics import is_uneven
from bestrq2.evaluate.result import Result, TaskScore
from bestrq2.evaluate.table import MARK, Table, mark_best, percent
from bestrq2.evaluate.task_probe import draw_clips, embed_split, probe_features
from bestrq2.inference.embedder import Embedder, Embeddings
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.readout import Readout
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "mean+std+quarters")
MOST_TRAIN = 2000
"""Readouts are compared on at most this many training clips, drawn at random."""
# Memory of the vectors of these clips, for all readouts together.
_MOST_BYTES = 5e8
# Clips embedded at a time: their frames hold all rows of several layers.
_BATCH = 8


def candidate_readouts(config: BestRQ2Config) -> list[Readout]:
    """Readouts to compare, the default first: output and layers x frequency rows x poolings.

    The layers are those at half and two thirds of the depth, and the mean of all.
    """
    blocks = config.num_hidden_layers
    layers = dict.fromkeys(["output", str(max(1, blocks // 2)), str(max(1, round(2 * blocks / 3))), "mean"])
    frequencies = ("mean", "concat") if config.patch_rows > 1 else ("mean",)
    return [
        choose_readout(config, layer, frequency, pooling)
        for layer in layers
        for frequency in frequencies
        for pooling in POOLINGS
    ]


@dataclass(frozen=True)
class _AllReadouts:
    """Features that hold the vectors of several readouts one after the other, from one pass of the encoder."""

    embedder: Embedder
    readouts: Sequence[Readout]

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.embedder.name

    def embed(self, audio: list[ClipAudio], sampling_rate: int | None = None) -> Embeddings:
        """Embed clips: `clip` has the vectors of all readouts, `frames` no more than one value of each clip."""
        config = self.embedder.config
        layers = list(dict.fromkeys(one.layers for one in self.readouts))
        wide = self.embedder.embed(audio, sampling_rate, layers="+".join(layers), frequency="concat", pooling="mean")
        vectors = []
        for clip, mask in zip(wide.frames, wide.frame_mask, strict=True):
            states = clip[mask].reshape(-1, config.patch_rows, len(layers), config.hidden_size)
            parts = []
            for one in self.readouts:
                rows = states[:, :, layers.index(one.layers)]
                frames = rows.mean(axis=1) if one.frequency == "mean" else rows.reshape(len(rows), -1)
                parts.append(pool(frames, one.pooling))
            vectors.append(np.concatenate(parts))
        return Embeddings(np.stack(vectors), wide.frames[:, :1, :1], wide.frame_mask[:, :1], wide.timestamps[:, :1])


def validation_scores(
    embedder: Embedder, task: LabelledTask, readouts: Sequence[Readout], seed: int = 0, progress: bool = True
) -> list[float]:
    """Score of a linear probe on each readout, on validation folds of the training clips, which keep groups whole.

    It is the score that C is chosen by (see `LinearProbe`), for the best C: balanced accuracy where classes are uneven,
    else accuracy. The test clips are not used.

    Raises:
        DataError: as `embed_split`, or there are too few training clips for a validation fold.
    """
    widths = [one.clip_width(embedder.config) for one in readouts]
    most = max(2, min(MOST_TRAIN, int(_MOST_BYTES / (4 * sum(widths)))))
    drawn = replace(task, train=draw_clips(task.train, most, seed))
    rows = embed_split(_AllReadouts(embedder, readouts), drawn, "train", _BATCH, progress)
    balanced, ends = is_uneven(rows.labels), np.cumsum(widths)
    if len(np.unique(rows.labels)) < 2:
        raise DataError(f"The train split of {task.name} shows one class only: a probe needs at least two.")
    scores = []
    shown = Progress(
        f"{embedder.name}: readouts of {task.name}", len(readouts), "readouts", leave=False, shown=progress
    )
    with shown:
        for end, width in zip(ends.tolist(), widths, strict=True):
            features = rows.features[:, end - width : end]
            probe = LinearProbe(features, rows.labels, groups=rows.groups, balanced=balanced, seed=seed)
            scores.append(probe.validation_score)
            shown.advance()
            if math.isnan(probe.validation_score):
                raise DataError(
                    f"the training clips of {task.name} cannot be divided into validation folds; a readout needs more "
                    "of each class, or more groups"
                )
    return scores


def compare_readouts(
    embedder: Embedder, tasks: Sequence[LabelledTask], seed: int = 0, progress: bool = True
) -> tuple[list[TaskScore], dict[str, Any]]:
    """Choose the readout of each task on validation folds, and score it alone on the test clips.

    Args:
        embedder: the model; it is left with the readout of the last task.
        tasks: labelled clips.
        seed: random seed of folds, of the draw of training clips, and of intervals.
        progress: show progress.

    Returns:
        Score of the chosen readout by the linear probe, per task, and, for the provenance of a result, "readouts" (the
        settings of all), "validation" (their scores, by task) and "chosen" (place among them, by task and under ""
        for the mean over tasks).

    Raises:
        DataError: as `validation_scores` or `probe_features`, or no task has one class per clip.
    """
    readouts = candidate_readouts(embedder.config)
    tasks = [task for task in tasks if task.kind == "clip"]
    if not tasks:
        raise DataError("readouts are compared on tasks with one class per clip, and there is none")
    found, scores = {}, []
    for task in tasks:
        try:
            found[task.name] = validation_scores(embedder, task, readouts, seed, progress)
        except DataError as error:
            if len(tasks) == 1:
                raise
            logger.warning("left out: %s", error)
            continue
        chosen = readouts[int(np.argmax(found[task.name]))]
        set_readout(embedder.model, **chosen.settings())
        scores += probe_features(embedder, [task], ("linear",), seed, progress=progress)
    if not found:
        raise DataError("no task has training clips that a readout can be chosen on; see the warnings")
    every = found | ({"": np.mean(list(found.values()), axis=0).tolist()} if len(found) > 1 else {})
    listed = [one.settings() | {"values": one.clip_width(embedder.config)} for one in readouts]
    chosen_places = {name: int(np.argmax(own)) for name, own in every.items()}
    return scores, {"readouts": listed, "validation": found, "chosen": chosen_places}


def readout_parts(result: Result) -> list[Table | str]:
    """Table of validation scores and sentences on the chosen readouts, for `Result.parts`."""
    listed, found = result.provenance["readouts"], result.provenance["validation"]
    columns = list(found.values())
    names = list(found)
    if len(columns) > 1:
        columns, names = [*columns, np.mean(columns, axis=0).tolist()], [*names, "mean"]
    # Marks the best of each column; tables mark the best of a row.
    marked = [mark_best([percent(score) for score in column], column) for column in columns]
    rows = [
        (one["layers"], one["frequency"], one["pooling"], str(one["values"]), *(column[place] for column in marked))
        for place, one in enumerate(listed)
    ]
    header = ("layers", "frequency", "pooling", "values", *(f"{name} " for name in names))
    table = Table(header, tuple(rows), "validation scores", fixed=3, left=3)
    notes = [f"Percent on validation folds of the training clips; {MARK} best of its column. The best on test clips:"]
    for score in result.scores:
        flags = _flags(listed[result.provenance["chosen"][score.task]])
        scored = f"{percent(score.score)} [{percent(score.low)}, {percent(score.high)}], chance {percent(score.chance)}"
        notes.append(f"  {score.task}: {scored}, with {flags}")
    if "" in result.provenance["chosen"]:
        notes.append(f"Best on average: {_flags(listed[result.provenance['chosen']['']])}")
    notes.append("`bestrq2 embed`, `probe`, `xares` and `export` take these flags.")
    return [table, "\n".join(notes)]


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name} {settings[name]}" for name in ("layers", "frequency", "pooling"))
