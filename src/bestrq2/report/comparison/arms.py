"""Arms, the unit of a comparison: runs that differ in nothing but their seed, and statistics over the seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bestrq2.errors import DataError
from bestrq2.inference.cost import Cost
from bestrq2.report.runs import Run, value_text
from bestrq2.run_records import Curve

# Settings that do not change what is learned: where and how fast a run ran, what it wrote and watched.
INCIDENTAL = {"recipe", "description", "extends", "output", "seed", "resume", "loader.num_workers"} | {
    f"trainer.{name}"
    for name in (
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "log_every_n_steps",
        "val_every_n_steps",
        "checkpoint_every_n_steps",
        "keep_last",
        "keep_every_n_steps",
        "gradient_checkpointing",
    )
}
INCIDENTAL_GROUPS = ("probe", "watch", "logging")
# Names of settings in labels; others go by the last part of their name.
SHORT = {
    "data": "data",
    "trainer.max_steps": "steps",
    "loader.batch_seconds": "seconds per step",
    "optimizer.lr": "lr",
    "model.hidden_size": "width",
    "model.num_hidden_layers": "layers",
    "model.codebook_size": "codes",
    "model.num_codebooks": "codebooks",
    "model.mask_ratio": "hidden share",
    "model.objective": "objective",
}
TARGETS = (
    "teacher",
    *(
        f"model.{name}"
        for name in (
            "codebook_size",
            "codebook_dim",
            "num_codebooks",
            "quantizer_seed",
            "quantizer_normalization",
            "patch_size",
            "num_mel_bands",
            "n_fft",
            "win_length",
            "short_win_length",
            "short_mel_bands",
            "hop_length",
            "mel_min_hz",
            "mel_max_hz",
            "sampling_rate",
        )
    ),
)
HIDDEN = ("model.mask_ratio",)
DATA = ("data", "loader.validation_clips")
MOST_NAMED = 3
LEVEL = 0.95


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings, apart from their seeds.

    Attributes:
        label: unique among the arms.
        runs: runs by seed.
        settings: settings that change what is learned, under dotted names.
    """

    label: str
    runs: tuple[Run, ...]
    settings: dict[str, Any]

    @property
    def first(self) -> Run:
        """One of the runs, for what they share."""
        return self.runs[0]

    @property
    def counted(self) -> str:
        """Number of runs, with their seeds: "2 (seeds 0, 1)"."""
        seeds = [str(run.seed) for run in self.runs]
        return f"{len(seeds)} ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)})"

    @property
    def probed(self) -> list[Run]:
        """Runs with a benchmark result."""
        return [run for run in self.runs if run.result is not None]

    @property
    def cost(self) -> Cost:
        """Size of the model, and operations per clip in training."""
        return self.first.cost

    def gflops(self, steps: int) -> float:
        """Training GFLOPs up to a step, for clips of full length."""
        return self.cost.training_gflops * self.first.step_rows * steps


def group(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order of their first run; reference runs and runs at different steps are arms of their own.

    Raises:
        DataError: an arm has the same seed twice.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.reference, run.steps, learning_settings(run)], sort_keys=True, default=str)
        grouped.setdefault(key, []).append(run)
    for members in grouped.values():
        seeds: dict[int, Run] = {}
        for run in members:
            if run.seed in seeds:
                raise DataError(
                    f"{seeds[run.seed].folder} and {run.folder} are the same run twice, with seed {run.seed}: the "
                    "same seed twice is not two samples; leave one out"
                )
            seeds[run.seed] = run
    parts = [tuple(sorted(members, key=lambda run: run.seed)) for members in grouped.values()]
    return [
        Arm(label, members, learning_settings(members[0])) for label, members in zip(_labels(parts), parts, strict=True)
    ]


def learning_settings(run: Run) -> dict[str, Any]:
    """Settings that change what is learned."""
    return {
        key: value
        for key, value in run.settings.items()
        if key not in INCIDENTAL and key.split(".")[0] not in INCIDENTAL_GROUPS
    }


def differing(settings: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all, those that people change most first."""
    every = list(settings)
    names = dict.fromkeys(key for one in every for key in one)
    found = [name for name in names if any(one.get(name) != every[0].get(name) for one in every)]
    order = list(SHORT)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def comparable(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms whose losses can be compared, together: those with the same targets, hidden patches and recordings."""
    alike: dict[str, list[Arm]] = {}
    for arm in arms:
        of_loss = target_settings(arm) | {name: arm.settings.get(name) for name in (*HIDDEN, *DATA)}
        alike.setdefault(json.dumps(of_loss, sort_keys=True, default=str), []).append(arm)
    return list(alike.values())


def target_settings(arm: Arm) -> dict[str, object]:
    """Settings of the targets; without a normalisation of its own the quantizer sees the input of the encoder."""
    settings = {name: arm.settings.get(name) for name in TARGETS}
    own = settings["model.quantizer_normalization"] not in ("none", "layernorm")
    return settings | {"model.input_normalization": None if own else arm.settings.get("model.input_normalization")}


def _labels(parts: Sequence[tuple[Run, ...]]) -> list[str]:
    """Recipe names, made unique by the settings in which arms of one recipe differ, then marked where unfinished."""
    base = [f"reference: {runs[0].reference}" if runs[0].reference else runs[0].recipe for runs in parts]
    labels = list(base)
    for name in dict.fromkeys(base):
        places = [place for place, label in enumerate(base) if label == name]
        settings = [learning_settings(parts[place][0]) for place in places]
        for place, differences in zip(places, _differences(settings), strict=True):
            labels[place] = ", ".join([name, *differences])
    for place, runs in enumerate(parts):
        if not runs[0].finished:
            labels[place] += f" (unfinished, step {runs[0].steps:,} of {runs[0].max_steps:,})"
    found: list[str] = []
    for label, runs in zip(labels, parts, strict=True):
        unique = label if labels.count(label) == 1 else f"{label} ({runs[0].folder})"
        found.append(unique if unique not in found else f"{unique} #{len(found) + 1}")
    return found


def _differences(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Settings that tell arms apart, with values: all that differ if they are few, else the most telling and "…"."""
    names, more = differing(settings), []
    if len(names) > MOST_NAMED:
        more = ["…"]
        chosen: list[str] = []
        # greedily take the setting that separates most arms from each other
        while len(chosen) < MOST_NAMED:
            best = max(names, key=lambda name: (_distinct(settings, [*chosen, name]), -names.index(name)))
            if chosen and _distinct(settings, [*chosen, best]) == _distinct(settings, chosen):
                break
            chosen.append(best)
        names = chosen
    texts = [[f"{SHORT.get(n, n.split('.')[-1])} {value_text(one.get(n), n)}" for n in names] for one in settings]
    return [[*one, *more] for one in texts]


def _distinct(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> int:
    return len({json.dumps([one.get(name) for name in names], default=str) for one in settings})


# --- curves over the seeds ---


@dataclass(frozen=True)
class Band:
    """A metric of one arm: its mean over seeds, between the lowest and the highest seed.

    Attributes:
        steps: int64 [N], rising.
        mean, low, high: float64 [N].
        seconds: float64 [N], mean over seeds of the seconds of training at those steps; None where not recorded.
        gflops: float64 [N], operations of training up to those steps.
    """

    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seconds: NDArray[np.float64] | None
    gflops: NDArray[np.float64]


def stage(arms: Sequence[Arm], quantity: str, points: int) -> str | None:
    """Stage of which a quantity is shown for all arms, so that training and validation are never mixed.

    Returns:
        "validation" if every run has at least `points` values there, else "train"; None where no run logged it.
    """
    runs = [run for arm in arms for run in arm.runs]
    for name in ("validation", "train"):
        counts = [len(run.curves[m][0]) if (m := f"{name}/{quantity}") in run.curves else 0 for run in runs]
        if counts and min(counts) >= points:
            return name
    return "train" if any(f"train/{quantity}" in run.curves for run in runs) else None


def band(arm: Arm, metric: str) -> Band | None:
    """A metric over the seeds of an arm, at the steps of its first run that all logged; None if there are none."""
    curves = [(run, run.curves[metric]) for run in arm.runs if metric in run.curves]
    if not curves:
        return None
    first, last = max(int(steps[0]) for _, (steps, _) in curves), min(int(steps[-1]) for _, (steps, _) in curves)
    grid = curves[0][1][0]
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) == 0:
        return None
    values = np.stack([interpolated(curve, grid) for _, curve in curves])
    # timing.csv has steps of its own and starts with the first interval: time 0 belongs to step 0
    timings = [run.timing for run, _ in curves if run.timing is not None]
    seconds = None
    if timings:
        seconds = np.mean(
            [interpolated((np.r_[0, steps], np.r_[0.0, times]), grid) for steps, times in timings], axis=0
        )
    gflops = np.array([arm.gflops(int(step)) for step in grid])
    return Band(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0), seconds, gflops)


def interpolated(curve: Curve, steps: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of a curve at other steps, linearly interpolated."""
    return np.asarray(np.interp(steps, curve[0], curve[1]), dtype=np.float64)


def final_values(arm: Arm, metric: str) -> Estimate | None:
    """Last value of a metric over the seeds; None unless all runs logged it."""
    values = [run.final(metric) for run in arm.runs]
    known = [value for value in values if value is not None]
    return estimate(known) if len(known) == len(values) else None


# --- means and differences with 95 % intervals ---


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds.

    Attributes:
        mean: mean of `values`.
        half_width: half of the 95 % interval: of probe scores over test clips and seeds (see
            `bestrq2.evaluate.intervals`), of other values by Student's t; None for a single one of those.
        values: one value per seed.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def text(self, digits: int, factor: float = 1) -> str:
        """The mean times `factor`, with its half interval where there is one: "62.1 ± 0.8"."""
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {factor * self.half_width:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """Mean of one arm minus that of another.

    Attributes:
        difference: in shares.
        half_width: half of the 95 % interval over test clips and seeds.
        clear: whether it differs from zero after correction for the number of pairs.
    """

    difference: float
    half_width: float
    clear: bool


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values, at least one."""
    numbers = np.asarray(values, dtype=np.float64)
    half = None
    if len(numbers) > 1:
        half = _quantile(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Estimate(float(numbers.mean()), half, tuple(map(float, numbers)))


@dataclass(frozen=True)
class Spread:
    """Spread between seeds, assumed to be the same in all arms.

    Attributes:
        deviation: standard deviation between seeds of one arm, pooled over arms.
        degrees: degrees of freedom of the deviation.
    """

    deviation: float
    degrees: int

    def least_difference(self, first: int, second: int) -> float:
        """Fisher's least significant difference at 95 % between means of that many seeds each."""
        return _quantile(self.degrees) * self.deviation * math.sqrt(1 / first + 1 / second)


def pooled_spread(samples: Sequence[Sequence[float]]) -> Spread | None:
    """Spread within samples of at least two values each; None where there is no such sample."""
    several = [np.asarray(one, dtype=np.float64) for one in samples if len(one) > 1]
    degrees = sum(len(one) - 1 for one in several)
    if not degrees:
        return None
    squares = sum(float(((one - one.mean()) ** 2).sum()) for one in several)
    return Spread(math.sqrt(squares / degrees), degrees)


def _quantile(degrees: float) -> float:
    """Two-sided 95 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, degrees))
