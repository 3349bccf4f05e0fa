"""Published results on X-ARES and XARES-LLM: averages and scores of single tasks, each with its source."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

DOMAIN_COLUMNS = ("speech", "music", "environment")
AVERAGE_COLUMNS = ("global_mean", "mean_of_means")


@dataclass(frozen=True)
class PublishedAverages:
    """Averages of one model in percent, as text with the published decimals, "" where none was published.

    Attributes:
        benchmark: "X-ARES" or "XARES-LLM".
        aggregation: set of entries, such as "37 entries"; see `bestrq2.evaluate.xares.results`.
        model: name of the model in the source.
        speech, music, environment: mean of each domain.
        global_mean: mean over all entries.
        mean_of_means: mean of the three domains.
        source: publication.
        note: remark on the figures, "" if there is none.
    """

    benchmark: str
    aggregation: str
    model: str
    speech: str
    music: str
    environment: str
    global_mean: str
    mean_of_means: str
    source: str
    note: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The five figures, domains first."""
        return tuple(getattr(self, name) for name in (*DOMAIN_COLUMNS, *AVERAGE_COLUMNS))


@dataclass(frozen=True)
class PublishedScore:
    """Score of one model on one task of X-ARES by one method, in percent."""

    model: str
    task: str
    method: str
    percent: float
    source: str


def published_averages(benchmark: str, aggregation: str | None = None) -> Sequence[PublishedAverages]:
    """Rows of published.csv of a benchmark, or of one of its aggregations, in the order of the file."""
    return [
        row
        for row in _averages()
        if row.benchmark == benchmark and (aggregation is None or row.aggregation == aggregation)
    ]


@functools.cache
def published_scores() -> Sequence[PublishedScore]:
    """All single scores of published_tasks.csv, by task, method and model."""
    return tuple(
        PublishedScore(model, row["task"], row["method"], float(percent), row["source"])
        for row in _rows("published_tasks.csv")
        for model, percent in row.items()
        if model not in ("task", "method", "source")
    )


@functools.cache
def _averages() -> tuple[PublishedAverages, ...]:
    return tuple(PublishedAverages(**row) for row in _rows("published.csv"))


def _rows(name: str) -> list[dict[str, str]]:
    text = (resources.files("bestrq2") / "evaluate" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
