"""What a comparison says, as plain data."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestrq2.report.comparison.arms import Arm
from bestrq2.report.comparison.statistics import Difference, Estimate

LABEL_WIDTH = 56


@dataclass(frozen=True)
class ProbeRow:
    """One row of a probe table.

    Attributes:
        label: of the arm or the sanity row.
        kind: "arm", "chance", "log-mel statistics", "random encoder" or "supervised".
        scores: domain → share, with "mean" over the domains; empty where `missing` says why.
        missing: why there are no scores, "" where there are.
        arms: labels of the arms a random encoder's architecture belongs to.
    """

    label: str
    kind: str
    scores: dict[str, Estimate] = field(default_factory=dict)
    missing: str = ""
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Difference between two arms under one method, of shares: of the mean of means, and of every domain."""

    method: str
    ahead: str
    baseline: str
    difference: Difference
    domains: dict[str, Difference]


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; a row of two cells is a label and a sentence across the others."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """For terminals: columns aligned, a rule below the header."""
        rows = []
        for label, *cells in ((self.title, *self.header[1:]), *self.rows):
            *above, last = textwrap.wrap(label, LABEL_WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]
            rows += [*((line, "") for line in above), (last, *cells)]
        widths = [
            max((len(row[column]) for row in rows if self._whole(row) or column == 0), default=0)
            for column in range(len(self.header))
        ]
        lines = []
        for row in rows:
            cells = [cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=False)]
            rest = "  ".join(cells) if self._whole(row) else row[1]
            lines.append(f"{row[0]:<{widths[0]}}  {rest}".rstrip())
        return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])

    def markdown(self) -> str:
        """As a Markdown table under a heading."""
        columns = len(self.header)
        rows = [self.header, ("---", *["---:"] * (columns - 1)), *self.rows]
        lines = ["| " + " | ".join(_escaped([*row, *[""] * (columns - len(row))])) + " |" for row in rows]
        return "\n".join([f"## {_heading(self.title)}", "", *lines])

    def _whole(self, row: tuple[str, ...]) -> bool:
        return len(row) == len(self.header)


def _heading(title: str) -> str:
    """With a capital, but for names that have none."""
    return title if title.startswith("k-NN") else title[:1].upper() + title[1:]


def _escaped(cells: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


@dataclass(frozen=True)
class Comparison:
    """The result of `bestrq2 compare`.

    Attributes:
        arms: in the order of the runs; the first is the baseline.
        probes: method → rows: the arms, then the sanity rows; empty where no run was probed.
        pairs: every two arms of at least two probed seeds each.
        tables: as printed.
        settings: what differs between arms, for table.md; None where nothing does.
        sentences: who is ahead, what cannot be compared, health of the runs.
        numbers: what the tables show, as plain values.
        output: folder of table.md, comparison.json and the figures.
    """

    arms: list[Arm]
    probes: dict[str, list[ProbeRow]]
    pairs: list[Pair]
    tables: list[Table]
    settings: Table | None
    sentences: list[str]
    numbers: dict[str, Any]
    output: Path

    @property
    def text(self) -> str:
        """Tables and sentences for a terminal."""
        return "\n\n".join([*(table.text() for table in self.tables), "\n".join(self.sentences)])

    @property
    def markdown(self) -> str:
        """Tables, sentences and figures as one Markdown page."""
        sentences = "\n".join(f"- {sentence}" for sentence in self.sentences)
        settings = [self.settings.markdown()] if self.settings else []
        tables = [table.markdown() for table in self.tables]
        return "\n\n".join(["# Comparison", *tables, "## In words", sentences, *settings]) + "\n"

    def json(self) -> str:
        """All numbers."""
        return json.dumps(self.numbers, indent=1, allow_nan=False) + "\n"
