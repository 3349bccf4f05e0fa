"""How messages put numbers into words."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number of things: "1 clip", "2 clips", "12,000 classes"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
