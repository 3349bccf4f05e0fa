"""Intervals over clips and seeds: coverage in simulations, and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bestrq2.errors import DataError
from bestrq2.evaluate.intervals import difference_interval, hierarchical_interval, holm, mean_interval
from bestrq2.evaluate.result import TaskScore

WEIGHTS = np.array([0.25, 0.25, 0.5])


def outcomes(generator: np.random.Generator, clips: list[np.ndarray], seeds: int, spread: float) -> list[np.ndarray]:
    """Right or wrong on three tasks of 100 clips of unequal difficulty, by seeds whose skill differs by `spread`."""
    skill = spread * generator.normal(size=seeds)
    found = []
    for place, difficulty in zip((0.35, 0.5, 0.6), clips, strict=True):
        right = np.clip(place + skill[:, None] + difficulty, 0, 1)
        found.append((generator.random((seeds, len(difficulty))) < right).astype(float))
    return found


TRUTH = 0.25 * 0.35 + 0.25 * 0.5 + 0.5 * 0.6
"""Expected mean over clips and seeds; clipping at 0 and 1 does not move it in this design."""


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.01), (3, 0.03), (5, 0.03)])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int, spread: float) -> None:
    """Both clips and seeds are drawn anew in each of 500 simulated experiments."""
    generator, covered, differences = np.random.default_rng(seeds), 0, 0
    for _ in range(500):
        clips = [generator.uniform(-0.3, 0.3, 100) for _ in WEIGHTS]
        one, other = (outcomes(generator, clips, seeds, spread) for _ in range(2))
        found = hierarchical_interval([one], WEIGHTS)
        covered += abs(found.estimate - TRUTH) <= found.half_width
        between = hierarchical_interval([one, [-x for x in other]], WEIGHTS)
        differences += abs(between.estimate) <= between.half_width
        assert (abs(between.estimate) <= between.half_width) == (between.p_value >= 0.05)
    assert 0.93 <= covered / 500 <= 0.99
    assert 0.93 <= differences / 500 <= 0.99


def test_pairing_clips_narrows_a_difference() -> None:
    """Clips that are hard for both arms say nothing about the difference."""
    generator = np.random.default_rng(0)
    hard = (generator.random(400) < 0.5).astype(float)
    one = np.stack([np.where(generator.random(400) < 0.02, 1 - hard, hard) for _ in range(3)])
    other = np.stack([np.where(generator.random(400) < 0.02, 1 - hard, hard) for _ in range(3)])
    weights = np.ones(1)
    difference = hierarchical_interval([[one], [-other]], weights).half_width
    assert difference < 0.5 * hierarchical_interval([[one]], weights).half_width


def test_one_seed_has_the_interval_over_its_clips() -> None:
    """A share p of n clips has the standard error sqrt(p (1 - p) / n)."""
    right = np.repeat([1.0, 0.0], [120, 80])[None]
    found = hierarchical_interval([[right]], np.ones(1))
    assert found.estimate == pytest.approx(0.6)
    assert found.half_width == pytest.approx(1.96 * math.sqrt(0.6 * 0.4 / 200), rel=0.01)


def test_many_clips_leave_students_interval_over_seeds() -> None:
    """Every clip of a seed has the same outcome, so only the seeds vary: Student's t with 2 degrees of freedom."""
    values = np.repeat([[0.60], [0.62], [0.64]], 50, axis=1)
    found = hierarchical_interval([[values]], np.ones(1))
    assert found.estimate == pytest.approx(0.62)
    assert found.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)


def score(task: str, right: list[int], chance: float = 0.2) -> TaskScore:
    clips = tuple(map(float, right))
    share = sum(clips) / len(clips)
    return TaskScore("a", task, "linear", "accuracy", share, chance=chance, domain=task.split("/")[0], clips=clips)


def test_means_are_relative_to_chance_and_weigh_domains_equally() -> None:
    seed = [score("music/key", [1, 0], 0.5), score("music/chord", [1, 1]), score("speech/word", [0, 1, 1, 1, 1])]
    assert mean_interval([seed]).estimate == pytest.approx((0.0 + 1.0) / 4 + 0.75 / 2)
    better = [score("music/key", [1, 1], 0.5), *seed[1:]]
    assert difference_interval([better], [seed]).estimate == pytest.approx(0.25)
    with pytest.raises(DataError, match="different tasks or clips"):
        difference_interval([seed], [seed[1:]])
    with pytest.raises(DataError, match="music/key lack the same outcomes"):
        mean_interval([seed, [score("music/key", [1, 0, 0]), *seed[1:]]])


def test_holm_multiplies_the_smallest_by_the_number_and_never_decreases() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
