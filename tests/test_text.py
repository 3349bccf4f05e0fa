"""Numbers and hints in messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestrq2.text import cell_text, counted, csv_cell, csv_line, nearest, nearest_name


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
    ("name", "known"),
    [
        ("slcies", "slices"),
        ("ovn", "oven"),
        ("--hepl", "--help"),
        ("Slices_Per_Cake", "slices-per-cake"),
        ("per-cake", "slices-per-cake"),
        ("slices-per-cakes-eaten", "slices-per-cake"),
        ("minutes", "oven.minutes"),
        ("cake.minutes", "oven.minutes"),
        ("ovne.minuts", "oven.minutes"),
        *((nonsense, None) for nonsense in ("colour", "hot", "oven.colour", "steps", "x", "", "-")),
    ],
)
def test_the_nearest_known_name_is_suggested_where_one_is_near(name: str, known: str | None) -> None:
    names = ["replay", "--help", "slices", "slices-per-cake", "oven.ema", "oven.minutes", "oven"]
    assert nearest_name(name, names) == known
    assert nearest(name, names) == ("" if known is None else f"; did you mean '{known}'?")


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
