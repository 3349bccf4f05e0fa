"""Fixtures of reports and comparisons."""

from __future__ import annotations

import functools
import json

import example_report
import pytest

from bestrq2.inference.cost import Cost, cost
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.report import runs
from bestrq2.report.page import ReportContents, render


@pytest.fixture(scope="session")
def contents() -> ReportContents:
    return example_report.example_contents(per_label=2)


@pytest.fixture(scope="session")
def page(contents: ReportContents) -> str:
    return render(contents)


@pytest.fixture
def steady_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the operations of an architecture once."""
    monkeypatch.setattr(runs, "cost", cost_once)


@functools.cache
def _cost(config: str) -> Cost:
    return cost(BestRQ2Config(**json.loads(config)))


def cost_once(config: BestRQ2Config) -> Cost:
    return _cost(json.dumps({name: getattr(config, name) for name in field_names()}))
