"""Both published ways to average scores of X-ARES, and what a partial run lacks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bestrq2.evaluate.xares.tasks import DOMAINS, METHODS, TASKS, Domain, Method

if TYPE_CHECKING:
    from bestrq2.evaluate.xares.entries import Score

Entry = tuple[str, Method]


@dataclass(frozen=True)
class Aggregation:
    """A published way to average.

    Attributes:
        name: as in published.csv.
        entries: domain → (task, method) of every score that counts, each the same.
    """

    name: str
    entries: Mapping[Domain, tuple[Entry, ...]]

    @property
    def all_entries(self) -> tuple[Entry, ...]:
        """Of all domains."""
        return tuple(entry for entries in self.entries.values() for entry in entries)


@dataclass(frozen=True)
class Mean:
    """A mean over entries.

    Attributes:
        value: in 0..1; None unless all entries are there, for a mean over some of them is another quantity.
        found: entries that have a score.
        expected: entries that it is over.
    """

    value: float | None
    found: int
    expected: int

    @property
    def text(self) -> str:
        """In percent, or "12 of 22 entries"."""
        return f"{self.found} of {self.expected} entries" if self.value is None else f"{100 * self.value:.2f}"

    def to_dict(self) -> dict[str, float | int | None]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Averages:
    """One aggregation of one model's scores.

    Attributes:
        aggregation: which.
        domains: mean of every domain.
        global_mean: over all entries.
        mean_of_means: mean of the three domains.
        missing: entries without a score.
    """

    aggregation: Aggregation
    domains: Mapping[Domain, Mean]
    global_mean: Mean
    mean_of_means: Mean
    missing: tuple[Entry, ...]

    @property
    def means(self) -> tuple[Mean, ...]:
        """Of the domains, then the two over all."""
        return (*self.domains.values(), self.global_mean, self.mean_of_means)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; missing entries as "esc50/knn"."""
        return {
            **{domain: mean.to_dict() for domain, mean in self.domains.items()},
            "global_mean": self.global_mean.to_dict(),
            "mean_of_means": self.mean_of_means.to_dict(),
            "missing": [f"{task}/{method}" for task, method in self.missing],
        }


def _of_the_cards() -> Aggregation:
    """Every public task's linear probe and k-NN, as the model cards count."""
    return Aggregation(
        "37 entries",
        {
            domain: tuple(
                (task.name, method)
                for task in TASKS.values()
                if task.entries and task.domain == domain
                for method in task.methods
            )
            for domain in DOMAINS
        },
    )


def _of_the_paper(name: str, method: Method) -> Aggregation:
    """One method on the paper's datasets that have it, Vocal Imitation being environment."""
    return Aggregation(
        name,
        {
            domain: tuple(
                (task.name, method)
                for task in TASKS.values()
                if task.paper and task.paper_domain == domain and method in task.methods
            )
            for domain in DOMAINS
        },
    )


ENTRIES_37 = _of_the_cards()
PAPER_LINEAR = _of_the_paper("21 datasets, linear probe", "mlp")
PAPER_KNN = _of_the_paper("21 datasets, k-NN", "knn")
AGGREGATIONS = (ENTRIES_37, PAPER_LINEAR, PAPER_KNN)


def averages(scores: Sequence[Score], aggregation: Aggregation) -> Averages:
    """Average scores in a published way; scores of other tasks and methods do not count.

    Args:
        scores: of one model, one per task and method.
        aggregation: one of `AGGREGATIONS`.
    """
    values = {(score.task, score.method): score.value for score in scores}
    domains = {domain: _mean(entries, values) for domain, entries in aggregation.entries.items()}
    overall = _mean(aggregation.all_entries, values)
    of_domains = [mean.value for mean in domains.values() if mean.value is not None]
    between = fmean(of_domains) if len(of_domains) == len(domains) else None
    missing = tuple(entry for entry in aggregation.all_entries if entry not in values)
    return Averages(aggregation, domains, overall, Mean(between, overall.found, overall.expected), missing)


def _mean(entries: Sequence[Entry], values: Mapping[Entry, float]) -> Mean:
    found = [values[entry] for entry in entries if entry in values]
    value = fmean(found) if len(found) == len(entries) else None
    return Mean(value, len(found), len(entries))


def entry_titles(entries: Sequence[Entry]) -> list[str]:
    """Entries for people: "ESC-50" where all methods of a task are among them, else "ESC-50 (k-NN)"."""
    short = {"mlp": "linear", "knn": "k-NN"}
    titles = []
    for name in dict.fromkeys(name for name, _ in entries):
        methods = [method for method in METHODS if (name, method) in entries]
        whole = len(methods) == len(TASKS[name].methods)
        titles.append(TASKS[name].title if whole else f"{TASKS[name].title} ({short[methods[0]]})")
    return titles
