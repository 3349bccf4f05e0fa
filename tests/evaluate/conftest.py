"""Fixtures of benchmarks."""

from __future__ import annotations

import pytest
from toy_benchmark import SMALL, toy_tasks

from bestrq2 import soundworld
from bestrq2.data.labels import LabelledTask
from bestrq2.evaluate import benchmark
from bestrq2.evaluate.benchmark import BENCHMARKS


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[LabelledTask]:
    """soundworld-2 on three toy tasks; espeak-ng need not be installed."""
    tasks = toy_tasks()
    monkeypatch.setitem(BENCHMARKS, "soundworld-2", SMALL)
    monkeypatch.setattr(soundworld, "synthesiser", lambda: "espeak")
    monkeypatch.setattr(benchmark, "soundworld_tasks", lambda *arguments, **options: tasks)
    return tasks
