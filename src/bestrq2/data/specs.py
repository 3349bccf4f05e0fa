"""Parsing of --data arguments: options after a name, as in `audioset.h5?exclude=silent.csv`, and lists of files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from bestrq2.errors import ConfigError, DataError
from bestrq2.files import regular_file
from bestrq2.text import cell_text, nearest, nearest_name

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
LIST_SUFFIXES = TABLE_SUFFIXES | {".txt"}


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """Split a source's name from the options after its first question mark.

    Args:
        spec: such as "hub:user/corpus?split=test&column=audio"; special characters in values are written as %XX.

    Raises:
        ConfigError: what follows the question mark is not a list of key=value.
    """
    name, mark, query = spec.partition("?")
    if not mark:
        return name, {}
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ConfigError(f"{spec}: {key or '='!r} is not an option; write ?key=value&key=value")
    # parse_qsl would read a plus sign, as in "c++.csv", as a space.
    return name, {key: unquote(value) for key, _, value in pairs}


def with_options(name: str, options: Mapping[str, str]) -> str:
    """Append options to a name; the inverse of `split_options`."""
    known = dict(parse_qsl(name.partition("?")[2]))
    pairs = "&".join(f"{key}={quote(value, safe='/')}" for key, value in options.items() if key not in known)
    return f"{name}{'&' if known else '?'}{pairs}" if pairs else name


def check_keys(where: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Check that every key is known.

    Raises:
        ConfigError: one is unknown; the nearest known key is suggested.
    """
    known = list(known)
    for key in found:
        if key not in known:
            hint = nearest(key, known) or f"; known here: {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: there is no option '{key}'{hint}")


def read_rows(
    path: Path, columns: Sequence[Sequence[str]], optional: Sequence[str] = (), blank: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Read the rows of a list file.

    Args:
        path: .txt (one path per line, as a column "path"), .csv, .tsv, or .jsonl (one object per line). UTF-8.
        columns: required columns, each as its possible names; the first one is its name in the result.
        optional: names of further columns to keep; empty if they do not exist.
        blank: names of columns that must exist but may have empty values.

    Returns:
        One dictionary per row; empty lines are skipped.

    Raises:
        DataError: not readable, no rows, or a required column or value is missing.
    """
    try:
        text = regular_file(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    rows = _parse(path, text)
    if not rows:
        raise DataError(f"{path} lists nothing; expected one recording per line.")
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
    """Resolve a path of a list; relative paths start at the list's folder."""
    return listing.parent / path


def _parse(path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [(i, {"path": line.strip()}) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        return [(i, _parse_json(path, i, line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",")
    rows = []
    try:
        for row in reader:
            cells = {str(name).strip(): cell_text(v.strip()) for name, v in row.items() if isinstance(v, str)}
            rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({error}).") from error
    if not rows and reader.fieldnames:
        raise DataError(f"{path} has a header and no rows; expected one recording per line.")
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
    near = next(filter(None, (nearest_name(name, found) for name in choices)), None)
    hint = f" (did you mean {near!r}? rename it)" if near else ""
    wanted = " or ".join(repr(name) for name in choices)
    raise DataError(f"{path} has no column {wanted}; found {', '.join(map(repr, found)) or 'none'}{hint}.")
