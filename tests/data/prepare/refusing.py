"""What prepare refuses, for tests."""

from __future__ import annotations

import pytest

from bestrq2 import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence that refuses a command line; progress may come before it."""
    capsys.readouterr()
    assert cli.run(["prepare", *map(str, arguments)]) == 2
    *progress, last = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("bestrq2 ") for line in progress)
    assert last.startswith("bestrq2 prepare: ")
    return last.removeprefix("bestrq2 prepare: ")
