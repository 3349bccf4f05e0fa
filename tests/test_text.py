"""Numbers and hints in messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestrq2.text import cell_text, counted, csv_cell, csv_line, nearest


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "recording", "0 recordings"),
        (1, "recording", "1 recording"),
        (2, "whole recording", "2 whole recordings"),
        (1, "class", "1 class"),
        (12_000, "class", "12,000 classes"),
    ],
)
def test_nouns_agree_with_their_number(number: int, noun: str, words: str) -> None:
    assert counted(number, noun) == words


@pytest.mark.parametrize(
    ("name", "hint"),
    [("slcies", "; did you mean 'slices'?"), ("ovn", "; did you mean 'oven'?"), ("colour", "")],
)
def test_the_nearest_known_name_is_suggested_where_one_is_similar(name: str, hint: str) -> None:
    assert nearest(name, ["slices", "oven"]) == hint


def test_a_higher_cutoff_suggests_less() -> None:
    assert nearest("ovn", ["oven"], 0.9) == ""


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        (["=1+1", "+x.wav", "-x.wav", "@eaDir/a.wav", "a=b"], "'=1+1,'+x.wav,'-x.wav,'@eaDir/a.wav,a=b\n"),
        (["-0.5", "+1e-3", "-inf", -0.5, None], "-0.5,+1e-3,-inf,-0.5,\n"),
        (["\t=1", "\r@x", "a\nb", "\x1b[31m", "x\x85\u2028"], "\\x09=1,\\x0d@x,a\\x0ab,\\x1b[31m,x\\u0085\\u2028\n"),
        (["'=x", "'tis.wav", r"a\x0a", r"C:\dir"], "''=x,'tis.wav,a\\x5cx0a,C:\\dir\n"),
    ],
)
def test_no_cell_of_a_table_is_a_formula_or_a_control_sequence(cells: list[object], line: str) -> None:
    assert csv_line(cells) == line


@given(st.text() | st.text("'=+-@\\xu0285c \n\t\x85\u2028", max_size=10))
def test_cells_give_their_text_back(text: str) -> None:
    assert cell_text(csv_cell(text)) == text
