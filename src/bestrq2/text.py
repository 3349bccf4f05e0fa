"""Text of messages and tables: counts with their nouns, operations, hints of the nearest known word, lines of CSV."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections.abc import Iterable

# Share of equal letters, of both names together, from which on one may be the other with typing errors.
_NEAR = 0.65
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


def flops_text(gflops: float) -> str:
    """Operations in the fitting unit: "1.23 PFLOPs"."""
    factor, unit = flops_unit(gflops)
    return f"{gflops / factor:.3g} {unit}"


def flops_unit(gflops: float) -> tuple[float, str]:
    """GFLOPs per unit, and the name of the largest unit of which there is at least one."""
    power = min(max(math.floor(math.log10(max(gflops, 1)) / 3), 0), 4)
    return 1000.0**power, ("GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs")[power]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name, such as "; did you mean 'slices'?", or "" where no known name is near.

    Args:
        name: the unknown name; its case, leading hyphens, and hyphens in the place of underscores do not count.
        known: the names that exist, with or without groups, such as trainer.max_steps.
    """
    found = nearest_name(name, known)
    return "" if found is None else f"; did you mean '{found}'?"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one most likely stands for; None where none is near."""
    names, word = {_plain(one): one for one in known}, _plain(name)
    found = difflib.get_close_matches(word, names, n=1, cutoff=_NEAR)
    if not found and len(word) > 1:  # it may lack its beginning, such as a group, or its end
        found = sorted((one for one in names if one.startswith(word) or one.endswith(word)), key=len)
    return names[found[0]] if found else None


def _plain(name: str) -> str:
    return name.strip().lstrip("-").lower().replace("_", "-")


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
