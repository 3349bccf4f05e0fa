"""Text of messages and tables: counts with their nouns, hints that name the nearest known word, lines of CSV."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 clip", "2 clips", "12,000 classes"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint for an unknown name, such as "; did you mean 'slices'?".

    Args:
        name: the unknown name.
        known: the names that exist.
        cutoff: least similarity of a suggestion, from 0 to 1 (the ratio of `difflib.SequenceMatcher`).

    Returns:
        The hint, or "" where no known name is similar enough.
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{found[0]}'?" if found else ""


def csv_line(cells: Iterable[object]) -> str:
    """One line of a CSV file, with its line feed."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
