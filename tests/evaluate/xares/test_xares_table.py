"""The printed table and the CSV: what a user reads of a complete and of a partial run."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

from bestrq2.evaluate.xares.entries import Score, XaresResult
from bestrq2.evaluate.xares.table import render_table, to_csv, write_csv
from published_models import published_result

SOME = ("esc50", "freemusicarchive", "gtzan_genre", "maestro", "nsynthinstument")


def partial(name: str = "mine") -> XaresResult:
    some = published_result("Dasheng", only=SOME, name=name)
    own = (Score("soundworld_word", "mlp", 0.615, "accuracy"), Score("soundworld_events", "mlp", 0.4, "mAP"))
    failures = {"desed": "desed/valid.tar is half downloaded: delete it", "soundworld_rhythm": "the encoder gave NaN"}
    return replace(some, scores=(*some.scores[:-1], *own), failures=failures)


def line(table: str, start: str) -> str:
    return next(one for one in table.splitlines() if one.strip().startswith(start))


def test_a_complete_run_shows_its_averages_beside_the_published_ones() -> None:
    table = render_table(published_result("Whisper", name="my encoder"))
    assert re.search(r"ASV2015\s+96\.6 /\s+84\.3\s+96\.4 /\s+86\.9", table)
    assert re.search(r"Clotho\s+3\.8 /\s+–", table)
    assert re.search(r"my encoder\s+49\.19\s+38\.67\s+28\.61\s+42\.75\s+38\.82", table)
    assert re.search(r"BEST-RQ-2\s+38\.49\s+54\.40\s+46\.39\s+43\.21\s+46\.43", table)
    assert re.search(r"my encoder\s+73\.49\s+43\.65\s+29\.47\s+53\.13\s+48\.87", table)
    assert re.search(r"BEST-RQ-2\s+–\s+–\s+–\s+49\s+50", table)
    assert "Missing" not in table
    assert "arXiv:2606.30700" in table
    assert "xares 0.1.3" in table
    assert "The scores took 19.0 min." in table


def test_a_partial_run_shows_no_mean_over_what_it_has() -> None:
    table = render_table(replace(partial(), scores=[score for score in partial().scores if score.task != "maestro"]))
    own = line(table, "mine  ")
    cells = re.split(r"\s{2,}", own.strip())
    assert cells == ["mine", "0 of 22 entries", "6 of 7 entries", "1 of 8 entries", *["7 of 37 entries"] * 2]
    assert re.search(r"mine\s+0 of 10 entries\s+3 of 4 entries\s+1 of 7 entries", table)
    assert re.search(r"mine\s+0 of 10 entries\s+61\.63\s+0 of 3 entries", table), "k-NN has no MAESTRO to miss"
    flat = " ".join(table.split())
    assert "7 of 37 entries were scored: a mean is given only where all its entries are there. Missing: ASV2015" in flat
    assert "MAESTRO, Clotho, DESED, ESC-50 (k-NN), FSD50k" in flat


def test_a_domain_that_is_whole_has_its_mean_though_others_lack() -> None:
    scores = published_result("Dasheng", only=SOME, name="mine").scores
    table = render_table(XaresResult("mine", scores[:-1]))
    assert re.search(r"mine\s+0 of 22 entries\s+65\.07\s+1 of 8 entries\s+8 of 37 entries", table)
    assert "ESC-50 (k-NN)" in table
    assert re.search(r"ESC-50\s+85\.7 /\s+none", table)


def test_failures_are_told_with_their_reason() -> None:
    table = render_table(partial())
    assert "DESED failed: desed/valid.tar is half downloaded: delete it" in table
    assert "soundworld_rhythm failed: the encoder gave NaN" in table
    assert re.search(r"DESED\s+failed /\s+–\s+53\.7", table)


def test_tasks_of_ones_own_stand_apart() -> None:
    table = render_table(partial())
    before, after = table.split("tasks outside of X-ARES")
    assert "soundworld" not in before
    assert re.search(r"soundworld_word\s+61\.5", after)
    assert re.search(r"soundworld_events\s+40\.0 /\s+none\s+mAP", after)
    alone = render_table(XaresResult("mine", partial().scores[-2:]))
    assert "None of the 37 entries of the published averages was scored" in alone
    assert "BEST-RQ-2" not in alone


def test_speech_recognition_and_private_tasks_stand_in_no_average() -> None:
    scores = (Score("librispeech", "mlp", 0.5, "WER_inv"), Score("finger_snap", "knn", 0.7, "accuracy"))
    table = render_table(XaresResult("mine", scores))
    assert table.index("tasks that no average counts") < table.index("LibriSpeech-ASR") < table.index("Finger snap")
    assert "global mean" not in table


def test_a_long_name_does_not_widen_the_table() -> None:
    long = render_table(partial("runs/" + "very-long-name-" * 9 + "seed-3"))
    assert max(map(len, long.splitlines()[1:])) <= 140
    assert "seed-3" in long


def test_csv_has_all_scores_and_averages_with_their_sources(tmp_path: Path) -> None:
    write_csv(tmp_path / "xares.csv", partial())
    assert (tmp_path / "xares.csv").read_text() == to_csv(partial())
    rows = list(csv.DictReader(io.StringIO(to_csv(partial()))))
    own = [row for row in rows if row["model"] == "mine"]
    assert len([row for row in own if row["kind"] == "score"]) == len(partial().scores)
    (speech,) = [row for row in own if (row["name"], row["domain"]) == ("37 entries", "speech")]
    assert (speech["percent"], speech["entries"]) == ("", "0 of 22")
    (best,) = [
        row for row in rows if (row["model"], row["name"], row["domain"]) == ("BEST-RQ-2.2", "37 entries", "music")
    ]
    assert best["percent"] == "63.90"
    assert best["source"].startswith("model cards")
