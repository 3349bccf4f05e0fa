"""Results of models whose every score was published."""

from __future__ import annotations

from collections.abc import Collection

from bestrq2.evaluate.published import published_scores
from bestrq2.evaluate.result import XARES, Result, TaskScore
from bestrq2.evaluate.xares.tasks import TASKS

VERSIONS = {"bestrq2": "0.2.0", "xares": "0.1.3", "torch": "2.13.0"}


def xares_score(task: str, method: str, score: float, metric: str = "accuracy", model: str = "mine") -> TaskScore:
    """Score of one task, which took half a minute."""
    return TaskScore(model, task, method, metric, score, seconds=30.0)


def published_result(model: str, only: Collection[str] | None = None, name: str = "") -> Result:
    """All published scores of a model, or those of some tasks."""
    scores = tuple(
        xares_score(one.task, one.method, one.percent / 100, TASKS[one.task].metric, name or model)
        for one in published_scores()
        if one.model == model and (only is None or one.task in only)
    )
    return Result(XARES, name or model, scores, {}, dict(VERSIONS))
