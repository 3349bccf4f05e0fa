"""Report of a fine-tuned classifier: test scores, confused classes, wrong clips to hear, curves and settings."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bestrq2.data.sources import Source
from bestrq2.errors import AudioError
from bestrq2.evaluate.finetuned import ALL_CLASSES, ONE_CLASS, PREDICTIONS_NAME, Predictions, per_class_table
from bestrq2.evaluate.metrics import ACCURACY, BEST_BY
from bestrq2.evaluate.result import Result, TaskScore
from bestrq2.evaluate.table import Table
from bestrq2.files import write_text
from bestrq2.inference.info import architecture
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.report.charts import LineChart, Score, ScoreChart, ScoreRow, Series, series_style
from bestrq2.report.model_card import origin_of
from bestrq2.report.page import corpus_name, render_page, run_warnings
from bestrq2.report.scales import number_text
from bestrq2.report.sounds import HIGHEST_RATE, OUTLINE_POINTS, Sound, int16, playable
from bestrq2.run_records import read_settings, read_table
from bestrq2.text import counted

MOST_IN_MATRIX = 50
"""Most classes of a confusion matrix; with more, the pairs confused most often are listed."""
SOUND_BYTES, MOST_HEARD, HEARD_SECONDS = 3_000_000, 100, 60.0
"""Size and number of the clips to hear in a page, and how much of a long recording is searched for a loud part (s)."""
MOST_UNFOLDED = 12
MOST_LISTED, MOST_PAIRS, MOST_NAMED = 500, 50, 12
MODEL_COLOUR, BASELINE_COLOUR = "var(--s0)", "var(--b0)"
METRICS = {
    ACCURACY: "share of the clips that are right",
    "balanced accuracy": "the same, with equal weight for every class",
    "macro F1": "precision and recall in one number, mean over classes",
    "macro mAP": "average precision, mean over classes",
    "micro mAP": "average precision over all clips and classes together",
    "macro ROC-AUC": "how often a clip of a class ranks above others",
}


@dataclass(frozen=True)
class WrongClip:
    """A wrongly classified clip.

    Attributes:
        name: path without the folders that all clips share.
        true, predicted: (class, its probability); empty for no class.
        sound: playable cut; None where the budget of the page is used up, or it cannot be played.
    """

    name: str
    true: list[tuple[str, float]]
    predicted: list[tuple[str, float]]
    sound: Sound | None


def write_classifier_report(
    run: Path, config: BestRQ2Config, result: Result, predictions: Predictions, test: Source
) -> Path:
    """Write `report.html` into a run folder of fine-tuning.

    Args:
        run: folder with `config.yaml` and `metrics.csv`.
        config: configuration of the classifier.
        result: its test scores.
        predictions: predictions for the readable test recordings.
        test: the test recordings, by the names in `predictions`.

    Returns:
        Path of the report.

    Raises:
        BestRQ2Error: the run folder is not complete.
    """
    classes, several = tuple(result.provenance["classes"]), bool(result.provenance["multi_label"])
    wrong, unheard = wrong_clips(classes, several, predictions, test)
    origin, settings = origin_of(str(run)), read_settings(run / "config.yaml")
    unread = len(test) - len(predictions.names)
    page = render_page(
        "classifier.html.jinja",
        title=f"Classifier trained on {corpus_name(str(settings['labelled']))}",
        lead=_lead(result, predictions),
        scores=score_charts(result, predictions),
        matrix=None if several or len(classes) > MOST_IN_MATRIX else confusion(predictions),
        classes=classes,
        pairs=[] if several else confused_pairs(classes, predictions),
        ranked=_class_charts(result) if several else [],
        per_class=per_class_table(result),
        wrong=[wrong[:MOST_UNFOLDED], wrong[MOST_UNFOLDED:]],
        unheard=_listed(unheard[:MOST_LISTED]),
        unlisted=len(unheard[MOST_LISTED:]),
        test_clips=len(predictions.names),
        predictions_name=PREDICTIONS_NAME,
        outline_width=OUTLINE_POINTS,
        curves=_curves(run, int(settings["epochs"])),
        best_epoch=result.provenance["best_epoch"],
        best_by=BEST_BY[several],
        facts={"run": run.resolve().name, **origin.training, **architecture(config)},
        run=os.fspath(run),
        notes=[
            *origin.limits,
            *([f"{counted(unread, 'test recording')} could not be read; rejected.csv says why."] if unread else []),
            *run_warnings(run / "warnings.txt"),
        ],
    )
    write_text(run / "report.html", page)
    return run / "report.html"


# --- words ---


def _lead(result: Result, predictions: Predictions) -> str:
    """What the classifier does and how well, in plain words."""
    classes, several = result.provenance["classes"], result.provenance["multi_label"]
    named = ", ".join(classes[:MOST_NAMED]) + (f" and {len(classes) - MOST_NAMED} more" * (len(classes) > MOST_NAMED))
    task = f"says which of {len(classes)} classes occur in a recording" if several else (
        f"assigns a recording to one of {len(classes)} classes"
    )  # fmt: skip
    clips = f"{counted(len(predictions.names), 'test clip')}, which it was not trained on"
    score = _overall(result)[0]
    share, low, high, chance = (
        number_text(one, "percent") for one in (score.score, score.low, score.high, score.chance)
    )
    sure = f"(95\u202f% interval {low} to {high})"
    if several:
        found = (
            f"On {clips}, its average precision is {share}, as a mean over the classes {sure}; "
            f"guessing reaches {chance}."
        )
    else:
        found = (
            f"It is right for {share} of {clips} {sure}; {_baseline(score, predictions, classes)} "
            f"would be right for {chance}."
        )
    clear = "" if score.low > score.chance else " So these clips do not show that it is better than that."
    return f"This model {task}: {named}. {found}{clear}"


def _baseline(score: TaskScore, predictions: Predictions, classes: Sequence[str]) -> str:
    """Name of what needs no audio and reaches the chance level of a score."""
    if score.metric != ACCURACY:
        return "guessing"
    return f"always answering “{classes[int(predictions.targets.sum(axis=0).argmax())]}”"


def _overall(result: Result) -> list[TaskScore]:
    return [one for one in result.scores if one.domain != ONE_CLASS and one.task == ALL_CLASSES]


# --- scores ---


def score_charts(result: Result, predictions: Predictions) -> list[ScoreChart]:
    """One chart per metric: the classifier with its interval, and what needs no audio."""
    classes, charts = result.provenance["classes"], []
    for one in _overall(result):
        own = Score("test", 100 * one.score, f"{100 * one.score:.1f}", 100 * one.low, 100 * one.high)
        rows = [ScoreRow("this classifier", MODEL_COLOUR, (own,))]
        if one.chance == one.chance:  # NaN for F1
            chance = Score("baseline", 100 * one.chance, f"{100 * one.chance:.1f}")
            rows.append(ScoreRow(_baseline(one, predictions, classes), BASELINE_COLOUR, (chance,)))
        charts.append(ScoreChart(one.metric, METRICS[one.metric], tuple(rows)))
    return charts


def _class_charts(result: Result) -> list[ScoreChart]:
    """Average precision of every class, those with the lowest first; the chart has at most MOST_PAIRS of them."""
    scored = [one for one in result.scores if one.domain == ONE_CLASS and one.metric == "average precision"]
    ranked = sorted((one for one in scored if one.score == one.score), key=lambda one: one.score)
    rows = tuple(
        ScoreRow(one.task, MODEL_COLOUR, (Score("test", 100 * one.score, f"{100 * one.score:.1f}"),))
        for one in ranked[:MOST_PAIRS]
    )
    more = f" (the {MOST_PAIRS} lowest of {len(ranked)})" if len(ranked) > MOST_PAIRS else ""
    return [ScoreChart(f"average precision of every class{more}", "lowest first", rows)] if rows else []


# --- confused classes ---


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Number of clips by true and predicted class, [classes, classes]; one class per clip."""
    classes = predictions.targets.shape[1]
    cells = predictions.targets.argmax(axis=1) * classes + predictions.probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def confused_pairs(classes: Sequence[str], predictions: Predictions) -> list[tuple[str, str, int, int]]:
    """(true class, predicted class, clips, clips of the true class) of wrong predictions, the most frequent first."""
    counts = confusion(predictions)
    totals = counts.sum(axis=1)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[: min(MOST_PAIRS, np.count_nonzero(wrong))]
    places = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(classes[true], classes[found], int(wrong[true, found]), int(totals[true])) for true, found in places]


# --- wrong clips ---


def wrong_clips(
    classes: Sequence[str], several: bool, predictions: Predictions, test: Source
) -> tuple[list[WrongClip], list[WrongClip]]:
    """Wrongly classified clips, the most certain mistakes first.

    Returns:
        Those to hear, as many as the page has room for, and the others without sound.
    """
    truth = predictions.targets.astype(bool)
    guessed = predictions.probabilities >= 0.5 if several else np.eye(len(classes), dtype=bool)[
        predictions.probabilities.argmax(axis=1)
    ]  # fmt: skip
    places = np.flatnonzero((truth != guessed).any(axis=1))
    errors = np.abs(predictions.probabilities - truth) if several else predictions.probabilities
    certainty = errors[places].max(axis=1)
    shared = _shared_folders(predictions.names)
    number = {name: place for place, name in enumerate(test.names())}
    heard: list[WrongClip] = []
    others: list[WrongClip] = []
    room = SOUND_BYTES
    for place in places[np.argsort(-certainty, kind="stable")].tolist():
        name, shares = predictions.names[place], predictions.probabilities[place]
        sound = None
        if room > 0 and len(heard) < MOST_HEARD:
            sound = _sound(test, number[name], f"wrong-{place}")
            room -= len(sound.uri) if sound else 0
        true, found = (
            [(classes[one], float(shares[one])) for one in np.flatnonzero(row[place]).tolist()]
            for row in (truth, guessed)
        )
        clip = WrongClip("/".join(name.split("/")[shared:]), true, found, sound if room > 0 else None)
        (heard if clip.sound else others).append(clip)
    return heard, others


def _shared_folders(names: Sequence[str]) -> int:
    """Number of leading folders that all paths share."""
    levels = zip(*(name.split("/")[:-1] for name in names), strict=False)
    return len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))


def _sound(test: Source, place: int, name: str) -> Sound | None:
    """The loudest part of the beginning of a recording; None where that is silent or cannot be read."""
    try:
        waveform = test.segment(place, 0, int(HEARD_SECONDS * HIGHEST_RATE), HIGHEST_RATE)
    except AudioError:
        return None
    return playable(waveform if waveform.dtype == np.int16 else int16(waveform), HIGHEST_RATE, name)


def _listed(clips: Sequence[WrongClip]) -> Table:
    """Wrong clips as a table."""

    def text(labels: list[tuple[str, float]]) -> str:
        return ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in labels) or "none"

    rows = tuple((clip.name, text(clip.true), text(clip.predicted)) for clip in clips)
    return Table(("clip", "true", "predicted"), rows, left=3)


# --- training ---


def _curves(run: Path, epochs: int) -> list[LineChart]:
    """Loss in training and validation, and every validation metric, by epoch."""
    logged = {
        name: (steps * (epochs / steps[-1]), values)
        for name, (steps, values) in read_table(run / "metrics.csv").items()
    }
    by_epoch = functools.partial(LineChart, x_label="epoch", pointer="epoch {}")
    (first, _), (second, _) = series_style(0), series_style(1)
    losses = [
        Series(label, colour, *logged[name], kind=kind)
        for name, label, colour, kind in (
            ("train/loss", "training", first, "mean"), ("valid/loss", "validation", second, "checks")
        )
        if name in logged
    ]  # fmt: skip
    charts = [by_epoch(title="Loss", y_label="cross-entropy (nats)", better="lower", series=losses)]
    for name in METRICS:
        if (curve := logged.get(f"valid/{name}")) is not None:
            one = Series("validation", second, *curve, kind="checks")
            title = name[:1].upper() + name[1:]
            charts.append(by_epoch(title=title, y_label="score (%)", better="higher", series=[one], unit="percent"))
    return charts
