"""Text of messages and tables: counts with their nouns, hints that name the nearest known word, lines of CSV."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable

# Text that spreadsheets take for a formula, or that has got apostrophes for that reason.
_FORMULA = re.compile(r"'*[=+\-@].")
# Escapes of control characters and line separators, and of a backslash that would be read as the beginning of one.
_ESCAPE = re.compile(r"\\(?:x[01][0-9a-f]|x7f|x5c|u00[89][0-9a-f]|u202[89])")
_CONTROL = re.compile(rf"[\x00-\x1f\x7f-\x9f\u2028\u2029]|(?={_ESCAPE.pattern})\\")


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
    """One line of a CSV file, with its line feed; text is written as by `csv_cell`."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(csv_cell(cell) if isinstance(cell, str) else cell for cell in cells)
    return line.getvalue()


def csv_cell(text: str) -> str:
    r"""Text of a CSV cell that no spreadsheet takes for a formula and no terminal for a command; see `cell_text`.

    Text that begins with = + - or @ gets a leading apostrophe, unless it is a number or a single character. Control
    characters are written as escapes such as \x0a.
    """
    safe = _CONTROL.sub(_escaped, text)
    return f"'{safe}" if _FORMULA.match(safe) and not _is_number(safe) else safe


def cell_text(cell: str) -> str:
    """The text that `csv_cell` made a cell of."""
    plain = _ESCAPE.sub(lambda found: chr(int(found[0][2:], 16)), cell)
    return plain[1:] if cell.startswith("'") and _FORMULA.match(cell) else plain


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
