"""Results of models whose every score was published."""

from __future__ import annotations

from collections.abc import Collection

from bestrq2.evaluate.published import published_scores
from bestrq2.evaluate.xares.entries import TASKS, Score, XaresResult

VERSIONS = {"bestrq2": "0.2.0", "xares": "0.1.3", "torch": "2.13.0"}


def published_result(model: str, only: Collection[str] | None = None, name: str = "") -> XaresResult:
    """All published scores of a model, or those of some tasks."""
    scores = tuple(
        Score(one.task, one.method, one.percent / 100, TASKS[one.task].metric, 30.0)
        for one in published_scores()
        if one.model == model and (only is None or one.task in only)
    )
    return XaresResult(name or model, scores, {}, dict(VERSIONS))
