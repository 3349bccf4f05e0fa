"""Lists of audio as people keep them: one path a line, CSV, TSV, or JSON lines."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from bestrq2.errors import DataError

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
LIST_SUFFIXES = TABLE_SUFFIXES | {".txt"}


def read_rows(
    path: Path, columns: Sequence[Sequence[str]], optional: Sequence[str] = (), blank: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Rows of a list file.

    Args:
        path: .txt (one path a line; its only column is "path"), .csv, .tsv, or .jsonl (one object a line). UTF-8.
        columns: the needed columns, each as the names it may go by, the first being the one it gets in the result.
        optional: names of further columns to keep; empty where they do not exist.
        blank: names of columns that must exist, but whose values may be empty.

    Returns:
        One dictionary a row; empty lines are skipped.

    Raises:
        DataError: not readable, no rows, a needed column or value is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    rows = _parse(path, text)
    if not rows:
        raise DataError(f"{path} lists nothing; expected one recording a line.")
    kept = []
    names = [_present(path, list(rows[0][1]), choices) for choices in columns]
    for name in blank:
        _present(path, list(rows[0][1]), (name,))
    for line, row in rows:
        result = {name: row.get(name, "") for name in (*optional, *blank)}
        for name, choices in zip(names, columns, strict=True):
            if not row.get(name):
                raise DataError(f"{path}, line {line}: no value for {name!r}.")
            result[choices[0]] = row[name]
        kept.append(result)
    return kept


def resolved(listing: Path, path: str) -> Path:
    """A path in a list: relative ones start at the list's folder."""
    return listing.parent / path


def _parse(path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [(i, {"path": line.strip()}) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if suffix == ".jsonl":
        return [(i, _parse_json(path, i, line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if suffix == ".tsv" else ",")
    rows = []
    try:
        for row in reader:
            rows.append((reader.line_num, {str(k).strip(): v.strip() for k, v in row.items() if isinstance(v, str)}))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: is not a table ({error}).") from error
    if not rows and reader.fieldnames:
        raise DataError(f"{path} has a header and no rows; expected one recording a line.")
    return rows


def _parse_json(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: is not JSON ({error.msg}).") from error
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object such as {{"path": "a.wav"}}.')
    return {key: str(value) for key, value in row.items() if isinstance(value, str | int | float)}


def _present(path: Path, found: list[str], choices: Sequence[str]) -> str:
    for name in choices:
        if name in found:
            return name
    lowered = {name.lower(): name for name in found}
    near = [lowered[n] for c in choices for n in difflib.get_close_matches(c, lowered, n=1)]
    hint = f" (did you mean {near[0]!r}? rename it)" if near else ""
    wanted = " or ".join(repr(name) for name in choices)
    raise DataError(f"{path} has no column {wanted}; found {', '.join(map(repr, found)) or 'none'}{hint}.")
