"""Fixtures of comparisons."""

from __future__ import annotations

import functools
import json

import pytest

from bestrq2.inference.cost import Cost, cost
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.report.comparison import arms as arms_module
from bestrq2.report.comparison import results


@pytest.fixture
def steady_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not change with what ships, and count the operations of an architecture once."""
    monkeypatch.setattr(results, "supervised_result", lambda: None)
    monkeypatch.setattr(arms_module, "cost", cost_once)


@functools.cache
def _cost(config: str) -> Cost:
    return cost(BestRQ2Config(**json.loads(config)))


def cost_once(config: BestRQ2Config) -> Cost:
    return _cost(json.dumps({name: getattr(config, name) for name in field_names()}))
