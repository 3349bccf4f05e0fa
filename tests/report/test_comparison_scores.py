"""Scores of arms: intervals over seeds, probe tables, and sentences on who is ahead."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from example_runs import ONE_STAGE, read, together, write_run

from bestrq2.evaluate.result import PROBE, Result, TaskScore, write_result
from bestrq2.evaluate.task_probe import METHODS
from bestrq2.report.comparison import compare_runs
from bestrq2.report.comparison.arms import estimate, group, pooled_spread
from bestrq2.report.comparison.probes import pairs, probe_rows
from bestrq2.report.comparison.tables import probe_table

pytestmark = pytest.mark.usefixtures("steady_and_quick")


# --- statistics, against numbers worked out by hand with t tables ---


def test_interval_over_three_seeds_is_students() -> None:
    found = estimate([0.60, 0.62, 0.64])
    assert found.mean == pytest.approx(0.62)
    assert found.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert estimate([0.6]).half_width is None


# --- probes ---


def test_means_of_an_arm_are_over_its_seeds(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", seed=seed, probe=0.6 + 0.02 * seed) for seed in range(3)]
    arms = group(read(*folders))
    rows = probe_rows(arms)["linear"]
    assert rows[0].scores["mean"].mean == pytest.approx(0.62)
    assert rows[0].scores["speech"].mean == pytest.approx(0.67)
    table = probe_table("linear", rows, arms)
    assert table.header == ("", "speech", "music", "environment", "mean of domains", "choosing tasks")
    assert table.rows == (
        ("best-rq-2-tiny", "67.0 ± 5.0", "62.0 ± 5.0", "57.0 ± 5.0", "62.0 ± 5.0", "62.0 ± 5.0"),
        ("log-mel statistics", "55.0 ± 0.0", "50.0 ± 0.0", "45.0 ± 0.0", "50.0 ± 0.0", "50.0 ± 0.0"),
        ("random encoder", "47.0 ± 0.0", "42.0 ± 0.0", "37.0 ± 0.0", "42.0 ± 0.0", "42.0 ± 0.0"),
    )
    assert "52.0 ± 5.0" in probe_table("knn", probe_rows(arms)["knn"], arms).text()


def test_every_architecture_has_its_random_encoder(tmp_path: Path) -> None:
    arms = group(
        read(
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", recipe="one-stage", changes=ONE_STAGE),
            write_run(tmp_path / "c", recipe="wide", changes={"model.hidden_size": 384}),
        )
    )
    randoms = [row for row in probe_rows(arms)["linear"] if row.kind == "random encoder"]
    assert [row.label for row in randoms] == ["random encoder (best-rq-2-tiny and 1 more)", "random encoder (wide)"]


def test_unprobed_runs_are_compared_by_their_curves(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a0", seed=0),
        write_run(tmp_path / "a1", seed=1, probe=None),
        write_run(tmp_path / "b", recipe="one-stage", changes=ONE_STAGE, probe=None),
    ]
    comparison = together(*folders)
    assert "best-rq-2-tiny (1 of 2 seeds probed)  65.0 ± 0.0 (1 seed)" in comparison.text
    assert "not probed: run `bestrq2 probe RUN soundworld-2`" in comparison.text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probes.svg").write_text("of an earlier comparison")
    without = compare_runs(folders[1:], tmp_path / "out")
    assert "No run was probed on soundworld-2, so its tables are missing: run `bestrq2 probe RUN" in without.text
    assert "linear probe" not in without.text
    assert not (tmp_path / "out" / "probes.svg").exists()


def test_sentences_say_who_is_ahead_outside_of_the_intervals(tmp_path: Path) -> None:
    means = {"base-0.0": (0.600, 0.602, 0.604), "better": (0.700, 0.702, 0.704), "same": (0.600, 0.602, 0.6041)}
    folders = [
        write_run(tmp_path / f"{name}-{seed}", f"{name}.yaml", seed, probe=mean, changes={"optimizer.lr": 1e-4 * rate})
        for rate, (name, of_seeds) in enumerate(means.items(), 1)
        for seed, mean in enumerate(of_seeds)
    ]
    single = write_run(tmp_path / "single", "single", changes={"optimizer.lr": 0.1})
    text = together(*folders, single).text
    assert "Linear probe: better is 10.0 ± 0.5 points ahead of base-0.0." in text
    assert "k-NN: same and base-0.0 are level (+0.0 ± 0.5 points)." in text
    assert "single probed seed does not show which arm is ahead: single;" in text
    arms = group(read(*folders))
    found = pairs(arms, probe_rows(arms))
    assert [(pair.arm, pair.baseline) for pair in found if pair.method == "linear"] == [
        ("better", "base-0.0"),
        ("same", "base-0.0"),
        ("same", "better"),
    ]


def test_differences_by_domain_and_the_pooled_spread(tmp_path: Path) -> None:
    means = {"one": (0.50, 0.52), "two": (0.60, 0.62), "three": (0.505, 0.515)}
    folders = [
        write_run(tmp_path / f"{name}-{seed}", f"{name}.yaml", seed, probe=mean, changes={"optimizer.lr": 1e-4 * rate})
        for rate, (name, of_seeds) in enumerate(means.items(), 1)
        for seed, mean in enumerate(of_seeds)
    ]
    comparison = together(*folders)
    table = next(table for table in comparison.tables if table.title == "linear probe: points above one")
    assert table.header[1:] == ("speech", "music", "environment", "choosing tasks", "mean of domains")
    by_arm = {row[0]: row[1:] for row in table.rows}
    # Welch: sd 1.41 each over 2 seeds, 2 degrees of freedom, t = 4.30; every domain of a made-up run scores the same.
    # p = 0.02 is below 0.05, but not below 0.05 / 3, as Holm's correction for three pairs demands.
    assert set(by_arm["two"]) == {"+10.0 ± 6.1"}
    assert by_arm["three"][-1].startswith("+0.0 ± ")
    # Pooled: sums of squares 2 + 2 + 0.5 over 3 degrees of freedom, t(3) = 3.18.
    spread = pooled_spread([(50.0, 52.0), (60.0, 62.0), (50.5, 51.5), (7.0,)])
    assert spread is not None
    assert (spread.degrees, spread.deviation) == (3, pytest.approx(math.sqrt(4.5 / 3)))
    assert spread.least_difference(2, 2) == pytest.approx(3.1824 * math.sqrt(1.5), rel=1e-4)
    assert pooled_spread([(1.0,), (2.0,)]) is None
    assert (
        "is 1.2 points (3 degrees of freedom), and means of 2 seeds each differ clearly from 3.9 points on"
        in comparison.text
    )


def test_metrics_missing_in_one_run_are_noted(tmp_path: Path) -> None:
    whole, renamed = write_run(tmp_path / "whole", seed=0), write_run(tmp_path / "renamed", seed=1)
    table = (renamed / "metrics.csv").read_text()
    (renamed / "metrics.csv").write_text(table.replace("validation/accuracy", "validation/right"))
    text = together(whole, renamed).text
    assert f"{renamed}: metrics.csv has no validation/accuracy, which other runs logged" in text


def test_a_tiny_but_clear_lead_is_a_lead(tmp_path: Path) -> None:
    means = {"one": (0.5, 0.5), "two": (0.5003, 0.5003)}
    folders = [
        write_run(tmp_path / f"{name}-{seed}", f"{name}.yaml", seed, probe=mean, changes={"optimizer.lr": 1e-4 * rate})
        for rate, (name, of_seeds) in enumerate(means.items(), 1)
        for seed, mean in enumerate(of_seeds)
    ]
    assert "Linear probe: two is 0.030 ± 0.000 points ahead of one." in together(*folders).text


def test_results_on_own_labels_stand_side_by_side_only_for_the_same_clips(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, name, changes={"optimizer.lr": lr}) for name, lr in (("a", 1e-3), ("b", 1e-4))
    ]

    def keep(run: Path, name: str, value: float, clips: str, created: str, step: int = 400) -> None:
        (run / "probes").mkdir(exist_ok=True)
        protocol = {"labelled": f"/data/{name}", "seed": 0, "clips": clips}
        scores = tuple(TaskScore("m", name, method, "accuracy", value, chance=0.25) for method in METHODS)
        provenance = {"protocol": protocol, "created": created, "step": step}
        write_result(run / "probes" / f"{name}-{created}.json", Result(PROBE, "m", scores, {}, provenance))

    keep(folders[0], "letters", 0.4, "x", "2026-01")
    keep(folders[0], "letters", 0.5, "x", "2026-02")
    keep(folders[1], "letters", 0.75, "x", "2026-01")
    keep(folders[1], "animals", 0.5, "y", "2026-01")
    keep(folders[0], "animals", 0.25, "z", "2026-01")
    keep(folders[1], "prompts", 0.9, "w", "2026-01", step=300)
    comparison = together(*folders)
    title = "linear probe / linear, over time / k-NN (%)"
    own = {table.title: table.rows for table in comparison.tables if title in table.title}
    assert own == {
        f"animals: {title}": (("animals", "25.0 / 25.0 / 25.0", "–", "25.0"),),
        f"letters: {title}": (("letters", "50.0 / 50.0 / 50.0", "75.0 / 75.0 / 75.0", "25.0"),),
        f"animals, other clips or splits (2): {title}": (("animals", "–", "50.0 / 50.0 / 50.0", "25.0"),),
    }
    assert "b: its result on prompts is of step 300, not of step 400, and left out" in comparison.text
