"""Training curves, health checks, tables, figures and the command of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from example_runs import ONE_STAGE, read, together, write_run

from bestrq2 import cli
from bestrq2.errors import DataError
from bestrq2.report import runs
from bestrq2.report.charts import series_style, svg_of_lines
from bestrq2.report.comparison import compare_runs, figures
from bestrq2.report.comparison.arms import band, group, stage
from bestrq2.report.comparison.comparison import assemble
from bestrq2.report.comparison.sentences import health
from bestrq2.report.comparison.tables import final_table
from bestrq2.report.scales import time_text
from bestrq2.text import flops_text

pytestmark = pytest.mark.usefixtures("steady_and_quick")


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
    assert final_table(arms).header[1] == "training loss"


def test_units_fit_the_size() -> None:
    assert [flops_text(value) for value in (0.5, 1500, 2.5e6, 3e10)] == [
        "0.5 GFLOPs",
        "1.5 TFLOPs",
        "2.5 PFLOPs",
        "30 EFLOPs",
    ]
    assert [time_text(value) for value in (41.2, 750, 11520, 260000)] == ["41 s", "12.5 min", "3.2 h", "3.01 d"]


def test_incomparable_losses_are_noted(tmp_path: Path) -> None:
    base = write_run(tmp_path / "a")
    other = write_run(
        tmp_path / "b", "other", changes={"model.codebook_size": 64, "model.mask_ratio": [0.7, 0.7], "data": "folder"}
    )
    text = together(base, other).text
    assert "different targets cannot be compared: codebook_size differs." in text
    assert "differently hidden patches, which are easier or harder to predict: mask_ratio differs." in text
    assert "different data, so their losses are on different clips (best-rq-2-tiny: soundworld; other: folder)." in text
    assert "targets" not in together(base).text


def test_no_axis_has_losses_that_cannot_be_compared(tmp_path: Path) -> None:
    fast = {"optimizer.lr": 1e-3}
    settings = {"a": {}, "b": fast, "c": {"teacher": "run"}, "d": {"loader.validation_clips": 8} | fast}
    comparison = together(*(write_run(tmp_path / name, name, changes=changes) for name, changes in settings.items()))
    rows = figures.loss_charts(comparison.arms)
    assert [[one.label for one in row[0].series] for row in rows] == [["a", "b"]] * 2 + [["c"]] * 2 + [["d"]] * 2
    assert [row[0].title for row in rows[::2]] == [
        "Loss (validation): a; b",
        "Loss (validation): c",
        "Loss (validation): d",
    ]
    assert "1 (seed 0)" in comparison.text


# --- references ---


def ship(folder: Path, seeds: int = 3) -> None:
    for seed in range(seeds):
        write_run(folder / "best-rq-2-tiny" / f"seed-{seed}", seed=seed)


def test_without_references_their_flag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "reference_folder", lambda: tmp_path / "none")
    with pytest.raises(DataError, match="no reference runs come with this version"):
        compare_runs([write_run(tmp_path / "run")], tmp_path / "out", reference=True)


def test_health_is_judged_by_the_reference_at_the_same_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(tmp_path / "shipped")
    monkeypatch.setattr(runs, "reference_folder", lambda: tmp_path / "shipped")
    well = write_run(tmp_path / "well", steps=800, reached=400)
    ill = write_run(tmp_path / "ill", seed=1, steps=800, reached=400, quality=0.05)
    other = write_run(tmp_path / "other", "mine", changes=ONE_STAGE)
    arms = group([*read(well, ill, other, unfinished=True), *runs.reference_runs()])
    comparison = assemble(arms, tmp_path / "out", health_check=True)
    assert [arm.label for arm in comparison.arms][-1] == "reference: best-rq-2-tiny"
    said = comparison.sentences
    assert any("settings are not the reference's" in one and "trainer.max_steps" in one for one in said)
    assert [("inside" in one, "OUTSIDE" in one) for one in said if "well: training excess loss" in one] == [
        (True, False)
    ]
    assert any(
        "ill: training excess loss" in one and "at 50 % of its steps, OUTSIDE of the reference's range" in one
        for one in said
    )
    assert any("mine: no health check" in one and "only of best-rq-2-tiny" in one for one in said)
    assert len(health(comparison.arms)) == 1 + 2 * 3 + 1


# --- tables, figures and the command ---


def test_charts_have_a_line_per_arm(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    folders.append(write_run(tmp_path / "b", "one-stage", changes=ONE_STAGE, timing=False))
    comparison = together(*folders)
    losses, codes = figures.loss_charts(comparison.arms), figures.code_charts(comparison.arms)
    assert [[len(chart.series) for chart in row] for row in losses + codes] == [[2, 2, 1], [2, 2, 1], [2, 2, 2]]
    assert losses[0][0].y == losses[0][2].y
    assert [losses[1][0].reference, losses[0][0].reference] == [0.0, None]
    probes = figures.probe_charts(comparison.probes, comparison.arms)
    assert {method: len(charts) for method, charts in probes.items()} == dict.fromkeys(
        ["Linear probe", "Linear, over time", "k-NN"], 5
    )
    speech = probes["Linear probe"][0]
    assert [row.label for row in speech.rows][:3] == ["best-rq-2-tiny", "one-stage", "log-mel statistics"]
    two, one = speech.rows[0].scores[0], speech.rows[1].scores[0]
    assert (two.value, two.low, two.high, len(two.seeds)) == (pytest.approx(65), two.value, two.value, 2)
    assert (one.low, one.seeds) == (one.value, (pytest.approx(65),))


def test_charts_without_values_say_why(tmp_path: Path) -> None:
    arms = together(write_run(tmp_path / "run", timing=False, probe=None)).arms
    chart = figures.loss_charts(arms)[0][2]
    assert (chart.series, chart.empty) == ([], "not recorded")
    assert "not recorded" in svg_of_lines([[chart]])


def test_svg_files_are_xml_with_all_texts_and_no_css_variables(tmp_path: Path) -> None:
    hostile = "a <b> & 'c'"
    comparison = together(*(write_run(tmp_path / f"{seed}", hostile, seed) for seed in range(2)))
    for name, text in figures.comparison_figures(comparison.arms, comparison.probes).items():
        root = ElementTree.fromstring(text)
        assert root.get("width") == "940", name
        assert hostile in {element.text for element in root.iter() if element.tag.endswith("text")} or name == "codes"
        assert "var(" not in text
        drawn = {style for element in root.iter() if (style := element.get("style")) and "stroke:#0067a5" in style}
        assert drawn, name
        for element in root.iter():
            assert "nan" not in (element.get("d") or "")


def test_sixteen_arms_have_looks_of_their_own() -> None:
    assert len({series_style(index) for index in range(16)}) == 16


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    folders = [
        write_run(folder / f"{name}-{seed}", name, seed, probe=mean + 0.01 * seed, changes=changes)
        for name, mean, changes in (("best-rq-2-tiny", 0.6, {}), ("best-rq-vit-tiny", 0.5, ONE_STAGE))
        for seed in range(2)
    ]
    out = folder / "together"
    assert cli.run(["compare", *map(str, folders), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "best-rq-vit-tiny is 10.0 ± 3.0 points behind best-rq-2-tiny." in said
    assert {path.name for path in out.iterdir()} == {
        "table.md",
        "comparison.json",
        "comparison.html",
        "probes.svg",
        "loss.svg",
        "codes.svg",
    }
    markdown = (out / "table.md").read_text()
    assert "| best-rq-2-tiny | 65.5 ± 6.4 |" in markdown
    assert "| model.objective | two_step | one_stage |" in markdown
    assert "![loss](loss.svg)" in markdown
    page = (out / "comparison.html").read_text()
    assert "best-rq-vit-tiny is 10.0 ± 3.0 points behind best-rq-2-tiny." in page
    assert '<td class="number">65.5 ± 6.4</td>' in page
    assert page.count('class="card curve"') == 9
    assert page.count('class="card scores"') == 15
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["probes"]["linear"][0]["scores"]["mean"]["values"] == pytest.approx([0.6, 0.61])
    assert numbers["arms"][1]["runs"][1]["seed"] == 1
    assert numbers["pairs"][0]["difference"] == pytest.approx(-0.1)


def test_the_folder_of_an_earlier_comparison_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    write_run(folder / "a")
    for _ in range(2):
        assert len(compare_runs(sorted(folder.iterdir()), folder / "together").arms) == 1
    with pytest.raises(DataError, match="together: not a run folder"):
        compare_runs(sorted(folder.iterdir()), tmp_path / "elsewhere")


def test_wrong_input_ends_the_command_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert cli.run(["compare"]) == 2
    assert cli.run(["compare", str(tmp_path), "--refrence"]) == 2
    assert "did you mean '--reference'" in capsys.readouterr().err
