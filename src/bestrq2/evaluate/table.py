"""Tables of results as text, Markdown, CSV and HTML."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bestrq2.text import csv_line

WIDTH = 120
"""Default line width of text tables, in characters."""
LABEL_WIDTH = 56
"""Longest label of a row in text tables, in characters; longer ones are wrapped."""
MARK = "*"
"""Follows the best value of a row."""

_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Cells in rows and columns, already formatted as text.

    The last cell of a row that is shorter than the header spans the remaining columns: one cell makes a heading, two
    cells make a label and a sentence.

    Attributes:
        header: titles of the columns.
        rows: cells; leading spaces of a row's first cell indent it.
        title: what the table shows; in text it takes the place of an empty first title of `header`.
        fixed: number of leading columns that identify a row; they are repeated where a text table is split.
        left: number of leading columns aligned to the left; numbers are aligned to the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    fixed: int = 1
    left: int = 1

    def text(self, width: int | None = WIDTH) -> str:
        """Format for a terminal: aligned columns and a rule below the header.

        Args:
            width: longest line in characters; columns that do not fit continue below, beside the `fixed` ones. None for
                any length.

        Returns:
            Lines without a final newline.
        """
        header = (self.header[0] or self.title, *self.header[1:])
        rows = [header, *(line for row in self.rows for line in _wrapped_label(row))]
        widths = [self._column_width(rows, column) for column in range(len(header))]
        return "\n\n".join(self._aligned(rows, widths, columns) for columns in self._split(widths, width))

    def markdown(self) -> str:
        """Format as a pipe table, without a heading."""
        rule = [":---" if column < self.left else "---:" for column in range(len(self.header))]
        rows = [self._padded(row) for row in (self.header, *self.rows)]
        escaped = [[cell.strip().replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])

    def csv(self) -> str:
        """Format as CSV, header first; spanning cells are followed by empty ones."""
        rows = (self.header, *self.rows)
        return "".join(csv_line(cell.strip() for cell in self._padded(row)) for row in rows)

    def html(self, classes: str = "") -> str:
        """Format as an HTML table element; all text is escaped.

        Args:
            classes: value of its class attribute. Cells aligned to the right have the class "number", rows of one cell
                the class "heading".
        """
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        head = "".join(
            f'<th scope="col"{self._class(column)}>{html.escape(cell)}</th>' for column, cell in enumerate(self.header)
        )
        body = "\n".join(self._html_row(row) for row in self.rows)
        opening = f'<table class="{html.escape(classes)}">' if classes else "<table>"
        return f"{opening}{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"

    def _html_row(self, row: Sequence[str]) -> str:
        if len(row) == 1:
            span = len(self.header)
            return f'<tr class="heading"><th scope="rowgroup" colspan="{span}">{html.escape(row[0].strip())}</th></tr>'
        cells = [f'<th scope="row">{html.escape(row[0].strip())}</th>']
        for column, cell in enumerate(row[1:], start=1):
            spanned = len(self.header) - column
            is_spanning = column == len(row) - 1 and spanned > 1
            attributes = f' colspan="{spanned}"' if is_spanning else self._class(column)
            cells.append(f"<td{attributes}>{html.escape(cell.strip())}</td>")
        return f"<tr>{''.join(cells)}</tr>"

    def _class(self, column: int) -> str:
        return "" if column < self.left else ' class="number"'

    def _padded(self, row: Sequence[str]) -> list[str]:
        return [*row, *[""] * (len(self.header) - len(row))]

    def _column_width(self, rows: Sequence[Sequence[str]], column: int) -> int:
        """Width of the cells of a column that do not span others; labels always count."""
        whole = [row for row in rows if len(row) == len(self.header) or (column == 0 and len(row) > 0)]
        return max(len(row[column]) for row in whole)

    def _split(self, widths: Sequence[int], width: int | None) -> list[list[int]]:
        """Groups of columns that fit side by side, each beginning with the fixed ones."""
        fixed = list(range(self.fixed))
        groups = [list(fixed)]
        for column in range(self.fixed, len(widths)):
            taken = sum(widths[one] + len(_GAP) for one in groups[-1])
            if width is not None and len(groups[-1]) > len(fixed) and taken + widths[column] > width:
                groups.append(list(fixed))
            groups[-1].append(column)
        return groups

    def _aligned(self, rows: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[int]) -> str:
        lines = []
        for row in rows:
            cells = [row[column] for column in columns] if len(row) == len(widths) else list(row)
            parts = []
            for place, cell in enumerate(cells):
                column = columns[place]
                is_spanning = len(row) < len(widths) and place == len(row) - 1
                left = is_spanning or column < self.left
                parts.append(cell.ljust(widths[column]) if left else cell.rjust(widths[column]))
            lines.append(_GAP.join(parts).rstrip())
        length = sum(widths[column] for column in columns) + len(_GAP) * (len(columns) - 1)
        return "\n".join([lines[0], "-" * length, *lines[1:]])


def parts_text(parts: Iterable[Table | str], width: int = WIDTH) -> str:
    """Tables and sentences for a terminal, between empty lines."""
    return "\n\n".join(part.text(width) if isinstance(part, Table) else part for part in parts)


def parts_html(parts: Iterable[Table | str]) -> str:
    """Tables and sentences as HTML elements, for a notebook."""
    elements = (part.html() if isinstance(part, Table) else f"<p>{html.escape(part)}</p>" for part in parts)
    return "\n".join(elements)


def percent(share: float, digits: int = 1) -> str:
    """Format a share in percent, "-" for NaN."""
    return "-" if share != share else f"{100 * share:.{digits}f}"


def mark_best(cells: Sequence[str], values: Iterable[float | None]) -> list[str]:
    """Append an asterisk to the cell of the highest value (all of a tie), and a space to the others.

    Args:
        cells: formatted values.
        values: the numbers behind them; None and NaN for none. A single number is not marked.
    """
    numbers = [None if value is None or value != value else value for value in values]
    known = [number for number in numbers if number is not None]
    best = max(known) if len(known) > 1 else None
    return [
        cell + (MARK if best is not None and number == best else " ")
        for cell, number in zip(cells, numbers, strict=True)
    ]


def _wrapped_label(row: Sequence[str]) -> list[tuple[str, ...]]:
    """A row whose label fits: the first lines of a longer label come before it."""
    if len(row) == 1 or len(row[0]) <= LABEL_WIDTH:
        return [tuple(row)]
    *above, last = textwrap.wrap(row[0], LABEL_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [*((line,) for line in above), (last, *row[1:])]
