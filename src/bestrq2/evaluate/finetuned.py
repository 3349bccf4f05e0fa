"""Test scores of a fine-tuned classifier: the result, its tables, and the predictions of the test recordings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.errors import DataError
from bestrq2.evaluate.metrics import class_table, metrics_with_intervals
from bestrq2.evaluate.result import FINETUNE, Result, TaskScore, read_result, write_result
from bestrq2.evaluate.table import Table, parts_text, percent
from bestrq2.files import write_text
from bestrq2.inference.classifier import label_of
from bestrq2.text import counted

RESULT_NAME, CLASSES_NAME, PREDICTIONS_NAME = "test.json", "test-classes.csv", "test-predictions.csv"
"""Names of the files in a run folder."""

ALL_CLASSES = "all classes"
"""Task of the scores over all classes; those of single classes have the class as task and the domain `ONE_CLASS`."""
ONE_CLASS = "class"

# More classes than these are not printed, only written.
_SHOWN = 20


@dataclass(frozen=True)
class Predictions:
    """Predictions for recordings.

    Attributes:
        names: names of the recordings.
        targets: 1 for the classes of each recording, else 0, [recordings, classes].
        probabilities: predictions, float [recordings, classes].
    """

    names: Sequence[str]
    targets: np.ndarray
    probabilities: np.ndarray


def finetune_result(
    model: str,
    classes: Sequence[str],
    multi_label: bool,
    best_epoch: int,
    predictions: Predictions,
    seed: int,
    provenance: dict[str, Any] | None = None,
) -> Result:
    """Score predictions for test recordings, over all classes and class by class.

    Args:
        model: name of the model.
        classes: names of the classes.
        multi_label: whether a recording may have any number of classes.
        best_epoch: epoch whose weights were kept, from 1.
        predictions: predictions for the test recordings.
        seed: random seed of the bootstrap.
        provenance: further facts, as plain JSON types.
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    count = len(targets)
    scores = [
        TaskScore(model, ALL_CLASSES, FINETUNE, one.name, one.score, one.low, one.high, one.chance, count)
        for one in metrics_with_intervals(targets, probabilities, multi_label, seed)
    ]
    for row in class_table(classes, targets, probabilities, multi_label):
        name, clips = str(row.pop("class")), int(row.pop("clips"))
        scores += [
            TaskScore(model, name, FINETUNE, metric, float(value), n_test=clips, domain=ONE_CLASS)
            for metric, value in row.items()
        ]
    facts = {"classes": list(classes), "multi_label": multi_label, "best_epoch": best_epoch, "test_clips": count}
    return Result(FINETUNE, model, tuple(scores), {}, {**(provenance or {}), **facts}, finetune_parts)


def write_finetune_result(folder: Path, result: Result, predictions: Predictions) -> None:
    """Write predictions, the table of classes and, last, the result into a run folder.

    Args:
        folder: the run folder.
        result: scores of the predictions.
        predictions: predictions for the test recordings.
    """
    classes, multi_label = tuple(result.provenance["classes"]), bool(result.provenance["multi_label"])
    header = ("path", "true", "label", *(f"p({name})" for name in classes))
    rows = [
        (name, *(label_of(row, classes, multi_label) for row in (true, found)), *(f"{value:.6g}" for value in found))
        for name, true, found in zip(predictions.names, predictions.targets, predictions.probabilities, strict=True)
    ]
    write_text(folder / PREDICTIONS_NAME, Table(header, tuple(rows)).csv())
    write_text(
        folder / CLASSES_NAME, per_class_table(result, lambda value: "" if math.isnan(value) else repr(value)).csv()
    )
    write_result(folder / RESULT_NAME, result)


def read_finetune_result(folder: Path) -> Result | None:
    """Read the result in a run folder; None where there is none that can be read."""
    try:
        result = read_result(folder / RESULT_NAME, FINETUNE)
    except DataError:
        return None
    known = result.provenance
    complete = isinstance(known.get("classes"), list) and {"multi_label", "best_epoch", "test_clips"} <= known.keys()
    return result if complete else None


def metric_table(result: Result) -> Table:
    """Scores over all classes in percent, with intervals and chance."""
    rows = [
        (one.metric, percent(one.score), f"[{percent(one.low)}, {percent(one.high)}]", percent(one.chance))
        for one in result.scores
        if one.domain != ONE_CLASS
    ]
    return Table(("test", "score", "95 % interval", "chance"), tuple(rows))


def format_finetune_result(result: Result, folder: Path | None = None) -> str:
    """Format the scores as text; see `finetune_parts`."""
    return parts_text(finetune_parts(result, folder))


def finetune_parts(result: Result, folder: Path | None = None) -> list[Table | str]:
    """Tables and sentences of a result of fine-tuning, for `Result.parts`.

    Args:
        result: result of fine-tuning.
        folder: run folder to name, where many classes are not all shown.
    """
    table = per_class_table(result)
    parts: list[Table | str] = [metric_table(result)]
    if len(table.rows) <= _SHOWN:
        parts.append(table)
    else:
        # the last column, F1 or ROC-AUC, tells which classes are weak; those without recordings come last
        weakest = sorted(table.rows, key=lambda row: math.inf if row[-1] == "-" else float(row[-1]))
        parts.append(Table(table.header, tuple(weakest[:_SHOWN])))
        file = CLASSES_NAME if folder is None else folder / CLASSES_NAME
        parts.append(f"The weakest {_SHOWN} of {len(table.rows)} classes; {file} has all.")
    clips, epoch = result.provenance["test_clips"], result.provenance["best_epoch"]
    parts.append(f"{clips} test clips, weights of epoch {epoch}, the best in validation.")
    return parts


def score_in_words(result: Result) -> str:
    """The first score over all classes, how it was found, and which weights were kept, in a line."""
    one = next(score for score in result.scores if score.domain != ONE_CLASS)
    interval = f" [{percent(one.low)}, {percent(one.high)}]" if one.low == one.low else ""
    chance = f", chance {percent(one.chance)} %" if one.chance == one.chance else ""
    return (
        f"{one.metric} {percent(one.score)} %{interval}{chance}, on {counted(one.n_test, 'test recording')}; weights "
        f"of epoch {result.provenance['best_epoch']}, the best in validation"
    )


def per_class_table(result: Result, formatted: Callable[[float], str] = percent) -> Table:
    """Scores of every class, by default in percent with "-" where there are no test recordings."""
    by_class: dict[str, list[TaskScore]] = {}
    for score in result.scores:
        if score.domain == ONE_CLASS:
            by_class.setdefault(score.task, []).append(score)
    metrics = dict.fromkeys(score.metric for scores in by_class.values() for score in scores)
    rows = [
        (name, str(scores[0].n_test), *(formatted(one.score) for one in scores)) for name, scores in by_class.items()
    ]
    return Table(("class", "clips", *metrics), tuple(rows))
