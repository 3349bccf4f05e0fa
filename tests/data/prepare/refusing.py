"""What prepare refuses, for tests."""

from __future__ import annotations

import pytest

from bestrq2 import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run(["prepare", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bestrq2 prepare: ")
    return lines[0].removeprefix("bestrq2 prepare: ")
