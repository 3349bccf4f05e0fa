"""Probe scores as a plain-text table and as a JSON file."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bestrq2.errors import DataError
from bestrq2.evaluate.scores import ProbeScore, domain_means
from bestrq2.files import write_text

METHOD_TITLES = {"linear": "linear probe", "knn": "k-NN"}
WIDTH = 120
BEST = "*"


def format_table(scores: Sequence[ProbeScore], width: int = WIDTH) -> str:
    """Scores in percent as text: tasks in rows under their domains, kinds of features in columns, one part per method.

    The best features of each row carry an asterisk. Rows of means appear where every kind of features was probed on the
    same tasks. Features that do not fit beside each other go on below.

    Args:
        scores: of any features, tasks and methods.
        width: most characters per line.

    Returns:
        The table without a final newline; "no scores" if there are none.
    """
    if not scores:
        return "no scores"
    parts = []
    for method in dict.fromkeys(score.method for score in scores):
        chosen = [score for score in scores if score.method == method]
        rows = _rows(chosen, method)
        title = METHOD_TITLES.get(method, method)
        parts.append("\n\n".join(layout(part, title) for part in _fit_columns(rows, width)))
    notes = "\n".join(textwrap.fill(note, width) for note in _notes(scores))
    return "\n\n".join([*parts, notes])


def write_scores(path: str | Path, scores: Sequence[ProbeScore]) -> None:
    """Write scores as JSON; the file appears whole or not at all. OSError if it cannot be written."""
    text = json.dumps({"format": 1, "scores": [score.to_dict() for score in scores]}, indent=1, allow_nan=False)
    write_text(Path(path), text + "\n")


def read_scores(path: str | Path) -> list[ProbeScore]:
    """Read what `write_scores` wrote; a DataError says what is wrong with the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as probe scores: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != 1 or not isinstance(content.get("scores"), list):
        raise DataError(f"{path} does not hold probe scores of format 1: write it with `bestrq2 probe`.")
    try:
        return [ProbeScore.from_dict(values) for values in content["scores"]]
    except (DataError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


def _rows(scores: Sequence[ProbeScore], method: str) -> list[list[str]]:
    """All rows of one method: header, then per domain its title, tasks and mean, then the mean of domains.

    A row is [label, chance, cell of every kind of features...]; a title has its label only.
    """
    features = list(dict.fromkeys(score.features for score in scores))
    cells = {(score.task, score.features): score for score in scores}
    try:
        means = {name: domain_means(scores, method, name) for name in features}
    except DataError:  # the kinds of features were not probed on the same tasks
        means = {}
    rows = [["", "chance", *features]]
    chance_means = []
    for domain in dict.fromkeys(score.domain for score in scores):
        rows.append([domain or "other"])
        chances = []
        for task in dict.fromkeys(score.task for score in scores if score.domain == domain):
            row = [cells.get((task, name)) for name in features]
            values = [None if score is None else score.score for score in row]
            texts = ["-" if score is None else _cell(score) for score in row]
            chances.append(next(score.chance for score in row if score is not None))
            label = task.removeprefix(f"{domain}/")
            rows.append([f"  {label}", _percent(chances[-1]), *_mark_best(texts, values)])
        chance_means.append(sum(chances) / len(chances))
        if means:
            rows.append(_mean_row("  mean", chance_means[-1], [means[name][domain] for name in features]))
    if means:
        chance = sum(chance_means) / len(chance_means)
        rows.append(_mean_row("mean of domains", chance, [means[name]["mean"] for name in features]))
    return rows


def _cell(score: ProbeScore) -> str:
    return f"{_percent(score.score)} [{_percent(score.low)}, {_percent(score.high)}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _mean_row(label: str, chance: float, values: list[float]) -> list[str]:
    return [label, _percent(chance), *_mark_best([_percent(value) for value in values], values)]


def _mark_best(texts: list[str], values: Sequence[float | None]) -> list[str]:
    """Put an asterisk after the highest of several values (all of a tie), a space after the others."""
    present = [value for value in values if value is not None]
    best = max(present) if len(present) > 1 else None
    return [
        text + (BEST if value is not None and value == best else " ") for text, value in zip(texts, values, strict=True)
    ]


def _fit_columns(rows: list[list[str]], width: int) -> list[list[list[str]]]:
    """Split the feature columns into groups that fit `width`, each with the label and chance columns in front."""
    fixed = max(len(row[0]) for row in rows) + 2 + len("chance")
    count = len(rows[0]) - 2
    widths = [2 + max(len(row[2 + column]) for row in rows if len(row) > 1) for column in range(count)]
    groups: list[list[int]] = [[]]
    for column in range(count):
        if groups[-1] and fixed + sum(widths[index] for index in groups[-1]) + widths[column] > width:
            groups.append([])
        groups[-1].append(column)
    return [[row[:2] + [row[2 + column] for column in group if len(row) > 1] for row in rows] for group in groups]


def layout(rows: list[list[str]], title: str) -> str:
    """Cells in columns, a rule below the header; a row of one cell runs across.

    Args:
        rows: the header first; its first cell is replaced.
        title: first cell of the header.
    """
    rows = [[title, *rows[0][1:]], *rows[1:]]
    label_width = max(len(row[0]) for row in rows)
    widths = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(1, len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(size) for cell, size in zip(row[1:], widths, strict=False)]
        lines.append("  ".join([row[0].ljust(label_width), *cells]).rstrip())
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([lines[0], rule, *lines[1:]])


def _notes(scores: Sequence[ProbeScore]) -> list[str]:
    metrics = dict.fromkeys(score.metric for score in scores)
    frame_tasks = list(dict.fromkeys(score.task for score in scores if score.metric != "accuracy"))
    notes = [f"Percent [95 % interval]. {BEST} best of its row."]
    if "accuracy" in metrics:
        notes[0] += " Chance: always the most frequent training class."
    if frame_tasks:
        notes.append(f"Balanced accuracy over frames, chance 1/classes: {', '.join(frame_tasks)}.")
    skipped = {(score.features, score.task): len(score.skipped) for score in scores if score.skipped}
    if skipped:
        counts = (f"{count} of {task} ({features})" for (features, task), count in skipped.items())
        notes.append(f"Clips skipped because their audio was rejected: {', '.join(counts)}.")
    return notes
