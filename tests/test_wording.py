"""Numbers in messages."""

from __future__ import annotations

import pytest

from bestrq2.text import counted


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
