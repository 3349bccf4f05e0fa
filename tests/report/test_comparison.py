"""Runs beside each other: arms, intervals, sentences, figures, and what is refused."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from example_runs import result, score, write_run

from bestrq2 import cli
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.benchmark import SOUNDWORLD_1
from bestrq2.evaluate.benchmark_result import BenchmarkResult, write_result
from bestrq2.inference.cost import Cost, cost
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.report.comparison import Comparison, compare, figures, references, results
from bestrq2.report.comparison import arms as arms_module
from bestrq2.report.comparison.arms import group, value_text
from bestrq2.report.comparison.command import assemble
from bestrq2.report.comparison.contents import Table
from bestrq2.report.comparison.probes import pairs, probe_rows, probe_table
from bestrq2.report.comparison.references import health
from bestrq2.report.comparison.runs import Run, read_run
from bestrq2.report.comparison.statistics import estimate, pooled_spread, welch
from bestrq2.report.comparison.training import band, final_table, flops_text, stage, time_text

ONE_STAGE = {"model.objective": "one_stage"}


@pytest.fixture(autouse=True)
def steady_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not change with what ships, and count the operations of an architecture once."""
    monkeypatch.setattr(results, "supervised_result", lambda: None)
    monkeypatch.setattr(arms_module, "cost", cost_once)


@functools.cache
def _cost(config: str) -> Cost:
    return cost(BestRQ2Config(**json.loads(config)))


def cost_once(config: BestRQ2Config) -> Cost:
    return _cost(json.dumps({name: getattr(config, name) for name in field_names()}))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read(*folders: Path, unfinished: bool = False) -> list[Run]:
    return [read_run(folder, unfinished) for folder in folders]


def together(*folders: Path) -> Comparison:
    """All of a comparison but its files."""
    return assemble(group(read(*folders, unfinished=True)), Path("out"))


# --- statistics, against numbers worked out by hand with t tables ---


def test_interval_over_three_seeds_is_students() -> None:
    found = estimate([0.60, 0.62, 0.64])
    assert found.mean == pytest.approx(0.62)
    assert found.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert estimate([0.6]).half_width is None


def test_welch_interval_by_hand() -> None:
    # Variances 4 and 36 of three each: 4/3 + 12 = 40/3; degrees (40/3)² / ((4/3)²/2 + 12²/2) = 2.439.
    found = welch([10, 12, 14], [4, 10, 16])
    assert found.difference == pytest.approx(2)
    assert found.half_width / math.sqrt(40 / 3) == pytest.approx(3.6416, rel=1e-3)
    assert not found.clear


def test_welch_equals_student_for_equal_variances() -> None:
    found = welch([0.70, 0.71, 0.72], [0.60, 0.61, 0.62])
    assert found.half_width == pytest.approx(2.7764 * 0.01 * math.sqrt(2 / 3), rel=1e-4)
    assert found.clear


def test_welch_without_any_spread_is_exact() -> None:
    assert welch([0.5, 0.5], [0.4, 0.4]).half_width == 0


# --- arms ---


def test_runs_that_differ_in_seed_form_an_arm(tmp_path: Path) -> None:
    incidental = {"trainer.log_every_n_steps": 5, "loader.num_workers": 0, "watch.stall_steps": 7}
    runs = read(
        write_run(tmp_path / "b", seed=1),
        write_run(tmp_path / "a", seed=0, changes=incidental),
        write_run(tmp_path / "c", recipe="mine/one-stage.yaml", changes=ONE_STAGE),
    )
    arms = group(runs)
    assert [arm.label for arm in arms] == ["best-rq-2-tiny", "one-stage"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1], [0]]


def test_labels_of_one_recipe_say_what_differs(tmp_path: Path) -> None:
    arms = group(
        read(
            write_run(tmp_path / "a", steps=400),
            write_run(tmp_path / "b", steps=800),
            write_run(tmp_path / "c", steps=800, changes={"optimizer.lr": 1e-3}),
        )
    )
    assert [arm.label for arm in arms] == [
        "best-rq-2-tiny, steps 400, lr 0.0005",
        "best-rq-2-tiny, steps 800, lr 0.0005",
        "best-rq-2-tiny, steps 800, lr 0.001",
    ]


def test_labels_stay_short_where_much_differs(tmp_path: Path) -> None:
    many = {
        "model.hidden_size": 96,
        "model.num_hidden_layers": 2,
        "model.intermediate_size": 64,
        "optimizer.weight_decay": 0.2,
        "optimizer.warmup_fraction": 0.3,
    }
    arms = group(read(write_run(tmp_path / "a"), write_run(tmp_path / "b", changes=many)))
    assert [arm.label for arm in arms] == ["best-rq-2-tiny, width 192, …", "best-rq-2-tiny, width 96, …"]


def test_a_setting_that_older_runs_lack_keeps_its_default_in_the_model_only(tmp_path: Path) -> None:
    older = write_run(tmp_path / "a")
    config = (older / "config.yaml").read_text()
    newer = write_run(tmp_path / "b", seed=1, changes={"model.qk_norm": False})
    assert "qk_norm" not in config
    assert len(group(read(older, newer))) == 1


def test_same_seed_twice_is_refused(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=3) for name in ("first", "second")]
    with pytest.raises(DataError, match=r"first and .*second .*seed 3.*not two samples"):
        compare(folders, tmp_path / "out")


def test_settings_are_readable() -> None:
    assert value_text([0.4, 0.6], "model.mask_ratio") == "0.4–0.6"
    assert value_text([0.1 + 0.2, 0.1 + 0.2], "model.mask_ratio") == "0.3"
    assert value_text([32, 8], "model.patch_size") == "32 x 8"
    assert value_text(3000, "trainer.max_steps") == "3,000"
    assert [value_text(value) for value in (20000, True, None, 3e-4)] == ["20,000", "on", "none", "0.0003"]


# --- what is refused ---


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: not a run folder \(it lacks config.yaml and metrics.csv\)"):
        read_run(tmp_path / "empty")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: [", "cannot be read as YAML"),
        ("- 1", "no configuration of a run: it lacks recipe"),
        (
            "recipe: a\ndata: b\nseed: x\nloader: {batch_size: 4}\ntrainer: {max_steps: 9}",
            "seed must be a whole number",
        ),
        (
            "recipe: a\ndata: b\nseed: 0\nloader: {batch_size: 4}\ntrainer: {max_steps: 9}\nmodel: {flux: 1}",
            "no field 'flux'",
        ),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"config.yaml: .*{message}"):
        read_run(folder)


def test_renamed_metrics_are_refused_with_what_was_found(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text.replace("train/loss", "ce").replace("validation/loss", "val_ce"))
    with pytest.raises(DataError, match=r"metrics.csv: .*train/loss and validation/loss, but step, ce, .*val_ce"):
        read_run(folder)


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("step,train/loss\n")
    with pytest.raises(DataError, match="no step was logged yet"):
        read_run(folder, unfinished=True)


def test_unfinished_runs_need_the_flag_and_are_marked(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", reached=100)
    with pytest.raises(DataError, match=r"short: is at step 100 of 400: .*pretrain --resume.*--unfinished"):
        compare([short], tmp_path / "out")
    arms = group(read(short, write_run(tmp_path / "whole", seed=1), unfinished=True))
    assert [arm.label for arm in arms] == ["best-rq-2-tiny (unfinished, step 100 of 400)", "best-rq-2-tiny"]


def test_results_of_an_earlier_step_or_another_seed_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_result(folder / "soundworld-1.json", result(0.6, step=300))
    with pytest.raises(DataError, match=r"run: was probed at step 300 and is now at step 400: probe it again"):
        read_run(folder)
    write_result(folder / "soundworld-1.json", result(0.6, seed=5))
    with pytest.raises(DataError, match="has seed 0, but its probe result is of seed 5"):
        read_run(folder)


def test_results_that_came_about_differently_are_refused(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    content = json.loads((two / "soundworld-1.json").read_text())
    edit(two / "soundworld-1.json", provenance=content["provenance"] | {"synthesiser": "formant"})
    with pytest.raises(DataError, match=r"one and .*two .*not probed alike: synthesiser is 'espeak' .*'formant'"):
        compare([one, two], tmp_path / "out")
    edit(two / "soundworld-1.json", provenance=content["provenance"], protocol=content["protocol"] | {"lr": 0.5})
    with pytest.raises(DataError, match=r"two/soundworld-1.json: the protocol has lr 0.5"):
        compare([one, two], tmp_path / "out")
    edit(two / "soundworld-1.json", protocol=content["protocol"] | {"windows": 3})
    with pytest.raises(DataError, match=r"protocol.windows is None in the one and 3 in the other"):
        compare([one, two], tmp_path / "out")
    edit(two / "soundworld-1.json", protocol=content["protocol"], benchmark="soundworld-9")
    with pytest.raises(DataError, match=r"two/soundworld-1.json: there is no benchmark 'soundworld-9'"):
        compare([one, two], tmp_path / "out")


def test_a_timing_of_other_columns_is_refused_and_half_rows_are_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "timing.csv").write_text("step,seconds\n20,2\n200,20\n400,41.5\n40")
    assert read_run(folder).seconds() == 41.5
    (folder / "timing.csv").write_text("time\n1\n")
    with pytest.raises(DataError, match="must have the columns step and seconds"):
        read_run(folder)


def test_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        compare([write_run(tmp_path / "run")], tmp_path / "out")


# --- probes ---


def test_means_of_an_arm_are_over_its_seeds(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", seed=seed, probe=0.6 + 0.02 * seed) for seed in range(3)]
    arms = group(read(*folders))
    rows = probe_rows(arms)["linear"]
    assert rows[0].scores["mean"].mean == pytest.approx(0.62)
    assert rows[0].scores["speech"].mean == pytest.approx(0.67)
    table = probe_table("linear", rows, arms)
    assert table.header == ("", "speech", "music", "environment", "mean of means")
    assert table.rows == (
        ("best-rq-2-tiny", "67.0 ± 5.0", "62.0 ± 5.0", "57.0 ± 5.0", "62.0 ± 5.0"),
        ("chance", "20.0", "20.0", "20.0", "20.0"),
        ("log-mel statistics", "55.0", "50.0", "45.0", "50.0"),
        ("random encoder", "47.0", "42.0", "37.0", "42.0"),
        ("supervised upper bound", "not measured"),
    )
    assert "52.0 ± 5.0" in probe_table("knn", probe_rows(arms)["knn"], arms).text()


def test_the_supervised_bound_appears_once_it_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = tuple(score("supervised", 0.8, "linear"))
    world = {"synthesiser": "espeak", "soundworld": "2"}
    bound = BenchmarkResult("soundworld-1", SOUNDWORLD_1.protocol(), world, "supervised", scores)
    monkeypatch.setattr(results, "supervised_result", lambda: bound)
    arms = group(read(write_run(tmp_path / "run")))
    rows = probe_rows(arms)
    assert probe_table("linear", rows["linear"], arms).rows[-1][0::4] == ("supervised upper bound", "80.0")
    assert probe_table("knn", rows["knn"], arms).rows[-1] == ("supervised upper bound", "not measured")


def test_every_architecture_has_its_random_encoder(tmp_path: Path) -> None:
    arms = group(
        read(
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", recipe="one-stage", changes=ONE_STAGE),
            write_run(tmp_path / "c", recipe="wide", changes={"model.hidden_size": 384}),
        )
    )
    randoms = [row for row in probe_rows(arms)["linear"] if row.kind == "random encoder"]
    assert [row.label for row in randoms] == ["random encoder (best-rq-2-tiny)", "random encoder (wide)"]
    assert randoms[0].arms == ("best-rq-2-tiny", "one-stage")


def test_unprobed_runs_are_compared_by_their_curves(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a0", seed=0),
        write_run(tmp_path / "a1", seed=1, probe=None),
        write_run(tmp_path / "b", recipe="one-stage", changes=ONE_STAGE, probe=None),
    ]
    comparison = together(*folders)
    assert "best-rq-2-tiny (1 of 2 seeds probed)  65.0 (1 seed)" in comparison.text
    assert "not probed: run `bestrq2 probe RUN soundworld-1`" in comparison.text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probes.png").write_text("of an earlier comparison")
    without = compare(folders[1:], tmp_path / "out")
    assert "No run was probed, so there are no probe tables: run `bestrq2 probe RUN soundworld-1`." in without.text
    assert "linear probe" not in without.text
    assert not (tmp_path / "out" / "probes.png").exists()


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
    assert "cannot be said with a single probed seed: single;" in text
    arms = group(read(*folders))
    found = pairs(arms, probe_rows(arms))
    assert [(pair.ahead, pair.baseline) for pair in found if pair.method == "linear"] == [
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
    assert table.header[1:] == ("speech", "music", "environment", "mean of means")
    by_arm = {row[0]: row[1:] for row in table.rows}
    # Welch: sd 1.41 each over 2 seeds, 2 degrees of freedom, t = 4.30; every domain of a made-up run scores the same.
    assert set(by_arm["two"]) == {"+10.0 ± 6.1 *"}
    assert by_arm["three"][-1].startswith("+0.0 ± ")
    # Pooled: sums of squares 2 + 2 + 0.5 over 3 degrees of freedom, t(3) = 3.18.
    spread = pooled_spread([(50.0, 52.0), (60.0, 62.0), (50.5, 51.5), (7.0,)])
    assert spread is not None
    assert (spread.degrees, spread.deviation) == (3, pytest.approx(math.sqrt(4.5 / 3)))
    assert spread.least_difference(2, 2) == pytest.approx(3.1824 * math.sqrt(1.5), rel=1e-4)
    assert pooled_spread([(1.0,), (2.0,)]) is None
    assert (
        "seeds spread by 1.2 points (3 degrees of freedom), and means of 2 seeds each are apart from 3.9 points on"
        in (comparison.text)
    )


def test_labels_stay_apart_where_folders_of_many_arms_have_the_same_names(tmp_path: Path) -> None:
    """More settings differ than labels name, and all folders are called seed-0."""
    settings = [
        {"optimizer.lr": 1e-4 * (1 + i % 2), "model.codebook_size": 64 * (1 + i // 2 % 2), "loader.batch_size": 8,
         "optimizer.weight_decay": 0.01 * (1 + i // 4), "model.mask_ratio": [0.4, 0.5 + 0.01 * i]}
        for i in range(6)
    ]  # fmt: skip
    folders = [
        write_run(tmp_path / "ABCDEF"[arm] / f"seed-{seed}", seed=seed, probe=0.5 + 0.05 * arm, changes=changes)
        for arm, changes in enumerate(settings)
        for seed in range(2)
    ]
    arms = group(read(*folders))
    assert len({arm.label for arm in arms}) == 6
    found = [
        pair for pair in pairs(arms, probe_rows(arms)) if (pair.method, pair.baseline) == ("linear", arms[0].label)
    ]
    assert [round(pair.difference.difference, 3) for pair in found] == [0.05, 0.1, 0.15, 0.2, 0.25]


def test_what_a_run_lacks_and_others_logged_is_said(tmp_path: Path) -> None:
    whole, renamed = write_run(tmp_path / "whole", seed=0), write_run(tmp_path / "renamed", seed=1)
    table = (renamed / "metrics.csv").read_text()
    (renamed / "metrics.csv").write_text(table.replace("validation/excess_loss", "validation/excess"))
    text = together(whole, renamed).text
    assert f"{renamed}: metrics.csv has no validation/excess_loss, which other runs logged" in text


def test_wall_time_of_which_the_beginning_is_lost_is_not_given(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "timing.csv").read_text().splitlines()
    (run / "timing.csv").write_text("\n".join([lines[0], *lines[-2:]]) + "\n")
    assert read_run(run).seconds() is None


def test_settings_that_json_does_not_know_and_other_scores_beside_a_run_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", probe=None, changes={"trainer.gradient_clip_val": math.inf})
    (run / "soundworld-scores.json").write_text("{}")
    assert json.loads(together(run).json())["arms"][0]["settings"]["trainer.gradient_clip_val"] == "inf"


def test_a_tiny_but_clear_lead_is_a_lead(tmp_path: Path) -> None:
    means = {"one": (0.5, 0.5), "two": (0.5003, 0.5003)}
    folders = [
        write_run(tmp_path / f"{name}-{seed}", f"{name}.yaml", seed, probe=mean, changes={"optimizer.lr": 1e-4 * rate})
        for rate, (name, of_seeds) in enumerate(means.items(), 1)
        for seed, mean in enumerate(of_seeds)
    ]
    assert "Linear probe: two is 0.030 ± 0.000 points ahead of one." in together(*folders).text


def test_printed_tables_break_long_labels_and_markdown_does_not() -> None:
    label = "a recipe, steps 100,000, batch size 32 (unfinished, step 2,480 of 100,000)"
    rows = (("short", "1.0", "0.5"), (label, "2.0", "1.5 ± 0.5"), ("none", "not probed yet"))
    table = Table("probe", ("", "a", "mean"), rows)
    assert table.text().splitlines() == [
        "probe                                                       a       mean",
        "------------------------------------------------------------------------",
        "short                                                     1.0        0.5",
        "a recipe, steps 100,000, batch size 32 (unfinished, step",
        "  2,480 of 100,000)                                       2.0  1.5 ± 0.5",
        "none                                                      not probed yet",
    ]
    assert f"| {label} | 2.0 | 1.5 ± 0.5 |" in table.markdown()


# --- training ---


def test_bands_are_means_between_the_lowest_and_highest_seed(tmp_path: Path) -> None:
    (arm,) = group(read(*(write_run(tmp_path / str(seed), seed=seed, quality=1 + seed) for seed in range(2))))
    found = band(arm, "train/loss")
    assert found is not None
    values = np.stack([run.curves["train/loss"][1] for run in arm.runs])
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose(found.low, values.min(axis=0))
    assert found.steps[-1] == 400
    assert found.seconds is not None
    assert found.seconds[-1] == pytest.approx((44 + 88) / 2)
    assert found.gflops[-1] == pytest.approx(arm.cost.training_gflops * 32 * 400)


def test_train_and_validation_are_never_mixed(tmp_path: Path) -> None:
    both, only = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, steps=800, validation=False)
    assert stage(group(read(both)), "loss", 2) == "validation"
    arms = group(read(both, only))
    assert stage(arms, "loss", 2) == "train"
    assert final_table(arms).title == "at the last step (train)"


def test_units_fit_the_size() -> None:
    assert [flops_text(value) for value in (0.5, 1500, 2.5e6, 3e10)] == [
        "0.5 GFLOPs",
        "1.5 TFLOPs",
        "2.5 PFLOPs",
        "30 EFLOPs",
    ]
    assert [time_text(value) for value in (41.2, 750, 11520, 260000)] == ["41 s", "12.5 min", "3.2 h", "3.01 d"]


def test_what_makes_losses_incomparable_is_said(tmp_path: Path) -> None:
    base = write_run(tmp_path / "a")
    other = write_run(
        tmp_path / "b", "other", changes={"model.codebook_size": 64, "model.mask_ratio": [0.7, 0.7], "data": "folder"}
    )
    text = together(base, other).text
    assert "different targets cannot be compared, their excess losses less so: codebook_size differs." in text
    assert "differently hidden patches, easier or harder to name: mask_ratio differs." in text
    assert "different data, so losses are of different clips (best-rq-2-tiny: soundworld; other: folder)." in text
    assert "targets" not in together(base).text


# --- references ---


def ship(folder: Path, seeds: int = 3) -> None:
    for seed in range(seeds):
        write_run(folder / "best-rq-2-tiny" / f"seed-{seed}", seed=seed)


def test_without_references_their_flag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "reference_folder", lambda: tmp_path / "none")
    with pytest.raises(DataError, match="no reference runs come with this version"):
        compare([write_run(tmp_path / "run")], tmp_path / "out", reference=True)


def test_health_is_judged_by_the_reference_at_the_same_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(tmp_path / "shipped")
    monkeypatch.setattr(references, "reference_folder", lambda: tmp_path / "shipped")
    well = write_run(tmp_path / "well", steps=800, reached=400)
    ill = write_run(tmp_path / "ill", seed=1, steps=800, reached=400, quality=0.05)
    other = write_run(tmp_path / "other", "mine", changes=ONE_STAGE)
    arms = group([*read(well, ill, other, unfinished=True), *references.reference_runs()])
    comparison = assemble(arms, tmp_path / "out", health_check=True)
    assert [arm.label for arm in comparison.arms][-1] == "reference: best-rq-2-tiny"
    said = comparison.sentences
    assert any("settings are not the reference's" in one and "trainer.max_steps" in one for one in said)
    assert [("inside" in one, "OUTSIDE" in one) for one in said if "well: excess loss" in one] == [(True, False)]
    assert any(
        "ill: excess loss" in one and "at 50 % of its steps, OUTSIDE of the reference's range" in one for one in said
    )
    assert any(
        "mine: no health check, for no reference is of the recipe mine (best-rq-2-tiny only)" in one for one in said
    )
    assert len(health(comparison.arms)) == 1 + 2 * 3 + 1


# --- figures and the command ---


def test_figures_have_a_line_an_arm(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    folders.append(write_run(tmp_path / "b", "one-stage", changes=ONE_STAGE, timing=False))
    drawn = figures.draw(together(*folders))
    counts = [[len(axes.get_lines()) for axes in drawn[name].axes] for name in ("loss", "codes")]
    zero = 1
    assert counts == [[2, 2, 1, 2 + zero, 2 + zero, 1 + zero], [2, 2, 2]]
    assert len(drawn["probes"].axes) == 8
    labels = [tick.get_text() for tick in drawn["probes"].axes[0].get_yticklabels()]
    assert labels == ["best-rq-2-tiny", "one-stage"]


def test_twelve_arms_have_looks_of_their_own() -> None:
    assert len({(figures.style(index)[0], str(figures.style(index)[1])) for index in range(12)}) == 12
    columns, rows = figures.legend_rows(["a rather long label of an arm, steps 20,000"] * 12)
    assert columns * rows >= 12
    assert columns <= 2


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    folders = [
        write_run(runs / f"{name}-{seed}", name, seed, probe=mean + 0.01 * seed, changes=changes)
        for name, mean, changes in (("best-rq-2-tiny", 0.6, {}), ("best-rq-vit-tiny", 0.5, ONE_STAGE))
        for seed in range(2)
    ]
    out = runs / "together"
    assert cli.run(["compare", *map(str, folders), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "best-rq-vit-tiny is 10.0 ± 3.0 points behind best-rq-2-tiny." in said
    assert {path.name for path in out.iterdir()} == {
        "table.md",
        "comparison.json",
        "probes.png",
        "loss.png",
        "codes.png",
    }
    for name in ("probes", "loss", "codes"):
        assert 1350 <= matplotlib.image.imread(out / f"{name}.png").shape[1] <= 1450
    page = (out / "table.md").read_text()
    assert "| best-rq-2-tiny | 65.5 ± 6.4 |" in page
    assert "| model.objective | two_step | one_stage |" in page
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["probes"]["linear"][0]["scores"]["mean"]["values"] == pytest.approx([0.6, 0.61])
    assert numbers["arms"][1]["runs"][1]["seed"] == 1
    assert numbers["pairs"][0]["difference"] == pytest.approx(-0.1)


def test_the_folder_of_an_earlier_comparison_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write", lambda comparison: None)
    runs = tmp_path / "runs"
    write_run(runs / "a")
    for _ in range(2):
        assert len(compare(sorted(runs.iterdir()), runs / "together").arms) == 1
    with pytest.raises(DataError, match="together: not a run folder"):
        compare(sorted(runs.iterdir()), tmp_path / "elsewhere")


def test_wrong_input_ends_the_command_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert cli.run(["compare"]) == 2
    assert cli.run(["compare", str(tmp_path), "--refrence"]) == 2
    assert "did you mean '--reference'" in capsys.readouterr().err
