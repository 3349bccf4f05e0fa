"""Files of a run are read as far as they go, even where a kill cut them short."""

from __future__ import annotations

from pathlib import Path

import pytest

from bestrq2.errors import DataError
from bestrq2.run_records import flatten, newest_step, read_columns, read_metrics, read_settings, read_table


def test_truncated_rows_of_metrics_lose_only_their_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss,probe/mean\n10,0,4.5,\n20,0,3.25,0.5\n30,0,nan,\n40,0\n,1,2.0,0.75\n5")
    curves = {name: (steps.tolist(), values.tolist()) for name, (steps, values) in read_table(path).items()}
    assert curves == {"train/loss": ([10, 20], [4.5, 3.25]), "probe/mean": ([20], [0.5])}
    assert newest_step(path) == 40, "a step without a finite value was done nonetheless"


def test_a_table_without_rows_has_columns_and_no_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n")
    assert (read_columns(path), read_table(path), newest_step(path)) == (["step", "train/loss"], {}, None)
    path.write_text("")
    assert read_columns(path) == []
    with pytest.raises(DataError, match="no column 'step'; it found an empty file"):
        newest_step(path)


@pytest.mark.parametrize(
    ("logged", "shown"),
    [
        ([20, 40, 60, 65], [20, 40, 60]),
        ([20, 25], [20]),
        ([20, 40, 60], [20, 40, 60]),
        ([5], [5]),  # nothing to compare it with
        ([20, 60, 80, 100], [20, 60, 80, 100]),  # a value that was not finite leaves a gap
        ([20, 40, 50, 60, 80], [20, 40, 50, 60, 80]),  # extended after step 50
    ],
)
def test_a_last_value_over_fewer_steps_is_left_out_of_curves(
    tmp_path: Path, logged: list[int], shown: list[int]
) -> None:
    rows = "".join(f"{step},1.5,0.001,1.6,0.5\n" for step in logged)
    header = "step,train/excess_loss,train/learning_rate,validation/loss,probe/mean\n"
    (tmp_path / "metrics.csv").write_text(header + rows)
    curves = read_metrics(tmp_path / "metrics.csv")
    assert curves.pop("train/excess_loss")[0].tolist() == shown
    assert [steps.tolist() for steps, _ in curves.values()] == [logged] * 3


def test_validation_of_an_earlier_version_gets_the_entropy_of_training(tmp_path: Path) -> None:
    names = ("loss", "excess_loss", "target_entropy", "code_perplexity")
    header = ",".join(["step", *(f"{stage}/{name}" for stage in ("train", "validation") for name in names)])
    rows = "20,5.0,0.4,4.6,99,,,,\n40,4.5,-0.5,5.0,148,4.8,0.9,3.9,49\n"
    (tmp_path / "metrics.csv").write_text(f"{header}\n{rows}")
    curves = read_metrics(tmp_path / "metrics.csv")
    assert curves["validation/excess_loss"][1].tolist() == [pytest.approx(4.8 - 5.0)]
    assert sorted(curves) == sorted([*(f"train/{name}" for name in names), "validation/loss", "validation/excess_loss"])


def test_settings_have_dotted_names_with_the_root_first(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {mask_ratio: [0.4, 0.6], inner: {depth: 2}}\nloader: {}\nseed: 3\n")
    flat = flatten(read_settings(path))
    assert list(flat.items()) == [("seed", 3), ("model.mask_ratio", [0.4, 0.6]), ("model.inner.depth", 2)]
    path.write_text("- no settings\n")
    assert read_settings(path) == {}
    path.write_text("seed: [\n")
    with pytest.raises(DataError, match=r"config\.yaml: cannot be read as YAML"):
        read_settings(path)
