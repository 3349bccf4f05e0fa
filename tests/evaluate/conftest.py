"""Fixtures of benchmarks."""

from __future__ import annotations

import pytest
from toy_benchmark import SMALL, toy_tasks

from bestrq2 import soundworld
from bestrq2.data.labels import LabelledTask
from bestrq2.evaluate import benchmark


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[LabelledTask]:
    """soundworld-2 on three toy tasks; espeak-ng need not be installed."""
    tasks = toy_tasks()
    monkeypatch.setattr(benchmark, "SOUNDWORLD_2", SMALL)
    monkeypatch.setattr(soundworld, "synthesiser", lambda: "espeak")
    monkeypatch.setattr(benchmark, "soundworld_tasks", lambda *arguments, **options: tasks)
    return tasks
