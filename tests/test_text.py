"""Numbers and hints in messages."""

from __future__ import annotations

import pytest

from bestrq2.text import counted, nearest


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
