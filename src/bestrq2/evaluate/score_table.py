"""Tables and domain means of probe scores."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from bestrq2.evaluate.intervals import Interval, mean_interval
from bestrq2.evaluate.metrics import ACCURACY, BALANCED_ACCURACY, RANKS, RECALL
from bestrq2.evaluate.result import CHOOSE, Result, TaskScore
from bestrq2.evaluate.table import MARK, WIDTH, Table, mark_best, parts_text, percent

METHOD_TITLES = {"linear": "linear probe", "statistics": "linear, over time", "knn": "k-NN"}
CHOOSING = "choosing tasks"
"""Name of the mean over the tasks that settings are chosen on, which the other means leave out."""

FEW_CLIPS = 50
"""Test clips below which a 95 % interval is wider than about ±14 points."""


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
    notes = "\n".join(textwrap.fill(note, width) for note in score_notes(scores))
    return parts_text([*score_tables(scores), notes], width)


def probe_parts(result: Result) -> list[Table | str]:
    """Tables and notes of a result of `bestrq2 probe`, for `Result.parts`."""
    return [*score_tables(result.scores), "\n".join(textwrap.fill(note, WIDTH) for note in score_notes(result.scores))]


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
    notes = [f"Percent [95 % interval]. {MARK} best of its row. Means are relative to chance: 0 chance, 100 all right."]
    if any(score.half == CHOOSE for score in scores):
        notes.append("Tasks marked (choose) are for choosing settings; means of domains leave them out.")
    if ACCURACY in metrics:
        notes[0] += " Chance: always the most frequent training class."
    if BALANCED_ACCURACY in metrics:
        tasks = dict.fromkeys(score.task for score in scores if score.metric == BALANCED_ACCURACY)
        notes.append(f"Balanced accuracy, chance 1/classes: {', '.join(tasks)}.")
    if RECALL in metrics:
        tasks = dict.fromkeys(score.task for score in scores if score.metric == RECALL)
        notes.append(f"Recall at {RANKS} by cosine similarity, chance {RANKS}/candidates: {', '.join(tasks)}.")
    few = {score.task: score.n_test for score in scores if 0 < score.n_test < FEW_CLIPS}
    if few:
        counts = (f"{task or 'the labels'} ({count})" for task, count in few.items())
        notes.append(f"Few test clips, so that scores hardly separate encoders: {', '.join(counts)}.")
    skipped = {(score.features, score.task): len(score.skipped) for score in scores if score.skipped}
    if skipped:
        counts = (f"{count} of {task} ({features})" for (features, task), count in skipped.items())
        notes.append(f"Clips skipped because their audio was rejected: {', '.join(counts)}.")
    return notes


def domain_means(scores: Sequence[TaskScore], method: str, features: str) -> dict[str, float]:
    """Mean score, relative to chance, of one kind of features by one method.

    Returns:
        {domain: mean over its tasks, ..., "mean": mean of domains}, without the tasks to choose on, whose mean of
        domains is under `CHOOSING` where there are any.
    """
    parts = mean_parts([score for score in scores if (score.method, score.features) == (method, features)])
    return {name: mean_of_means((one.domain, one.relative) for one in part)["mean"] for name, part in parts.items()}


def mean_parts(scores: Sequence[TaskScore]) -> dict[str, list[TaskScore]]:
    """Scores that each mean is over: every domain, "mean" and, where there are tasks to choose on, `CHOOSING`."""
    reported = [score for score in scores if score.half != CHOOSE] or list(scores)
    parts = {score.domain: [one for one in reported if one.domain == score.domain] for score in reported}
    parts["mean"] = reported
    chosen_on = [score for score in scores if score.half == CHOOSE]
    return parts | ({CHOOSING: chosen_on} if chosen_on and chosen_on != reported else {})


def mean_of_means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of each domain and, under "mean", the mean over the domains.

    Args:
        values: domain and value of every task, at least one.

    Returns:
        {domain: mean, ..., "mean": mean of the means}, domains in order of appearance.
    """
    by_domain: dict[str, list[float]] = {}
    for domain, value in values:
        by_domain.setdefault(domain, []).append(value)
    means = {domain: float(np.mean(own)) for domain, own in by_domain.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}


def all_means(scores: Sequence[TaskScore]) -> dict[str, dict[str, dict[str, float]]]:
    """{features: {method: `domain_means`}}, in order of appearance; empty where the tasks of a method differ."""
    tasks: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for score in scores:
        tasks.setdefault((score.features, score.method), []).append((score.domain, score.task))
    means: dict[str, dict[str, dict[str, float]]] = {}
    for (features, method), own in tasks.items():
        every = {task for (_, other), found in tasks.items() if other == method for task in found}
        # means over different tasks, or with one task counted twice, must not be compared
        if len(own) != len(every):
            return {}
        means.setdefault(features, {})[method] = domain_means(scores, method, features)
    return means


def _method_table(scores: Sequence[TaskScore], method: str) -> Table:
    features = list(dict.fromkeys(score.features for score in scores))
    cells = {(score.task, score.features): score for score in scores}
    # means over different tasks must not be compared, and that of one task says nothing more
    comparable = bool(all_means(scores)) and len({score.task for score in scores}) > 1
    parts = {name: mean_parts([one for one in scores if one.features == name]) for name in features}
    rows: list[tuple[str, ...]] = []
    for domain in dict.fromkeys(score.domain for score in scores):
        rows.append((domain or "other",))
        for task in dict.fromkeys(score.task for score in scores if score.domain == domain):
            row = [cells.get((task, name)) for name in features]
            texts = ["-" if score is None else _cell(score) for score in row]
            first = next(score for score in row if score is not None)
            marked = mark_best(texts, [None if score is None else score.score for score in row])
            label = f"  {task.removeprefix(f'{domain}/')}{' (choose)' if first.half == CHOOSE else ''}"
            rows.append((label, percent(first.chance), *marked))
        if comparable and domain in parts[features[0]]:
            rows.append(_mean_row("  mean", [parts[name][domain] for name in features]))
    if comparable:
        for key in ("mean", CHOOSING):
            if key in parts[features[0]]:
                label = "mean of domains" if key == "mean" else f"mean of {key}"
                rows.append(_mean_row(label, [parts[name][key] for name in features]))
    header = ("", "chance", *(f"{name} " for name in features))
    return Table(header, tuple(rows), METHOD_TITLES.get(method, method), fixed=2)


def _cell(score: TaskScore) -> str:
    return f"{percent(score.score)} [{percent(score.low)}, {percent(score.high)}]"


def _mean_row(label: str, parts: Sequence[Sequence[TaskScore]]) -> tuple[str, ...]:
    """Row of means relative to chance, with intervals over the test clips where their outcomes are known."""
    values = [mean_of_means((one.domain, one.relative) for one in part)["mean"] for part in parts]
    known = all(one.clips for part in parts for one in part)
    texts = [_interval(mean_interval([part])) for part in parts] if known else [percent(value) for value in values]
    return (label, "", *mark_best(texts, values))


def _interval(found: Interval) -> str:
    low, high = found.estimate - found.half_width, found.estimate + found.half_width
    return f"{percent(found.estimate)} [{percent(low)}, {percent(high)}]"
