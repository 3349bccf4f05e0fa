"""Curves of run folders, and charts of them with readable axes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestrq2.errors import DataError
from bestrq2.report.charts import LineChart, Series
from bestrq2.report.curves import FURTHER, RunCurves, curve_charts, model_colours, run_labels, runs_table
from bestrq2.report.runs import read_curves
from bestrq2.report.scales import padded_axis

METRICS = """epoch,step,train/loss,train/accuracy,validation/loss,probe/speech
0,10,7.5,0.01,,
0,20,6.25,0.02,,
0,20,,,6.5,0.31
1,30,5.5,nan,,
1,30,5.0,0.04,,
1,40,inf,0.05,5.25,0.36
1,5
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "first-run"
    folder.mkdir()
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "config.yaml").write_text(
        "recipe: best-rq-2-tiny\nseed: 3\nmodel:\n  seed: 9\n  hidden_size: 128\n  mask_ratio: [0.4, 0.6]\n"
        "trainer:\n  max_steps: 200000\noptimizer:\n  lr: 0.002\n"
    )
    return folder


def test_curves_hold_what_was_logged(run_folder: Path) -> None:
    run = read_curves(run_folder)
    assert set(run.curves) == {"train/loss", "train/accuracy", "validation/loss", "probe/speech"}
    steps, values = run.curves["train/loss"]
    assert steps.dtype == np.int64
    assert (steps.tolist(), values.tolist()) == ([10, 20, 30], [7.5, 6.25, 5.0])
    steps, values = run.curves["validation/loss"]
    assert (steps.tolist(), values.tolist()) == ([20, 40], [6.5, 5.25])
    steps, values = run.curves["train/accuracy"]
    assert (steps.tolist(), values.tolist()) == ([10, 20, 30, 40], [0.01, 0.02, 0.04, 0.05])


def test_facts_come_from_the_configuration(run_folder: Path) -> None:
    run = read_curves(run_folder)
    assert (run.name, run.label) == ("first-run", "best-rq-2-tiny")
    assert run.facts["seed"] == "3"
    assert run.facts["width"] == "128"
    assert run.facts["share hidden"] == "0.4–0.6"
    assert run.facts["steps"] == "200,000"
    assert run.facts["learning rate"] == "0.002"


@pytest.mark.parametrize("config", [None, "", "- a list", "recipe: [unclosed", "\x00"])
def test_curves_are_read_whatever_the_configuration(run_folder: Path, config: str | None) -> None:
    (run_folder / "config.yaml").unlink()
    if config is not None:
        (run_folder / "config.yaml").write_text(config)
    run = read_curves(run_folder)
    assert (run.label, run.facts) == ("first-run", {})
    assert len(run.curves) == 4


def test_unusable_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.csv"):
        read_curves(tmp_path)
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1\n")
    with pytest.raises(DataError, match="no column 'step'"):
        read_curves(tmp_path)


def curve(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values)) * 10, np.array(values)


def loss_chart(*runs: RunCurves) -> LineChart:
    return curve_charts(runs)["Prediction of the codes"][0]


def test_charts_overlay_runs_and_tell_validation_apart() -> None:
    runs = [
        RunCurves(name, name, {}, {"train/loss": curve([5.0, 4.0, 3.0]), "validation/loss": curve([5.5, 4.5, 3.5])})
        for name in ("a", "b")
    ]
    chart = loss_chart(*runs)
    assert [(one.label, one.kind) for one in chart.series[:2]] == [
        ("a, training", "noisy"),
        ("a, validation", "checks"),
    ]
    assert len({one.colour for one in chart.series}) == 2
    assert [one["y"] for one in chart.readings["series"]] == [[5, 4, 3], [5.5, 4.5, 3.5]] * 2
    assert "a, training from 5.000 to 3.000" in chart.alternative
    dashed = re.findall(r"stroke-dasharray:5 4", chart.plot())
    assert len(dashed) == 2


def test_every_logged_quantity_has_one_chart() -> None:
    names = ["train/loss", "train/excess_loss", "train/code_perplexity", "probe/music", "train/learning_rate", "weird"]
    run = RunCurves("r", "r", {}, {name: curve([0.1, 0.2, 0.15]) for name in names})
    assert {title: [chart.title for chart in charts] for title, charts in curve_charts([run]).items()} == {
        "Prediction of the codes": ["Loss", "Excess loss"],
        "Use of the codebook": ["Code perplexity"],
        "Probes during training": ["Music"],
        FURTHER: ["Learning rate", "Weird"],
    }


def test_charts_say_which_direction_is_better() -> None:
    names = ["loss", "excess_loss", "accuracy", "code_perplexity", "skipped_steps", "probe/music"]
    run = RunCurves("r", "r", {}, {name: curve([0.1, 0.2]) for name in names})
    better = {chart.title: chart.better for charts in curve_charts([run]).values() for chart in charts}
    assert better == {
        "Loss": "lower",
        "Excess loss": "lower",
        "Accuracy": "higher",
        "Code perplexity": "",
        "Skipped steps": "lower",
        "Music": "higher",
    }


def test_skipped_steps_are_whole_numbers() -> None:
    run = RunCurves("r", "r", {}, {"train/skipped_steps": curve([0.0, 7.0])})
    (chart,) = curve_charts([run])[FURTHER]
    assert [tick.text for tick in chart.y_ticks] == ["0", "2", "4", "6"]
    assert ("final skipped steps", ["7"]) in runs_table([run])


def test_constants_are_values_and_no_charts() -> None:
    logged = {"train/skipped_steps": curve([0.0, 0.0]), "train/learning_rate": curve([0.5, 0.5])}
    runs = [RunCurves("a", "a", {}, logged)]
    assert curve_charts(runs) == {}
    assert runs_table(runs) == [("final skipped steps", ["0"]), ("learning rate (constant)", ["0.500"])]
    runs.append(RunCurves("b", "b", {}, {"train/learning_rate": curve([0.5, 0.25])}))
    assert [len(chart.series) for chart in curve_charts(runs)[FURTHER]] == [2]


def test_every_curve_spans_the_width_of_its_chart() -> None:
    line = np.array([0.0, 2.0])
    series = [Series(kind, "red", line, line + 1, kind=kind) for kind in ("mean", "checks", "mean")]
    drawn = str(LineChart(title="t", y_label="y", series=series).plot())
    assert re.findall(r'd="M([\d.]+) [\d.]+L([\d.]+)', drawn) == [("0.0", "1000.0")] * 3


def test_long_records_are_thinned_but_end_where_they_end() -> None:
    values = np.sin(np.arange(5000) / 300) + 2
    (series,) = loss_chart(RunCurves("r", "r", {}, {"train/loss": (np.arange(5000), values)})).series
    assert len(series.x) <= 400
    assert series.x[-1] == 4999
    np.testing.assert_allclose(series.y, np.interp(series.x, np.arange(5000), values), atol=0.01)


def test_the_steep_beginning_does_not_flatten_the_rest() -> None:
    values = np.r_[900.0, np.linspace(4, 3, 999)]
    chart = loss_chart(RunCurves("r", "r", {}, {"validation/loss": (np.arange(1000), values)}))
    assert chart.y.low < 3 < 4 < chart.y.high < 20


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0 + 1e-12], [np.nan, 1.0]])
def test_degenerate_records_stay_inside_their_chart(values: list[float]) -> None:
    paths = re.findall(r' d="([^"]+)"', loss_chart(RunCurves("r", "r", {}, {"train/loss": curve(values)})).plot())
    assert all(0 <= float(number) <= 1000 for path in paths for number in re.findall(r"[\d.]+", path))


def test_records_of_nothing_finite_have_no_chart() -> None:
    assert curve_charts([RunCurves("r", "r", {}, {"train/loss": curve([np.nan, np.inf])})]) == {}


def test_table_labels_training_and_validation_and_marks_what_is_missing() -> None:
    runs = [
        RunCurves("a", "a", {"seed": "1"}, {"train/loss": curve([3.0]), "validation/loss": curve([3.5])}),
        RunCurves("b", "b", {}, {"train/loss": curve([2.5]), "train/accuracy": curve([0.125])}),
    ]
    assert runs_table(runs) == [
        ("seed", ["1", "–"]),
        ("final loss (training)", ["3.000", "2.500"]),
        ("final loss (validation)", ["3.500", "–"]),
        ("final accuracy (training)", ["–", "12.5\u202f%"]),
    ]


def test_features_share_the_colour_of_their_run_and_no_other() -> None:
    runs = [RunCurves("two-step", "Two steps", {}, {}), RunCurves("one-stage", "One stage", {}, {})]
    colours = model_colours(["one stage", "two-step", "random", "log-mel", "other"], runs, ("var(--b0)", "var(--b1)"))
    assert colours["two-step"] == "var(--s0)"
    assert colours["one stage"] == "var(--s1)"
    assert colours["random"] == "var(--b0)"
    assert len(set(colours.values())) == 5


def test_runs_of_the_same_recipe_are_told_apart() -> None:
    runs = [RunCurves("r1", "demo", {}, {}), RunCurves("r2", "demo", {}, {}), RunCurves("r3", "other", {}, {})]
    assert run_labels(runs) == {"r1": "r1", "r2": "r2", "r3": "other"}


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-4, 1e6),
    st.sampled_from(["number", "percent"]),
)
def test_ticks_lie_on_the_axis_at_different_readable_values(low: float, span: float, unit: str) -> None:
    ticks = padded_axis(low, low + span, unit).ticks()  # type: ignore[arg-type]
    assert 1 <= len(ticks) <= 8
    assert all(-0.01 <= tick.at <= 100.01 for tick in ticks)
    if span > 1e-3 * abs(low):
        assert len({tick.text for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("low", "high", "unit", "texts"),
    [
        (0, 3000, "number", ["0", "1k", "2k", "3k"]),
        (0, 0.2, "percent", ["0\u202f%", "5\u202f%", "10\u202f%", "15\u202f%", "20\u202f%"]),
        (-2, 2, "number", ["−2", "−1", "0", "1", "2"]),
        (0, 1e-3, "number", ["0", "2.5e−4", "5e−4", "7.5e−4", "1e−3"]),
        (0.0625, 0.0626, "number", ["0.062500", "0.062525", "0.062550", "0.062575", "0.062600"]),
    ],
)
def test_ticks_read_well(low: float, high: float, unit: str, texts: list[str]) -> None:
    axis = padded_axis(low, high, unit, padding=0.0)  # type: ignore[arg-type]
    assert [tick.text for tick in axis.ticks()] == texts
