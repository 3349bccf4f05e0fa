"""Tables and domain means of probe scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from bestrq2.errors import DataError
from bestrq2.evaluate.metrics import ACCURACY, BALANCED_ACCURACY
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.table import MARK, WIDTH, Table, mark_best, percent

METHOD_TITLES = {"linear": "linear probe", "knn": "k-NN"}


def format_scores(scores: Sequence[TaskScore], width: int = WIDTH) -> str:
    """Format scores as text: one table per method, then notes.

    Args:
        scores: scores of any features, tasks and methods.
        width: longest line in characters.

    Returns:
        Text without a final newline; "no scores" if there are none.
    """
    if not scores:
        return "no scores"
    tables = (table.text(width) for table in score_tables(scores))
    return "\n\n".join([*tables, "\n".join(textwrap.fill(note, width) for note in score_notes(scores))])


def score_tables(scores: Sequence[TaskScore]) -> list[Table]:
    """One table per method: tasks in rows under their domains, kinds of features in columns.

    The best features of each row are marked by an asterisk. Rows of means appear only where every kind of features was
    probed on the same tasks.
    """
    methods = dict.fromkeys(score.method for score in scores)
    return [_method_table([score for score in scores if score.method == method], method) for method in methods]


def score_notes(scores: Sequence[TaskScore]) -> list[str]:
    """Sentences on the metrics, on chance, and on skipped clips."""
    metrics = dict.fromkeys(score.metric for score in scores)
    notes = [f"Percent [95 % interval]. {MARK} best of its row."]
    if ACCURACY in metrics:
        notes[0] += " Chance: always the most frequent training class."
    if BALANCED_ACCURACY in metrics:
        tasks = dict.fromkeys(score.task for score in scores if score.metric == BALANCED_ACCURACY)
        notes.append(f"Balanced accuracy, chance 1/classes: {', '.join(tasks)}.")
    skipped = {(score.features, score.task): len(score.skipped) for score in scores if score.skipped}
    if skipped:
        counts = (f"{count} of {task} ({features})" for (features, task), count in skipped.items())
        notes.append(f"Clips skipped because their audio was rejected: {', '.join(counts)}.")
    return notes


def domain_means(scores: Sequence[TaskScore], method: str, features: str | None = None) -> dict[str, float]:
    """Mean score of every domain and, under "mean", the mean over domains.

    Args:
        scores: all scores that are compared with each other; those of other methods are ignored.
        method: "linear" or "knn".
        features: name of the features; may be left out where `scores` holds one kind only.

    Returns:
        {domain: mean over its tasks, ..., "mean": mean over the domains}, domains in order of appearance.

    Raises:
        DataError: the kinds of features compared were not all probed on the same tasks, or `features` is missing.
    """
    chosen = [score for score in scores if score.method == method]
    _require_same_tasks(chosen)
    names = list(dict.fromkeys(score.features for score in chosen))
    if features is None and len(names) == 1:
        features = names[0]
    if features not in names:
        raise DataError(f"Means need one of the features {names} scored by {method!r}, but got {features!r}.")
    by_domain: dict[str, list[float]] = {}
    for score in chosen:
        if score.features == features:
            by_domain.setdefault(score.domain, []).append(score.score)
    means = {domain: float(np.mean(values)) for domain, values in by_domain.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}


def all_means(scores: Sequence[TaskScore]) -> dict[str, dict[str, dict[str, float]]]:
    """{features: {method: `domain_means`}}, in order of appearance; empty where the tasks differ."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for features, method in dict.fromkeys((score.features, score.method) for score in scores):
            means.setdefault(features, {})[method] = domain_means(scores, method, features)
    except DataError:
        return {}
    return means


def _require_same_tasks(scores: Sequence[TaskScore]) -> None:
    """Raise a DataError unless every kind of features was probed on the same tasks, once each."""
    tasks: dict[str, list[tuple[str, str]]] = {}
    for score in scores:
        tasks.setdefault(score.features, []).append((score.domain, score.task))
    every = {key for keys in tasks.values() for key in keys}
    for features, keys in tasks.items():
        missing = sorted(task for _, task in every - set(keys))
        if missing:
            raise DataError(f"{features} has no score on {', '.join(missing)}: means would compare different tasks.")
        if len(keys) != len(set(keys)):
            raise DataError(f"{features} has several scores on one task: give each kind of features its own name.")


def _method_table(scores: Sequence[TaskScore], method: str) -> Table:
    features = list(dict.fromkeys(score.features for score in scores))
    cells = {(score.task, score.features): score for score in scores}
    means = {name: by_method[method] for name, by_method in all_means(scores).items()}
    rows: list[tuple[str, ...]] = []
    chance_means = []
    for domain in dict.fromkeys(score.domain for score in scores):
        rows.append((domain or "other",))
        chances = []
        for task in dict.fromkeys(score.task for score in scores if score.domain == domain):
            row = [cells.get((task, name)) for name in features]
            texts = ["-" if score is None else _cell(score) for score in row]
            chances.append(next(score.chance for score in row if score is not None))
            marked = mark_best(texts, [None if score is None else score.score for score in row])
            rows.append((f"  {task.removeprefix(f'{domain}/')}", percent(chances[-1]), *marked))
        chance_means.append(sum(chances) / len(chances))
        if means:
            rows.append(_mean_row("  mean", chance_means[-1], [means[name][domain] for name in features]))
    if means:
        chance = sum(chance_means) / len(chance_means)
        rows.append(_mean_row("mean of domains", chance, [means[name]["mean"] for name in features]))
    header = ("", "chance", *(f"{name} " for name in features))
    return Table(header, tuple(rows), METHOD_TITLES.get(method, method), fixed=2)


def _cell(score: TaskScore) -> str:
    return f"{percent(score.score)} [{percent(score.low)}, {percent(score.high)}]"


def _mean_row(label: str, chance: float, values: list[float]) -> tuple[str, ...]:
    return (label, percent(chance), *mark_best([percent(value) for value in values], values))
