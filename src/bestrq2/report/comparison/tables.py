"""Tables of a comparison: probe scores, differences, X-ARES, cost of training, last values, settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bestrq2.evaluate.published import published_averages
from bestrq2.evaluate.result import Result
from bestrq2.evaluate.score_table import METHOD_TITLES
from bestrq2.evaluate.table import Table
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.evaluate.xares.results import BENCHMARK as XARES
from bestrq2.evaluate.xares.results import ENTRIES_37, Mean, averages, plain_averages
from bestrq2.report.comparison.arms import Arm, Difference, Estimate, differing, estimate, final_values, stage
from bestrq2.report.comparison.probes import Pair, ProbeRow
from bestrq2.report.curves import STAGES
from bestrq2.report.runs import Run, at_step, own_labels, value_text
from bestrq2.report.scales import number_text, time_text
from bestrq2.text import flops_text

FINAL = {
    "loss": "loss",
    "excess_loss": "excess loss",
    "accuracy": "accuracy (%)",
    "code_perplexity": "code perplexity",
    "code_coverage": "coverage (%)",
}
SHARES = ("accuracy", "code_coverage")
XARES_MEANS = ("speech", "music", "environment", "global mean", "mean of means")
MOST_SETTINGS = 40
NONE = "–"


# --- probes ---


def probe_table(method: str, rows: Sequence[ProbeRow], arms: Sequence[Arm]) -> Table:
    """Probe scores relative to chance, in percent, with their intervals over test clips and seeds."""
    domains = list(next(row.scores for row in rows if row.scores))
    header = ("", *map(mean_title, domains))
    counts = {arm.label: (len(arm.probed), len(arm.runs)) for arm in arms}
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.missing:
            lines.append((row.label, row.missing))
            continue
        probed, runs = counts.get(row.label, (1, 1)) if row.kind == "arm" else (1, 1)
        label = row.label if probed == runs else f"{row.label} ({probed} of {runs} seeds probed)"
        lines.append((label, *(percent(row.scores[domain], row.kind == "arm") for domain in domains)))
    return Table(header, tuple(lines), f"{METHOD_TITLES[method]} (%, relative to chance)")


def mean_title(part: str) -> str:
    """Heading of a mean: its domain, or what it is over."""
    return "mean of domains" if part == "mean" else part or "other"


def percent(score: Estimate, of_seeds: bool = True) -> str:
    """A share in percent: "62.1 ± 0.8", or "62.1 ± 0.5 (1 seed)"."""
    single = of_seeds and len(score.values) == 1
    return f"{score.text(1, 100)} (1 seed)" if single else score.text(1, 100)


def difference_tables(arms: Sequence[Arm], pairs: Sequence[Pair]) -> list[Table]:
    """For each method, every arm minus the first one, by domain, in points; an asterisk marks clear differences."""
    tables = []
    for method in METHODS:
        found = [pair for pair in pairs if pair.method == method and pair.baseline == arms[0].label]
        if found:
            header = ("", *map(mean_title, found[0].domains), "mean of domains")
            lines = [(pair.arm, *map(_points, [*pair.domains.values(), pair.difference])) for pair in found]
            tables.append(Table(header, tuple(lines), f"{METHOD_TITLES[method]}: points above {arms[0].label}"))
    return tables


def _points(difference: Difference) -> str:
    mark = " *" if difference.clear else ""
    return f"{100 * difference.difference:+.1f} ± {100 * difference.half_width:.1f}{mark}"


# --- probes on labels of one's own ---


def own_probe_tables(arms: Sequence[Arm]) -> list[Table]:
    """One table for each set of labels, clips and splits: tasks, and the scores of all arms beside chance."""
    sets = list(dict.fromkeys(own_labels(one) for arm in arms for run in arm.runs for one in current_probes(run)))
    tables = []
    for place, labels in enumerate(sets):
        again = sum(name == labels[0] for name, _ in sets[:place])
        which = f"{labels[0]}, other clips or splits ({again + 1})" if again else labels[0]
        title = f"{which}: {' / '.join(METHOD_TITLES[method] for method in METHODS)} (%)"
        by_arm = [[one for run in arm.runs for one in current_probes(run) if own_labels(one) == labels] for arm in arms]
        chances = {score.task: score.chance for found in by_arm for one in found for score in one.of_model()}
        rows = []
        for task, chance in chances.items():
            scores = [_own_scores(found, task, len(arm.runs)) for arm, found in zip(arms, by_arm, strict=True)]
            rows.append((task, *scores, f"{100 * chance:.1f}"))
        tables.append(Table(("", *(arm.label for arm in arms), "chance"), tuple(rows), title))
    return tables


def current_probes(run: Run) -> list[Result]:
    """Results on labels of one's own that are of the newest weights."""
    return at_step(run.probes, run.steps)


def _own_scores(found: Sequence[Result], task: str, seeds: int) -> str:
    cells = []
    for method in METHODS:
        values = [one.score for own in found for one in own.of_model() if (one.task, one.method) == (task, method)]
        cells.append(_over_seeds(values, seeds, 1) if values else NONE)
    return NONE if set(cells) == {NONE} else " / ".join(cells)


# --- X-ARES ---


def xares_tables(arms: Sequence[Arm]) -> list[Table]:
    """Averages of arms and published models where a run has entries that count, and the tasks of all arms."""
    return [*_xares_means(arms), *_xares_tasks(arms)]


def xares_numbers(arm: Arm) -> list[dict[str, Any] | None]:
    """By run, the averages by every aggregation and the scores by task; None for a run without a result."""
    return [
        None if run.xares is None else {**plain_averages(run.xares), "scores": _by_task(run.xares)} for run in arm.runs
    ]


def _xares_means(arms: Sequence[Arm]) -> list[Table]:
    by_arm = {
        arm.label: [averages(run.xares.scores, ENTRIES_37) for run in arm.runs if run.xares is not None] for arm in arms
    }
    if not any(one["global_mean"].found for own in by_arm.values() for one in own):
        return []
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        own = by_arm[arm.label]
        cells = [_xares_mean(own, place, len(arm.runs)) for place in range(len(XARES_MEANS))]
        rows.append((arm.label, *cells) if own else (arm.label, "not run"))
    rows += [(f"{row.model} (published)", *row.cells) for row in published_averages(XARES, ENTRIES_37.name)]
    return [Table(("", *XARES_MEANS), tuple(rows), f"{XARES}, {ENTRIES_37.name} (%)")]


def _xares_mean(own: Sequence[dict[str, Mean]], place: int, seeds: int) -> str:
    """Mean over the seeds that have all entries, with its interval; else the number of entries of the fullest seed."""
    means = [list(one.values())[place] for one in own]
    values = [mean.value for mean in means if mean.value is not None]
    if not values:
        return max(means, key=lambda mean: mean.found).text if means else ""
    return _over_seeds(values, seeds, 2)


def _xares_tasks(arms: Sequence[Arm]) -> list[Table]:
    """One row per task that any run has a score of: means over the seeds, linear probe and k-NN."""
    tasks = dict.fromkeys(
        task for arm in arms for run in arm.runs if run.xares is not None for task in _by_task(run.xares)
    )
    if not tasks:
        return []
    rows = [(task, *(_xares_task(arm, task) for arm in arms)) for task in tasks]
    return [Table(("", *(arm.label for arm in arms)), tuple(rows), f"{XARES}, linear / k-NN (%)")]


def _xares_task(arm: Arm, task: str) -> str:
    runs = [_by_task(run.xares).get(task, {}) for run in arm.runs if run.xares is not None]
    cells = []
    for method in ("mlp", "knn"):
        values = [scores[method] for scores in runs if method in scores]
        cells.append(_over_seeds(values, len(arm.runs), 1) if values else NONE)
    return NONE if set(cells) == {NONE} else " / ".join(cells)


def _by_task(result: Result) -> dict[str, dict[str, float]]:
    """Scores by task and method."""
    found: dict[str, dict[str, float]] = {}
    for score in result.scores:
        found.setdefault(score.task, {})[score.method] = score.score
    return found


def _over_seeds(values: Sequence[float], seeds: int, digits: int) -> str:
    text = estimate(values).text(digits, 100)
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds} seeds)"


# --- training ---


def cost_table(arms: Sequence[Arm]) -> Table:
    """Runs with their seeds, steps, size, operations and time of every arm."""
    header = ("", "runs", "steps", "encoder", "GFLOPs per clip", "total training", "wall time")
    rows = [
        (
            arm.label,
            arm.counted,
            f"{arm.first.steps:,}",
            f"{arm.cost.encoder_parameters / 1e6:.2f} M",
            f"{arm.cost.training_gflops:.4g}",
            flops_text(arm.gflops(arm.first.steps)),
            _wall_time(arm),
        )
        for arm in arms
    ]
    return Table(header, tuple(rows), "cost of training")


def final_table(arms: Sequence[Arm]) -> Table:
    """Means over seeds, with intervals, of the values logged last."""
    stages = {quantity: stage(arms, quantity, 1) for quantity in FINAL}
    header = ("", *(f"{STAGES[name]} {text}" if (name := stages[q]) else text for q, text in FINAL.items()))
    rows = [(arm.label, *(_final(final_values(arm, f"{stages[q]}/{q}"), q in SHARES) for q in FINAL)) for arm in arms]
    return Table(header, tuple(rows), "at the last step")


def settings_table(arms: Sequence[Arm]) -> Table | None:
    """Settings that differ between the arms, one row per setting; None where none does."""
    names = differing([arm.settings for arm in arms])
    if not names:
        return None
    rows = [(name, *(value_text(arm.settings.get(name), name) for arm in arms)) for name in names[:MOST_SETTINGS]]
    if len(names) > MOST_SETTINGS:
        rows.append((f"and {len(names) - MOST_SETTINGS} more, in comparison.json", *[""] * len(arms)))
    return Table(("", *(arm.label for arm in arms)), tuple(rows), "settings that differ")


def _wall_time(arm: Arm) -> str:
    known = [seconds for run in arm.runs if (seconds := run.seconds()) is not None]
    if not known:
        return "not recorded"
    text = time_text(sum(known) / len(known))
    return text if len(known) == len(arm.runs) else f"{text} ({len(known)} of {len(arm.runs)} seeds)"


def _final(value: Estimate | None, share: bool) -> str:
    if value is None:
        return NONE
    factor = 100 if share else 1
    text = number_text(factor * value.mean)
    if value.half_width is None:
        return text
    places = len(text.partition(".")[2])
    return f"{text} ± {factor * value.half_width:.{places}f}"
