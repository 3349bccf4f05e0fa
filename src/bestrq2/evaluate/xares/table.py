"""A result of X-ARES as text for a terminal and as CSV, beside what was published."""

from __future__ import annotations

import csv
import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bestrq2.evaluate.published import AVERAGE_COLUMNS, DOMAIN_COLUMNS, published_averages, published_scores
from bestrq2.evaluate.table import WIDTH
from bestrq2.evaluate.xares.averages import AGGREGATIONS, ENTRIES_37, Averages, averages, entry_titles
from bestrq2.evaluate.xares.entries import XaresResult
from bestrq2.evaluate.xares.tasks import DOMAINS, METHODS, TASKS, PublicTask
from bestrq2.files import write_text

BENCHMARK = "X-ARES"
NO_METHOD, MISSING, FAILED = "–", "none", "failed"
LONGEST_NAME = 24
VERSIONS = ("bestrq2", "xares", "torch", "created")


def render_table(result: XaresResult, width: int = WIDTH) -> str:
    """A result as text: its tasks, both published averages beside the published rows, other tasks, what is missing.

    Args:
        result: all tasks or some.
        width: most characters per line of sentences.

    Returns:
        The table without a final newline.
    """
    parts = [f"{BENCHMARK}: {result.model}"]
    counted = [task for task in touched_tasks(result) if task.entries]
    if counted:
        parts.append(layout(_task_rows(result, counted), "linear probe / k-NN, percent"))
        shown = [one for one in result_averages(result) if one.global_mean.found]
        parts += [layout(_average_rows(result, one), one.aggregation.name) for one in shown]
    if others := [task for task in touched_tasks(result) if not task.entries]:
        parts.append(layout(_task_rows(result, others), "tasks that no average counts"))
    if own := own_tasks(result):
        header = ["", _short(result.model), "metric"]
        rows = [[name, _cell(result, name, METHODS), metric_of(result, name)] for name in own]
        parts.append(layout([header, *rows], "tasks outside of X-ARES"))
    sentences = (textwrap.fill(note, width, subsequent_indent="  ", break_on_hyphens=False) for note in notes(result))
    return "\n\n".join([*parts, "\n".join(sentences)])


def touched_tasks(result: XaresResult) -> list[PublicTask]:
    """Tasks of X-ARES that were scored or failed, in the order of `TASKS`."""
    names = {score.task for score in result.scores} | set(result.failures)
    return [task for task in TASKS.values() if task.name in names]


def own_tasks(result: XaresResult) -> list[str]:
    """Other tasks, such as SoundWorld's, that were scored or failed."""
    names = dict.fromkeys([*(score.task for score in result.scores), *result.failures])
    return [name for name in names if name not in TASKS]


def metric_of(result: XaresResult, task: str) -> str:
    """Metric of a task; "" of one of one's own that failed."""
    if task in TASKS:
        return TASKS[task].metric
    return next((score.metric for score in result.scores if score.task == task), "")


def result_averages(result: XaresResult) -> list[Averages]:
    """By every published aggregation."""
    return [averages(result.scores, aggregation) for aggregation in AGGREGATIONS]


def notes(result: XaresResult) -> list[str]:
    """What the tables rest on, what is missing of them, and why."""
    cards = averages(result.scores, ENTRIES_37)
    found, expected = cards.global_mean.found, cards.global_mean.expected
    said = []
    if touched_tasks(result):
        sources = dict.fromkeys([one.source for one in published_averages(BENCHMARK)])
        sources |= dict.fromkeys([one.source for one in published_scores()])
        said.append(f"Published: {'; '.join(sources)}. The paper counts Vocal Imitation as environment.")
    if found:
        said += [f"{row.model}: {row.note}." for row in published_averages(BENCHMARK) if row.note]
    if not found:
        said.append(f"None of the {expected} entries of the published averages was scored, so they are not shown.")
    elif cards.missing:
        said.append(
            f"{found} of {expected} entries were scored: a mean is given only where all its entries are there. "
            f"Missing: {', '.join(entry_titles(cards.missing))}."
        )
    said += [f"{TASKS[name].title if name in TASKS else name} failed: {why}" for name, why in result.failures.items()]
    times = [score.seconds for score in result.scores if score.seconds is not None]
    if times:
        said.append(f"The scores took {sum(times) / 60:.1f} min.")
    if versions := [f"{name} {result.provenance[name]}" for name in VERSIONS if result.provenance.get(name)]:
        said.append(f"Made with {', '.join(versions)}.")
    return said


def _task_rows(result: XaresResult, tasks: Sequence[PublicTask]) -> list[list[str]]:
    published = {(one.model, one.task, one.method): one.percent for one in published_scores()}
    models = list(dict.fromkeys(model for model, _, _ in published))
    rows = [["", _short(result.model), *models, "metric"]]
    for domain in DOMAINS:
        own = [task for task in tasks if task.domain == domain]
        rows += [[domain]] if own else []
        for task in own:
            cells = [
                _pair([published.get((model, task.name, method)) for method in task.methods], task.methods)
                for model in models
            ]
            rows.append([f"  {task.title}", _cell(result, task.name, task.methods), *cells, task.metric])
    return rows


def _cell(result: XaresResult, task: str, methods: Sequence[str]) -> str:
    values: dict[str, float] = {score.method: 100 * score.value for score in result.scores if score.task == task}
    found = [values.get(method) for method in methods]
    return _pair(found, methods, FAILED if task in result.failures else MISSING, len(FAILED))


def _short(name: str) -> str:
    """The end of a long name, such as of a path."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _pair(values: Sequence[float | None], methods: Sequence[str], absent: str = NO_METHOD, size: int = 5) -> str:
    """Linear probe and k-NN beside each other, numbers below each other."""
    by_method: dict[str, float | None] = dict(zip(methods, values, strict=True))
    texts = []
    for method in METHODS:
        value = by_method.get(method)
        text = NO_METHOD if method not in by_method else absent if value is None else f"{value:.1f}"
        texts.append(f"{text:>{size}}")
    return " / ".join(texts)


def _average_rows(result: XaresResult, own: Averages) -> list[list[str]]:
    counts = [f"{domain} ({mean.expected})" for domain, mean in own.domains.items()]
    rows = [["", *counts, f"global mean ({own.global_mean.expected})", "mean of means"]]
    rows.append([_short(result.model), *(mean.text for mean in own.means)])
    for row in published_averages(BENCHMARK, own.aggregation.name):
        rows.append([row.model, *(cell or NO_METHOD for cell in row.cells)])
    return rows


def to_csv(result: XaresResult) -> str:
    """A result and the published averages as one long table, values in percent.

    Columns: model, kind ("score" or "average"), name (task or aggregation), domain (of an average also "global_mean" or
    "mean_of_means"), method, metric, percent (empty where entries are missing), entries ("12 of 22"), source.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "name", "domain", "method", "metric", "percent", "entries", "source"])
    for score in result.scores:
        domain = TASKS[score.task].domain if score.task in TASKS else ""
        percent = f"{100 * score.value:.4f}"
        writer.writerow([result.model, "score", score.task, domain, score.method, score.metric, percent, "", "own"])
    columns = (*DOMAIN_COLUMNS, *AVERAGE_COLUMNS)
    for own in result_averages(result):
        name = own.aggregation.name
        for column, mean in zip(columns, own.means, strict=True):
            percent = "" if mean.value is None else f"{100 * mean.value:.4f}"
            entries = f"{mean.found} of {mean.expected}"
            writer.writerow([result.model, "average", name, column, "", "", percent, entries, "own"])
        for row in published_averages(BENCHMARK, name):
            for column, cell in zip(columns, row.cells, strict=True):
                if cell:
                    writer.writerow([row.model, "average", name, column, "", "", cell, "", row.source])
    return text.getvalue()


def write_csv(path: str | os.PathLike[str], result: XaresResult) -> None:
    """Write `to_csv`; the file appears whole or not at all. OSError if it cannot be written."""
    write_text(Path(path), to_csv(result))


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
