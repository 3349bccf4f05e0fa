"""One table as text, Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
import math
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from bestrq2.evaluate.table import LABEL_WIDTH, Table, mark_best, percent
from bestrq2.text import cell_text

TABLE = Table(
    ("", "loss", "accuracy"),
    (("speech",), ("  voice", "1.25", "62.0"), ("  word", "12.5", "8.5"), ("other", "not run, see the notes")),
    "probes",
)


def test_text_aligns_numbers_to_the_right_below_a_rule():
    assert TABLE.text().splitlines() == [
        "probes   loss  accuracy",
        "-----------------------",
        "speech",
        "  voice  1.25      62.0",
        "  word   12.5       8.5",
        "other    not run, see the notes",
    ]


def test_markdown_csv_and_html_have_the_same_cells():
    assert TABLE.markdown().splitlines()[:4] == [
        "|  | loss | accuracy |", "| :--- | ---: | ---: |", "| speech |  |  |", "| voice | 1.25 | 62.0 |",
    ]  # fmt: skip
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows[0] == ["", "loss", "accuracy"]
    assert rows[2:4] == [["voice", "1.25", "62.0"], ["word", "12.5", "8.5"]]
    page = ET.fromstring(TABLE.html("scores"))
    assert (page.attrib["class"], page.findtext("caption")) == ("scores", "probes")
    cells = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    assert cells[1:] == [[cell.strip() for cell in row] for row in TABLE.rows]
    spans = [cell.attrib["colspan"] for cell in page.iter() if "colspan" in cell.attrib]
    assert spans == ["3", "2"], "a heading spans all columns, a sentence the rest"


def test_columns_that_do_not_fit_continue_below_beside_the_fixed_ones():
    header = ("", "chance", *(f"encoder {number}" for number in range(6)))
    wide = Table(header, (("speech",), ("  word", "12.5", *(f"{10 * number}.0" for number in range(6)))), fixed=2)
    parts = wide.text(width=40).split("\n\n")
    assert len(parts) == 3
    assert max(len(line) for part in parts for line in part.splitlines()) <= 40
    assert [part.splitlines()[3].split() for part in parts] == [
        ["word", "12.5", "0.0", "10.0"], ["word", "12.5", "20.0", "30.0"], ["word", "12.5", "40.0", "50.0"],
    ]  # fmt: skip
    assert "\n\n" not in wide.text(width=None)


def test_long_labels_are_wrapped():
    label = "a recipe with many settings that differ, learning rate 0.0005, width 192, codes 8192"
    lines = Table(("", "loss"), ((label, "1.0"),)).text().splitlines()
    assert " ".join(line.strip() for line in lines[2:]).replace("   ", " ").split() == [*label.split(), "1.0"]
    assert max(map(len, lines)) <= LABEL_WIDTH + 6
    assert lines[-1].endswith("1.0")


def test_the_best_of_a_row_is_marked_and_ties_all_are():
    assert mark_best(["1", "3", "3", "-"], [1, 3, 3, None]) == ["1 ", "3*", "3*", "- "]
    assert mark_best(["1", "-"], [1, math.nan]) == ["1 ", "- "], "nothing to compare with"


def test_percent_of_nan_is_a_dash():
    assert (percent(0.1234), percent(0.1234, 2), percent(math.nan)) == ("12.3", "12.34", "-")


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=4))
def test_any_text_comes_back_from_csv_and_html(rows: list[tuple[str, str]]):
    rows = [tuple("".join(char for char in cell if char.isprintable()) for cell in row) for row in rows]
    table = Table(("name", "value"), tuple(rows))
    expected = [[cell.strip() for cell in row] for row in rows]
    assert [list(map(cell_text, row)) for row in csv.reader(io.StringIO(table.csv()))][1:] == expected
    page = ET.fromstring(table.html())
    assert [["".join(cell.itertext()) for cell in row] for row in list(page.iter("tr"))[1:]] == expected
