"""Probe scores of arms over their seeds, beside the sanity rows, and who is ahead of whom."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

from bestrq2.errors import DataError
from bestrq2.evaluate.result import Result
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.report.comparison import results
from bestrq2.report.comparison.arms import Arm
from bestrq2.report.comparison.contents import Pair, ProbeRow, Table
from bestrq2.report.comparison.results import LOG_MEL, RANDOM, SUPERVISED
from bestrq2.report.comparison.statistics import Difference, Estimate, estimate, pooled_spread, welch

TITLES = {"linear": "linear probe (%)", "knn": "k-NN (%)"}
NOT_PROBED = f"not probed: run `bestrq2 probe RUN {results.BENCHMARK}`"
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


def probe_rows(arms: Sequence[Arm]) -> dict[str, list[ProbeRow]]:
    """Rows by method; empty where no run was probed.

    Raises:
        DataError: the results, or that of the supervised bound, came about in different ways.
    """
    probed = [run for arm in arms for run in arm.runs if run.result is not None]
    results.require_one_benchmark(probed)
    found = [run.result for run in probed if run.result is not None]
    if not found:
        return {}
    supervised = results.supervised_result()
    if supervised is not None:
        results.compare_kinds(str(probed[0].folder), found[0], "the supervised bound of this version", supervised)
    return {
        method: [
            *(_arm_row(arm, method) for arm in arms),
            ProbeRow("chance", "chance", _single(results.chance(found[0], method))),
            _baseline_row(LOG_MEL, LOG_MEL, found, method),
            *_random_rows(arms, method),
            _baseline_row(results.SUPERVISED_ROW, SUPERVISED, [supervised] if supervised else [], method),
        ]
        for method in METHODS
    }


def disagreeing_baselines(arms: Sequence[Arm]) -> list[str]:
    """A sentence where the log-mel statistics, which nothing random goes into, score unlike in two results."""
    found = [run.result for arm in arms for run in arm.runs if run.result is not None]
    for method in METHODS:
        scores = [results.means(one, method, LOG_MEL)["mean"] for one in found if _has(one, LOG_MEL, method)]
        if scores and max(scores) - min(scores) > SAME:
            return [
                f"Log-mel statistics score {100 * min(scores):.1f} to {100 * max(scores):.1f} % in the runs' results "
                "though nothing of them is trained: were the runs probed with different versions of the software?"
            ]
    return []


def pairs(arms: Sequence[Arm], rows: dict[str, list[ProbeRow]]) -> list[Pair]:
    """Differences between every two arms of at least two probed seeds, the later arm less the earlier one."""
    found = []
    for method, of_method in rows.items():
        scores = {row.label: row.scores for row in of_method if row.kind == "arm" and row.scores}
        labels = [arm.label for arm in arms if arm.label in scores and len(scores[arm.label]["mean"].values) >= 2]
        for earlier, later in itertools.combinations(labels, 2):
            apart = {
                domain: welch(scores[later][domain].values, scores[earlier][domain].values) for domain in scores[later]
            }
            mean = apart.pop("mean")
            found.append(Pair(method, later, earlier, mean, apart))
    return found


def difference_tables(arms: Sequence[Arm], found: Sequence[Pair]) -> list[Table]:
    """For each method, every arm less the first one, by domain, in points; an asterisk where zero lies outside."""
    tables = []
    for method in METHODS:
        of_method = [pair for pair in found if pair.method == method and pair.baseline == arms[0].label]
        if of_method:
            header = ("", *(domain or "other" for domain in of_method[0].domains), "mean of means")
            lines = [(pair.ahead, *map(_points, [*pair.domains.values(), pair.difference])) for pair in of_method]
            title = f"{TITLES[method].removesuffix(' (%)')}: points above {arms[0].label}"
            tables.append(Table(title, header, tuple(lines)))
    return tables


def _points(difference: Difference) -> str:
    mark = " *" if difference.clear else ""
    return f"{100 * difference.difference:+.1f} ± {100 * difference.half_width:.1f}{mark}"


def spread_sentences(rows: dict[str, list[ProbeRow]]) -> list[str]:
    """For each method, what seeds alone do: with two or three seeds an arm, its own interval is hardly known."""
    sentences = []
    for method, of_method in rows.items():
        samples = [row.scores["mean"].values for row in of_method if row.kind == "arm" and row.scores]
        several = [len(one) for one in samples if len(one) > 1]
        spread = pooled_spread(samples)
        if spread is not None and len(several) >= 3:
            least = 100 * spread.least_difference(min(several), min(several))
            sentences.append(
                f"{_title(method)}: if all arms spread alike, seeds spread by {100 * spread.deviation:.1f} points "
                f"({spread.degrees} degrees of freedom), and means of {min(several)} seeds each are apart from "
                f"{least:.1f} points on."
            )
    return sentences


def _title(method: str) -> str:
    return TITLES[method].removesuffix(" (%)").replace("linear", "Linear")


def probe_table(method: str, rows: Sequence[ProbeRow], arms: Sequence[Arm]) -> Table:
    """Scores in percent with their intervals over seeds."""
    domains = list(next(row.scores for row in rows if row.scores))
    header = ("", *(domain or "other" for domain in domains[:-1]), "mean of means")
    counts = {arm.label: (sum(run.result is not None for run in arm.runs), len(arm.runs)) for arm in arms}
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.missing:
            lines.append((row.label, row.missing))
            continue
        probed, runs = counts.get(row.label, (1, 1)) if row.kind == "arm" else (1, 1)
        label = row.label if probed == runs else f"{row.label} ({probed} of {runs} seeds probed)"
        lines.append((label, *(percent(row.scores[domain], row.kind == "arm") for domain in domains)))
    return Table(TITLES[method], header, tuple(lines))


def percent(score: Estimate, of_seeds: bool = True) -> str:
    """In percent: "62.1 ± 0.8", or "62.1 (1 seed)"."""
    mean = f"{100 * score.mean:.1f}"
    if score.half_width is not None:
        return f"{mean} ± {100 * score.half_width:.1f}"
    return f"{mean} (1 seed)" if of_seeds else mean


def pair_sentences(arms: Sequence[Arm], found: Sequence[Pair], rows: dict[str, list[ProbeRow]]) -> list[str]:
    """For each method, every arm against the first one."""
    sentences = []
    for method in rows:
        baseline = arms[0].label
        for arm in arms[1:]:
            pair = next((p for p in found if (p.method, p.ahead, p.baseline) == (method, arm.label, baseline)), None)
            if pair is not None:
                sentences.append(f"{_title(method)}: {_pair_sentence(pair)}.")
    probed = {arm.label: sum(run.result is not None for run in arm.runs) for arm in arms}
    few = [label for label, count in probed.items() if count == 1]
    if rows and len(arms) > 1 and few:
        sentences.append(
            f"Who is ahead cannot be said with a single probed seed: {'; '.join(few)}; pretrain with another --seed."
        )
    compared = sum(pair.baseline == arms[0].label for pair in found) // max(1, len(rows))
    if compared >= 5:
        sentences.append(f"Of {compared} comparisons at 95 % each, one may come out ahead or behind by luck alone.")
    return sentences


def _pair_sentence(pair: Pair) -> str:
    points, half = round(100 * pair.difference.difference, 1) + 0.0, 100 * pair.difference.half_width
    if not pair.difference.clear:
        return f"{pair.ahead} and {pair.baseline} are level ({points:+.1f} ± {half:.1f} points)"
    where = "ahead of" if pair.difference.difference > 0 else "behind"
    digits = 1 if points else 3
    return (
        f"{pair.ahead} is {abs(100 * pair.difference.difference):.{digits}f} ± {half:.{digits}f} points {where} "
        f"{pair.baseline}"
    )


def _arm_row(arm: Arm, method: str) -> ProbeRow:
    found = [run.result for run in arm.runs if run.result is not None]
    if not found:
        return ProbeRow(arm.label, "arm", missing=NOT_PROBED)
    return ProbeRow(arm.label, "arm", _over([results.means(one, method, one.model) for one in found]))


def _baseline_row(label: str, features: str, found: Sequence[Result], method: str) -> ProbeRow:
    scored = [one for one in found if _has(one, features, method)]
    if not scored:
        return ProbeRow(label, features, missing="not measured")
    return ProbeRow(label, features, _single(results.means(scored[0], method, features)))


def _random_rows(arms: Sequence[Arm], method: str) -> list[ProbeRow]:
    """One row for every architecture.

    All have the weights of one seed; where results differ, as by the input statistics of their runs, it is their mean.
    """
    by_architecture: dict[str, tuple[list[str], list[dict[str, float]]]] = {}
    for arm in arms:
        labels, draws = by_architecture.setdefault(_architecture(arm), ([], []))
        labels.append(arm.label)
        for run in arm.runs:
            if run.result is not None and _has(run.result, RANDOM, method):
                draws.append(results.means(run.result, method, RANDOM))
    several = len(by_architecture) > 1
    return [
        ProbeRow(
            f"{RANDOM} ({labels[0]})" if several else RANDOM,
            RANDOM,
            _single({domain: sum(draw[domain] for draw in draws) / len(draws) for domain in draws[0]}) if draws else {},
            "" if draws else "not measured",
            tuple(labels),
        )
        for labels, draws in by_architecture.values()
    ]


def _architecture(arm: Arm) -> str:
    fields = {
        key: value
        for key, value in arm.settings.items()
        if key.startswith("model.") and not key.removeprefix("model.").startswith(NOT_OF_THE_ENCODER)
    }
    return json.dumps(fields, sort_keys=True, default=str)


def _has(result: Result, features: str, method: str) -> bool:
    return results.has_features(result, features, method)


def _over(scores: Sequence[dict[str, float]]) -> dict[str, Estimate]:
    if any(list(one) != list(scores[0]) for one in scores):
        raise DataError(f"scores of different domains cannot be averaged: {[list(one) for one in scores]}")
    return {domain: estimate([one[domain] for one in scores]) for domain in scores[0]}


def _single(scores: dict[str, float]) -> dict[str, Estimate]:
    return _over([scores])
