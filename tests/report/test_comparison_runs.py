"""Reading of run folders for a comparison: arms, labels, and folders that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from example_runs import ONE_STAGE, read, result, together, write_run

from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.result import write_result
from bestrq2.report.comparison import compare_runs
from bestrq2.report.comparison.arms import group
from bestrq2.report.comparison.probes import pairs, probe_rows
from bestrq2.report.comparison.sentences import notes
from bestrq2.report.runs import read_run, value_text

pytestmark = pytest.mark.usefixtures("steady_and_quick")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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
        compare_runs(folders, tmp_path / "out")


def test_settings_are_readable() -> None:
    assert value_text([0.4, 0.6], "model.mask_ratio") == "0.4–0.6"
    assert value_text([0.1 + 0.2, 0.1 + 0.2], "model.mask_ratio") == "0.3"
    assert value_text([32, 8], "model.patch_size") == "32 x 8"
    assert value_text(3000, "trainer.max_steps") == "3,000"
    assert [value_text(value) for value in (20000, True, None, 3e-4)] == ["20,000", "on", "none", "0.0003"]


def test_labels_stay_apart_where_folders_of_many_arms_have_the_same_names(tmp_path: Path) -> None:
    """More settings differ than labels name, and all folders are called seed-0."""
    settings = [
        {"optimizer.lr": 1e-4 * (1 + i % 2), "model.codebook_size": 64 * (1 + i // 2 % 2), "loader.batch_seconds": 80,
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


# --- reading ---


def test_wall_time_of_which_the_beginning_is_lost_is_not_given(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "timing.csv").read_text().splitlines()
    (run / "timing.csv").write_text("\n".join([lines[0], *lines[-2:]]) + "\n")
    assert read_run(run).seconds() is None


def test_a_probe_before_the_first_step_and_a_last_window_of_few_steps_are_no_part_of_the_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=390)
    rows = (run / "metrics.csv").read_text().splitlines()
    probed = [f"{row},{'probe/mean' if number == 0 else ''}" for number, row in enumerate(rows)]
    probed.insert(1, "0" + "," * rows[0].count(",") + ",0.25")
    (run / "metrics.csv").write_text("\n".join(probed) + "\n")
    found = read_run(run)
    assert found.curves["probe/mean"][0].tolist() == [0]
    assert found.curves["train/loss"][0].tolist() == list(range(20, 381, 20))
    assert (found.steps, found.seconds()) == (390, pytest.approx(0.11 * 380))
    assert not [note for note in notes(group([found])) if "finite" in note]


def test_settings_that_json_does_not_know_and_other_scores_beside_a_run_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", probe=None, changes={"trainer.gradient_clip_val": math.inf})
    (run / "soundworld-scores.json").write_text("{}")
    assert json.loads(together(run).json())["arms"][0]["settings"]["trainer.gradient_clip_val"] == "inf"


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
        ("- 1", "not the configuration of a pretraining run: it lacks recipe"),
        (
            "recipe: a\ndata: b\nseed: 0\nloader: {batch_seconds: 4}\ntrainer: {max_steps: 9}\n"
            "model: {masks_per_clip: 4}",
            "has model.masks_per_clip 4, which this version",
        ),
        (
            "recipe: a\ndata: b\nseed: x\nloader: {batch_seconds: 4}\ntrainer: {max_steps: 9}",
            "seed must be a whole number",
        ),
        (
            "recipe: a\ndata: b\nseed: 0\nloader: {batch_seconds: 4}\ntrainer: {max_steps: 9}\nmodel: {flux: 1}",
            "no field 'flux'",
        ),
    ],
)
def test_invalid_configurations_are_refused(tmp_path: Path, text: str, message: str) -> None:
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
        compare_runs([short], tmp_path / "out")
    arms = group(read(short, write_run(tmp_path / "whole", seed=1), unfinished=True))
    assert [arm.label for arm in arms] == ["best-rq-2-tiny (unfinished, step 100 of 400)", "best-rq-2-tiny"]


def test_results_of_an_earlier_step_or_another_seed_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_result(folder / "soundworld-2.json", result(0.6, step=300))
    with pytest.raises(DataError, match=r"run: was probed at step 300 and is now at step 400: probe it again"):
        read_run(folder)
    write_result(folder / "soundworld-2.json", result(0.6, seed=5))
    with pytest.raises(DataError, match="has seed 0, but its probe result is of seed 5"):
        read_run(folder)


def test_results_of_different_protocols_are_refused(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    content = json.loads((two / "soundworld-2.json").read_text())
    edit(two / "soundworld-2.json", provenance=content["provenance"] | {"synthesiser": "formant"})
    with pytest.raises(
        DataError, match=r"one and .*two .*probed in different ways: synthesiser is 'espeak' .*'formant'"
    ):
        compare_runs([one, two], tmp_path / "out")
    protocol = content["provenance"]["protocol"]
    edit(two / "soundworld-2.json", provenance=content["provenance"] | {"protocol": protocol | {"folds": 5}})
    with pytest.raises(DataError, match=r"two/soundworld-2.json: the protocol has folds 5"):
        compare_runs([one, two], tmp_path / "out")
    edit(two / "soundworld-2.json", provenance=content["provenance"] | {"protocol": protocol | {"windows": 3}})
    with pytest.raises(DataError, match=r"protocol.windows is None in the first and 3 in the second"):
        compare_runs([one, two], tmp_path / "out")
    edit(two / "soundworld-2.json", benchmark="soundworld-9")
    with pytest.raises(DataError, match=r"two/soundworld-2.json: is a result of soundworld-9, not of soundworld-2"):
        compare_runs([one, two], tmp_path / "out")


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
        compare_runs([write_run(tmp_path / "run")], tmp_path / "out")
