"""X-ARES results in reports and comparisons; a partial result has no bar for a mean that it lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import example_report
import pytest
from example_runs import ONE_STAGE, read, together, write_run

from bestrq2.errors import BestRQ2Error, DataError
from bestrq2.evaluate.result import XARES, Result, write_result
from bestrq2.report.charts import ScoreChart
from bestrq2.report.page import ReportContents, render, write_run_report, write_xares_pages
from bestrq2.report.recordings import Recordings
from bestrq2.report.scores import PUBLISHED, PUBLISHED_FAMILY, ScoreSection, xares_section
from published_models import published_result, xares_score

NO_RECORDINGS = Recordings([], [], "folder", [], held_out=0)


def section(result: Result) -> ScoreSection:
    found = xares_section(result, [])
    assert found is not None
    return found


def chart(groups: dict[str, list[ScoreChart]], heading: str, title: str) -> ScoreChart:
    return next(chart for chart in groups[heading] if chart.title == title)


def partial(name: str = "mine") -> Result:
    some = published_result("Dasheng", ("esc50", "maestro", "librispeech"), name)
    own = xares_score("soundworld_word", "mlp", 0.615)
    return replace(some, scores=(*some.scores, own), failures={"desed": "the tar is half downloaded"})


def test_averages_are_shown_beside_published_ones() -> None:
    shown = section(published_result("Whisper", name="mine"))
    music = chart(shown.charts, "As the model cards average: 37 entries", "Music")
    assert [(row.label, row.scores[0].text) for row in music.rows][:2] == [
        ("mine", "38.67"),
        ("data2vec-audio-base", "23.24"),
    ]
    assert len(music.rows) == 11
    colours = {row.label: row.colour for row in music.rows}
    assert colours["BEST-RQ-2"] == colours["BEST-RQ (ViT)"] == PUBLISHED_FAMILY
    assert colours["whisper-base"] == colours["Audio-JEPA"] == PUBLISHED
    assert colours["mine"] not in (PUBLISHED, PUBLISHED_FAMILY)
    paper = chart(shown.charts, "As the paper averages: 21 datasets, k-NN", "Mean of means")
    assert [(row.label, row.scores[0].text) for row in paper.rows] == [
        ("mine", "26.29"),
        ("BEST-RQ", "25"),
        ("BEST-RQ-2", "38"),
    ]


def test_a_mean_that_lacks_entries_has_no_bar() -> None:
    shown = section(partial())
    mean = chart(shown.charts, "As the model cards average: 37 entries", "Global mean")
    assert (mean.rows[0].scores, mean.rows[0].note) == ((), "3 of 37 entries")
    assert "mine 3 of 37 entries" in mean.alternative
    assert any("Missing: ASV2015" in note for note in shown.notes)
    assert any(note == "DESED failed: the tar is half downloaded" for note in shown.notes)


def test_tasks_are_grouped_by_domain() -> None:
    shown = section(replace(partial(), provenance={"step": 4000}))
    assert list(shown.charts)[-4:] == [
        "Music",
        "Environment",
        "Tasks that no average counts",
        "Tasks outside of X-ARES",
    ]
    esc50 = chart(shown.charts, "Environment", "ESC-50")
    assert [score.text for score in esc50.rows[0].scores] == ["85.7", "61.8"]
    assert chart(shown.charts, "Environment", "DESED").rows[0].note == "failed"
    assert [row.label for row in chart(shown.charts, "Tasks outside of X-ARES", "soundworld_word").rows] == ["mine"]
    assert shown.notes[0] == "Scored at step 4,000."


def test_other_tasks_alone_show_no_published_scores() -> None:
    shown = section(Result(XARES, "mine", (xares_score("soundworld_word", "knn", 0.5),)))
    assert list(shown.charts) == ["Tasks outside of X-ARES"]
    assert list(shown.legend) == ["mine"]
    assert xares_section(None, []) is None


def test_a_run_keeps_its_colour() -> None:
    runs = [example_report.example_run("first", "one", 1.0, 0), example_report.example_run("second", "two", 1.0, 1)]
    for name, colour in (("second", "var(--s1)"), ("foreign", "var(--s2)")):
        found = xares_section(partial(name), runs)
        assert found is not None
        assert found.legend[name] == colour


def test_page_shows_the_section_and_keeps_hostile_names_text() -> None:
    page = render(ReportContents("t", "l", xares=partial("<script>alert(1)</script>")))
    assert '<section id="xares">' in page
    assert '<a href="#xares">' in page
    assert "<script>alert" not in page
    assert "width:85.7%" in page
    assert "61.50" in page[page.index('class="xares-table"') :]
    assert 'id="xares"' not in render(ReportContents("t", "l"))


def test_a_damaged_result_of_a_run_is_noted_in_its_report(tiny_pretraining: Callable[..., Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    tiny_pretraining().save_pretrained(run / "model")
    write_result(run / "xares.json", partial())
    assert '<section id="xares">' in write_run_report(run, NO_RECORDINGS).read_text()
    (run / "xares.json").write_text('{"benchmark": "x-ares"')
    page = write_run_report(run, NO_RECORDINGS).read_text()
    assert '<section id="xares">' not in page
    assert "xares.json: is not a JSON file" in page


def test_a_page_is_written_beside_every_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_result(run / "xares.json", partial())
    write_result(tmp_path / "asked.json", published_result("Whisper", name="mine"))
    pages = write_xares_pages(run, tmp_path / "asked.json")
    assert pages == [run / "xares.html", tmp_path / "asked.html"]
    assert "<h1>X-ARES: mine</h1>" in pages[0].read_text()
    assert "soundworld_word" in pages[0].read_text()
    assert "soundworld_word" not in pages[1].read_text()
    (tmp_path / "asked.html").unlink()
    (tmp_path / "asked.html").mkdir()
    with pytest.raises(BestRQ2Error, match=r"asked.* cannot be written"):
        write_xares_pages(run, tmp_path / "asked.json")


@pytest.mark.usefixtures("steady_and_quick")
def test_comparison_averages_over_the_seeds_that_are_whole(tmp_path: Path) -> None:
    one, two, three = (write_run(tmp_path / f"seed-{seed}", seed=seed) for seed in range(3))
    write_result(one / "xares.json", published_result("Whisper"))
    write_result(two / "xares.json", published_result("data2vec"))
    write_result(three / "xares.json", partial())
    other = write_run(tmp_path / "other", changes=ONE_STAGE)
    comparison = together(one, two, three, other)
    table, tasks = [table for table in comparison.tables if table.title.startswith("X-ARES")]
    esc50 = next(row for row in tasks.rows if row[0] == "esc50")
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d / \d+\.\d ± \d+\.\d", esc50[1]), esc50
    assert esc50[2] == "–"
    # Whisper 42.75 and data2vec 37.83: mean 40.29, half the interval 12.706 x 4.92 / 2 of unrounded values
    mean = table.rows[0][4]
    assert re.fullmatch(r"40\.29 ± 31\.2\d \(2 of 3 seeds\)", mean)
    assert table.rows[1][1:] == ("not run",)
    assert ("BEST-RQ-2 (published)", "38.49", "54.40", "46.39", "43.21", "46.43") in table.rows
    numbers = json.loads(comparison.json())["arms"]
    assert numbers[0]["xares"][2]["37 entries"]["global_mean"] == {"value": None, "found": 3, "expected": 37}
    assert numbers[1]["xares"] == [None]


@pytest.mark.usefixtures("steady_and_quick")
def test_incomplete_means_give_their_number_of_entries(tmp_path: Path) -> None:
    run, bare = write_run(tmp_path / "run"), write_run(tmp_path / "bare", seed=1)
    assert not [table for table in together(run, bare).tables if table.title.startswith("X-ARES")]
    write_result(run / "xares.json", partial())
    table, tasks = [table for table in together(run, bare).tables if table.title.startswith("X-ARES")]
    assert {row[0] for row in tasks.rows} == {score.task for score in partial().scores}
    assert table.rows[0][1:] == ("0 of 22 entries", "1 of 7 entries", "2 of 8 entries", *["3 of 37 entries"] * 2)


def test_result_of_other_weights_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_result(run / "xares.json", replace(partial(), provenance={"step": 200, "seed": 0}))
    with pytest.raises(DataError, match=r"at step 200 and is now at step 400: run X-ARES again with `bestrq2 xares"):
        read(run)
    write_result(run / "xares.json", replace(partial(), provenance={"step": 400, "seed": 7}))
    with pytest.raises(DataError, match="has seed 0, but its probe result is of seed 7"):
        read(run)
    (run / "xares.json").write_text("[]")
    with pytest.raises(DataError, match=r"run/xares.json: is not a result of bestrq2"):
        read(run)
