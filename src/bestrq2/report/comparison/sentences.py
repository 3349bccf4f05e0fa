"""Sentences of a comparison: differences of scores, limits, missing values, and health against the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bestrq2.evaluate.score_table import METHOD_TITLES
from bestrq2.report.comparison.arms import DATA, HIDDEN, Arm, differing, interpolated, pooled_spread, target_settings
from bestrq2.report.comparison.probes import Pair, ProbeRow
from bestrq2.report.runs import Run, own_labels, value_text
from bestrq2.report.scales import Unit, number_text
from bestrq2.run_records import without_rest

# Metrics that tables and figures show.
SHOWN = ("loss", "excess_loss", "accuracy", "code_perplexity", "code_coverage", "top_code_share")
# Metric → the smallest distance from the mean of the reference that counts as outside.
HEALTH = {"train/excess_loss": 0.05, "train/code_perplexity": 1.0, "train/accuracy": 0.01}
SPREADS, SHARE = 3.0, 0.2
MOST_NAMED = 6


# --- probe scores ---


def pair_sentences(arms: Sequence[Arm], pairs: Sequence[Pair], rows: Mapping[str, Sequence[ProbeRow]]) -> list[str]:
    """For each method, every arm against the first one."""
    sentences = []
    by_arm = {(pair.method, pair.arm, pair.baseline): pair for pair in pairs}
    for method in rows:
        for arm in arms[1:]:
            pair = by_arm.get((method, arm.label, arms[0].label))
            if pair is not None:
                sentences.append(f"{_method(method)}: {_pair(pair)}.")
    few = [arm.label for arm in arms if len(arm.probed) == 1]
    if rows and len(arms) > 1 and few:
        sentences.append(
            f"A single probed seed does not show which arm is ahead: {'; '.join(few)}; pretrain with another --seed."
        )
    compared = sum(pair.baseline == arms[0].label for pair in pairs) // max(1, len(rows))
    if compared > 1:
        sentences.append("Which arms are ahead or behind is decided after Holm's correction over all pairs of arms.")
    return sentences


def spread_sentences(rows: Mapping[str, Sequence[ProbeRow]]) -> list[str]:
    """For each method, the pooled spread over seeds: two or three seeds hardly determine an arm's own interval."""
    sentences = []
    for method, of_method in rows.items():
        samples = [row.scores["mean"].values for row in of_method if row.kind == "arm" and row.scores]
        several = [len(one) for one in samples if len(one) > 1]
        spread = pooled_spread(samples)
        if spread is not None and len(several) >= 3:
            least = 100 * spread.least_difference(min(several), min(several))
            sentences.append(
                f"{_method(method)}: the standard deviation between seeds, pooled over the arms, "
                f"is {100 * spread.deviation:.1f} points ({spread.degrees} degrees of freedom), "
                f"and means of {min(several)} seeds each differ clearly from "
                f"{least:.1f} points on."
            )
    return sentences


def _method(method: str) -> str:
    return METHOD_TITLES[method].replace("linear", "Linear")


def _pair(pair: Pair) -> str:
    points, half = round(100 * pair.difference.difference, 1) + 0.0, 100 * pair.difference.half_width
    if not pair.difference.clear:
        return f"{pair.arm} and {pair.baseline} are level ({points:+.1f} ± {half:.1f} points)"
    where = "ahead of" if pair.difference.difference > 0 else "behind"
    digits = 1 if points else 3
    return (
        f"{pair.arm} is {abs(100 * pair.difference.difference):.{digits}f} ± {half:.{digits}f} points {where} "
        f"{pair.baseline}"
    )


# --- limits of the comparison ---


def notes(arms: Sequence[Arm]) -> list[str]:
    """What makes losses of the arms incomparable, and which values are missing."""
    found = [*_targets(arms), *_hidden(arms), *_data(arms)]
    if found:
        found.append("So losses and accuracies of these arms are drawn on axes of their own.")
    if any("…" in arm.label for arm in arms):
        found.append("Labels with … name only some of the settings that differ; table.md lists all.")
    for arm in arms:
        for run in arm.runs:
            logged, rates = run.curves.get("train/loss"), run.curves.get("train/learning_rate")
            if logged is not None and rates is not None and without_rest(rates)[0][-1] > logged[0][-1]:
                found.append(f"{run.folder}: the last finite loss was logged at step {logged[0][-1]:,}.")
    found += _not_logged(arms)
    found += [
        f"{run.folder}: its result on {own_labels(one)[0]} is of step {one.provenance['step']}, not "
        f"of step {run.steps}, and left out: probe it again."
        for arm in arms
        for run in arm.runs
        for one in run.probes
        if one.provenance.get("step") not in (None, run.steps)
    ]
    untimed = [arm.label for arm in arms if any(run.timing is None for run in arm.runs)]
    if untimed and any(run.timing is not None for arm in arms for run in arm.runs):
        found.append(f"Wall time was not recorded for every seed of: {'; '.join(untimed)}.")
    return found


def _targets(arms: Sequence[Arm]) -> list[str]:
    settings = [target_settings(arm) for arm in arms]
    names = [name for name in differing(settings) if name in settings[0]]
    if not names:
        return []
    return [f"Losses of arms with different targets cannot be compared: {_differ(names)}."]


def _hidden(arms: Sequence[Arm]) -> list[str]:
    names = [name for name in differing([arm.settings for arm in arms]) if name in HIDDEN]
    return (
        [f"Losses are on differently hidden patches, which are easier or harder to predict: {_differ(names)}."]
        if names
        else []
    )


def _data(arms: Sequence[Arm]) -> list[str]:
    names = [name for name in differing([arm.settings for arm in arms]) if name in DATA]
    if "data" in names:
        values = "; ".join(f"{arm.label}: {value_text(arm.settings.get('data'))}" for arm in arms)
        return [f"The arms were trained on different data, so their losses are on different clips ({values})."]
    if names:
        return ["Validation losses are on different numbers of held-out clips: loader.validation_clips differs."]
    return []


def _differ(names: Sequence[str]) -> str:
    short = [name.removeprefix("model.") for name in names]
    return f"{short[0]} differs" if len(short) == 1 else f"{', '.join(short[:-1])} and {short[-1]} differ"


def _not_logged(arms: Sequence[Arm]) -> list[str]:
    """A sentence for every run that lacks metrics which others logged: switched off there, or renamed."""
    runs = [run for arm in arms for run in arm.runs]
    shown = sorted({name for run in runs for name in run.curves if name.partition("/")[2] in SHOWN})
    missing = {run.folder: [name for name in shown if name not in run.curves] for run in runs}
    return [
        f"{folder}: metrics.csv has no {', '.join(names)}, which other runs logged; they are left out of the tables "
        "and figures, or shown in training for all."
        for folder, names in missing.items()
        if names
    ]


# --- health beside the references ---


def health(arms: Sequence[Arm]) -> list[str]:
    """One sentence per metric for every run that has a reference of its recipe, and one for every arm without one."""
    references = [arm for arm in arms if arm.first.reference]
    sentences = []
    for arm in arms:
        if arm.first.reference:
            continue
        alike = [one for one in references if one.first.recipe == arm.first.recipe]
        if not alike:
            names = ", ".join(sorted({one.first.recipe for one in references}))
            sentences.append(
                f"{arm.label}: no health check, since there is no reference run of the recipe {arm.first.recipe}, only "
                f"of {names}."
            )
            continue
        # of several references of one recipe, the one with the fewest other settings
        reference = min(alike, key=lambda one: len(differing([arm.settings, one.settings])))
        changed = differing([arm.settings, reference.settings])
        if changed:
            more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
            sentences.append(
                f"{arm.label}: its settings are not the reference's, so expect differences: "
                f"{', '.join(changed[:MOST_NAMED])}{more}."
            )
        for run in arm.runs:
            sentences += [_health(run, reference, metric, floor) for metric, floor in HEALTH.items()]
    return sentences


def _health(run: Run, reference: Arm, metric: str, floor: float) -> str:
    """One metric of a run, at its last step, against the reference at the same share of its own steps."""
    name = "training " + metric.partition("/")[2].replace("_", " ")
    curves = [one.curves[metric] for one in reference.runs if metric in one.curves]
    if metric not in run.curves or not curves:
        return f"{run.folder}: {name} was not logged, so it cannot be checked."
    share = min(1.0, run.steps / run.max_steps)
    values = np.array([interpolated(curve, np.array([share * reference.first.max_steps]))[0] for curve in curves])
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    margin = max(SPREADS * spread, SHARE * abs(mean), floor)
    value = float(run.curves[metric][1][-1])
    unit: Unit = "percent" if metric == "train/accuracy" else "number"
    where = "inside" if abs(value - mean) <= margin else "OUTSIDE"
    low, high = number_text(mean - margin, unit), number_text(mean + margin, unit)
    return (
        f"{run.folder}: {name} is {number_text(value, unit)} at {100 * share:.0f} % of its steps, {where} of the "
        f"reference's range ({low} to {high})."
    )
