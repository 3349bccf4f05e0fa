"""Text of messages and tables: counts with their nouns, hints that name the nearest known word, lines of CSV."""

from __future__ import annotations

import csv
import io
import math
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


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name, such as "; did you mean 'slices'?".

    Args:
        name: the unknown name; its case, leading hyphens, and hyphens in the place of underscores do not count.
        known: the names that exist, with or without groups, such as trainer.max_steps.

    Returns:
        The hint, or "" where no known name is near. Near is one typing error per three letters, and a name that lacks a
        beginning or an end, or has one too many, such as "train" for "pretrain".
    """
    found = nearest_name(name, known)
    return "" if found is None else f"; did you mean '{found}'?"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one most likely stands for; None where none is near."""
    near = [(_distance(_plain(name), _plain(one)), abs(len(name) - len(one)), one) for one in known]
    distance, _, best = min(near, key=lambda one: one[:2], default=(math.inf, 0, ""))
    return best if distance < math.inf else None


def _plain(name: str) -> str:
    # The point in a version, as of best-rq-2.1, does not separate a group from its setting.
    return re.sub(r"\.(?=\d)", "-", name.strip().lstrip("-").lower().replace("_", "-"))


def _distance(word: str, known: str) -> float:
    """Letters to insert, delete, replace or swap with their neighbour; infinite above one per three letters."""
    if "." in word or "." in known:
        (group, _, last), (known_group, _, known_last) = word.rpartition("."), known.rpartition(".")
        # A setting may be given without its group, or with another group.
        apart = 0 if not group or last == known_last else _distance(group, known_group)
        return apart + _distance(last, known_last)
    rows = [list(range(len(known) + 1))]
    for i, letter in enumerate(word, 1):
        rows.append([i])
        for j, other in enumerate(known, 1):
            steps = [rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (letter != other)]
            if i > 1 and j > 1 and (letter, word[i - 2]) == (known[j - 2], other):
                steps.append(rows[i - 2][j - 2] + 1)
            rows[i].append(min(steps))
    distance, limit = rows[-1][-1], max(len(word) > 1, len(word) // 3)
    short, long = sorted((word, known), key=len)
    if distance > limit and len(short) > 2 and (long.startswith(short) or long.endswith(short)):
        return limit
    return distance if distance <= limit else math.inf


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
