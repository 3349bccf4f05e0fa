"""Probe scores of arms over their seeds, beside the baselines, and the differences between arms."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.intervals import LEVEL, Interval, difference_interval, holm, mean_interval
from bestrq2.evaluate.probe import LOG_MEL, RANDOM_ENCODER
from bestrq2.evaluate.result import Result, TaskScore
from bestrq2.evaluate.score_table import domain_means, mean_parts
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.report.comparison.arms import Arm, Difference, Estimate
from bestrq2.report.runs import BENCHMARK
from bestrq2.run_records import flatten

NOT_PROBED = f"not probed: run `bestrq2 probe RUN {BENCHMARK}`"
# Shares by which the log-mel statistics, which need no training, may differ between results.
SAME = 0.002
# Model fields that do not shape the encoder that users keep.
NOT_OF_THE_ENCODER = (
    "predictor_",
    "codebook_",
    "num_codebooks",
    "quantizer_",
    "mask",
    "objective",
    "drop_path",
    "conformer_dropout",
)


@dataclass(frozen=True)
class ProbeRow:
    """One row of a table of probe scores.

    Attributes:
        label: label of the arm or the baseline.
        kind: "arm", "log-mel statistics" or "random encoder".
        scores: domain → share relative to chance, with "mean" over the domains and `CHOOSING` where there are tasks to
            choose on; empty where `missing` says why.
        missing: reason for missing scores, "" where there are scores.
    """

    label: str
    kind: str
    scores: dict[str, Estimate] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Pair:
    """Difference between two arms under one method, in shares: of the mean of means, and of every domain."""

    method: str
    arm: str
    baseline: str
    difference: Difference
    domains: dict[str, Difference]


def probe_rows(arms: Sequence[Arm]) -> dict[str, list[ProbeRow]]:
    """Rows by method: the arms, then the baselines; empty where no run was probed.

    Raises:
        DataError: the results were made with different protocols.
    """
    probed = [(str(run.folder), run.result) for arm in arms for run in arm.runs if run.result is not None]
    if not probed:
        return {}
    for folder, result in probed:
        for method in METHODS:
            if not _scores(result, result.model, method):
                raise DataError(f"{folder}: its result has no {method} scores of {result.model!r}: probe it again")
    for name, result in probed[1:]:
        _check_alike(*probed[0], name, result)
    found = [result for _, result in probed]
    return {
        method: [
            *(_row(arm.label, "arm", _of_seeds(arm, method), NOT_PROBED) for arm in arms),
            # nothing is random in them, so one result is as good as all
            _row(LOG_MEL, LOG_MEL, [scores for one in found if (scores := _scores(one, LOG_MEL, method))][:1]),
            *_random_rows(arms, method),
        ]
        for method in METHODS
    }


def pairs(arms: Sequence[Arm], rows: Mapping[str, Sequence[ProbeRow]]) -> list[Pair]:
    """Differences between every two arms of at least two probed seeds, the later arm minus the earlier one.

    Test clips are paired. Whether a difference is clear is decided after Holm's correction over all pairs of a method.
    """
    several = [arm for arm in arms if len(arm.probed) >= 2]
    found = []
    for method in rows:
        couples = list(itertools.combinations(several, 2))
        intervals = [_differences(later, earlier, method) for earlier, later in couples]
        clear = {
            part: [p < 1 - LEVEL for p in holm([one[part].p_value for one in intervals])]
            for part in (intervals[0] if intervals else ())
        }
        for place, ((earlier, later), one) in enumerate(zip(couples, intervals, strict=True)):
            domains = {part: Difference(own.estimate, own.half_width, clear[part][place]) for part, own in one.items()}
            found.append(Pair(method, later.label, earlier.label, domains.pop("mean"), domains))
    return found


def _differences(later: Arm, earlier: Arm, method: str) -> dict[str, Interval]:
    """Interval of the difference of every mean."""
    ours, theirs = ([mean_parts(scores) for scores in _of_seeds(arm, method)] for arm in (later, earlier))
    return {part: difference_interval([one[part] for one in ours], [one[part] for one in theirs]) for part in ours[0]}


def disagreeing_baselines(arms: Sequence[Arm]) -> list[str]:
    """A sentence where the log-mel statistics, in which nothing is random, score differently in two results."""
    found = [run.result for arm in arms for run in arm.runs if run.result is not None]
    for method in METHODS:
        scores = [domain_means(one.scores, method, LOG_MEL)["mean"] for one in found if _scores(one, LOG_MEL, method)]
        if scores and max(scores) - min(scores) > SAME:
            return [
                f"Log-mel statistics score {100 * min(scores):.1f} to {100 * max(scores):.1f} % in the runs' results "
                "although they involve no training: were the runs probed with different versions of the software?"
            ]
    return []


def _row(label: str, kind: str, seeds: Sequence[Sequence[TaskScore]], missing: str = "not measured") -> ProbeRow:
    """Row of the means over seeds, with intervals over clips and seeds; the reason where there are no scores."""
    if not seeds:
        return ProbeRow(label, kind, missing=missing)
    parts = [mean_parts(scores) for scores in seeds]
    scores = {}
    for name in parts[0]:
        found = mean_interval([part[name] for part in parts])
        values = tuple(mean_interval([part[name]]).estimate for part in parts)
        scores[name] = Estimate(found.estimate, found.half_width, values)
    return ProbeRow(label, kind, scores)


def _of_seeds(arm: Arm, method: str) -> list[list[TaskScore]]:
    """Scores of the model by one method, for each probed seed."""
    return [_scores(run.result, run.result.model, method) for run in arm.runs if run.result is not None]


def _scores(result: Result, features: str, method: str) -> list[TaskScore]:
    return [score for score in result.scores if (score.features, score.method) == (features, method)]


def _random_rows(arms: Sequence[Arm], method: str) -> list[ProbeRow]:
    """One row for every architecture, of the first result that has it: all have the weights of one seed."""
    by_architecture: dict[str, tuple[list[str], list[list[TaskScore]]]] = {}
    for arm in arms:
        labels, draws = by_architecture.setdefault(_architecture(arm), ([], []))
        labels.append(arm.label)
        draws += [
            scores for run in arm.probed if run.result and (scores := _scores(run.result, RANDOM_ENCODER, method))
        ]
    rows = []
    for labels, draws in by_architecture.values():
        others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        label = f"{RANDOM_ENCODER} ({labels[0]}{others})" if len(by_architecture) > 1 else RANDOM_ENCODER
        rows.append(_row(label, RANDOM_ENCODER, draws[:1]))
    return rows


def _architecture(arm: Arm) -> str:
    fields = {
        key: value
        for key, value in arm.settings.items()
        if key.startswith("model.") and not key.removeprefix("model.").startswith(NOT_OF_THE_ENCODER)
    }
    return json.dumps(fields, sort_keys=True, default=str)


def _check_alike(first: str, one: Result, second: str, other: Result) -> None:
    """Raise a DataError that names two results and the first difference in how they were made."""
    ours, theirs = _kind(one), _kind(other)
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{first} and {second} were probed in different ways: {key} is {ours.get(key)!r} in the first and "
                f"{theirs.get(key)!r} in the second; probe both with `bestrq2 probe RUN {BENCHMARK}`"
            )


def _kind(result: Result) -> dict[str, Any]:
    """Everything that must be equal in comparable results; the tasks were checked when they were read."""
    kind = {"benchmark": result.benchmark} | {key: result.provenance.get(key) for key in ("synthesiser", "soundworld")}
    return kind | flatten({"protocol": result.provenance.get("protocol", {})})
