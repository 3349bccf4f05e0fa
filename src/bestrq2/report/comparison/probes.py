"""Probe scores of arms over their seeds, beside the baselines, and the differences between arms."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.probe import LOG_MEL, RANDOM_ENCODER, SUPERVISED
from bestrq2.evaluate.result import Result
from bestrq2.evaluate.score_table import domain_means, mean_of_means
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.report import runs
from bestrq2.report.comparison.arms import Arm, Difference, Estimate, estimate, welch
from bestrq2.report.runs import BENCHMARK
from bestrq2.run_records import flatten

# Not "upper bound": with as few labels as the probes see, much pretraining gets beyond it.
SUPERVISED_ROW = "encoder trained on the labels"
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
        kind: "arm", "chance", "log-mel statistics", "random encoder" or "supervised".
        scores: domain → share, with "mean" over the domains; empty where `missing` says why.
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
        DataError: the results, or that of the supervised encoder, were made with different protocols.
    """
    probed = [(str(run.folder), run.result) for arm in arms for run in arm.runs if run.result is not None]
    if not probed:
        return {}
    for folder, result in probed:
        for method in METHODS:
            if not _has(result, result.model, method):
                raise DataError(f"{folder}: its result has no {method} scores of {result.model!r}: probe it again")
    supervised = runs.supervised_result()
    shipped = [("the supervised result of this version", supervised)] if supervised else []
    for name, result in [*probed[1:], *shipped]:
        _check_alike(*probed[0], name, result)
    found = [result for _, result in probed]
    return {
        method: [
            *(_row(arm.label, "arm", _means([run.result for run in arm.runs], method), NOT_PROBED) for arm in arms),
            _row("chance", "chance", [_chance(found[0], method)]),
            # nothing is random in these two, so one result is as good as all
            _row(LOG_MEL, LOG_MEL, _means(found, method, LOG_MEL)[:1]),
            *_random_rows(arms, method),
            _row(SUPERVISED_ROW, SUPERVISED, _means([supervised], method, SUPERVISED)),
        ]
        for method in METHODS
    }


def pairs(arms: Sequence[Arm], rows: Mapping[str, Sequence[ProbeRow]]) -> list[Pair]:
    """Differences between every two arms of at least two probed seeds, the later arm minus the earlier one."""
    found = []
    for method, of_method in rows.items():
        scores = {row.label: row.scores for row in of_method if row.kind == "arm" and row.scores}
        labels = [arm.label for arm in arms if arm.label in scores and len(scores[arm.label]["mean"].values) >= 2]
        for earlier, later in itertools.combinations(labels, 2):
            domains = {
                domain: welch(scores[later][domain].values, scores[earlier][domain].values) for domain in scores[later]
            }
            found.append(Pair(method, later, earlier, domains.pop("mean"), domains))
    return found


def disagreeing_baselines(arms: Sequence[Arm]) -> list[str]:
    """A sentence where the log-mel statistics, in which nothing is random, score differently in two results."""
    found = [run.result for arm in arms for run in arm.runs if run.result is not None]
    for method in METHODS:
        scores = [means["mean"] for means in _means(found, method, LOG_MEL)]
        if scores and max(scores) - min(scores) > SAME:
            return [
                f"Log-mel statistics score {100 * min(scores):.1f} to {100 * max(scores):.1f} % in the runs' results "
                "although they involve no training: were the runs probed with different versions of the software?"
            ]
    return []


def _row(label: str, kind: str, means: Sequence[dict[str, float]], missing: str = "not measured") -> ProbeRow:
    """Row of the means of every seed; of the reason why they are missing where there are none."""
    if not means:
        return ProbeRow(label, kind, missing=missing)
    if any(list(one) != list(means[0]) for one in means):
        raise DataError(f"scores of different domains cannot be averaged: {[list(one) for one in means]}")
    return ProbeRow(label, kind, {domain: estimate([one[domain] for one in means]) for domain in means[0]})


def _means(found: Sequence[Result | None], method: str, features: str | None = None) -> list[dict[str, float]]:
    """`domain_means` of the results that have scores of the features, by default those of the model itself."""
    return [
        domain_means(one.scores, method, features or one.model)
        for one in found
        if one is not None and _has(one, features or one.model, method)
    ]


def _random_rows(arms: Sequence[Arm], method: str) -> list[ProbeRow]:
    """One row for every architecture.

    All have the weights of one seed; where results differ, as by the input statistics of their runs, it is their mean.
    """
    by_architecture: dict[str, tuple[list[str], list[dict[str, float]]]] = {}
    for arm in arms:
        labels, draws = by_architecture.setdefault(_architecture(arm), ([], []))
        labels.append(arm.label)
        draws += _means([run.result for run in arm.runs], method, RANDOM_ENCODER)
    rows = []
    for labels, draws in by_architecture.values():
        others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        label = f"{RANDOM_ENCODER} ({labels[0]}{others})" if len(by_architecture) > 1 else RANDOM_ENCODER
        mean = {domain: sum(draw[domain] for draw in draws) / len(draws) for domain in (draws[0] if draws else ())}
        rows.append(_row(label, RANDOM_ENCODER, [mean] if draws else []))
    return rows


def _architecture(arm: Arm) -> str:
    fields = {
        key: value
        for key, value in arm.settings.items()
        if key.startswith("model.") and not key.removeprefix("model.").startswith(NOT_OF_THE_ENCODER)
    }
    return json.dumps(fields, sort_keys=True, default=str)


def _has(result: Result, features: str, method: str) -> bool:
    return any(score.features == features and score.method == method for score in result.scores)


def _chance(result: Result, method: str) -> dict[str, float]:
    """Chance level of each domain, and "mean" of them, as shares."""
    return mean_of_means((score.domain, score.chance) for score in result.of_model() if score.method == method)


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
