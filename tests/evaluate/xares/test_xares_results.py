"""Results of X-ARES: the published averages come out of the published scores, and a partial run gets none."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bestrq2.errors import DataError
from bestrq2.evaluate.published import published_averages, published_scores
from bestrq2.evaluate.result import XARES, Result, TaskScore, write_result
from bestrq2.evaluate.xares.results import (
    ENTRIES_37,
    PAPER_KNN,
    PAPER_LINEAR,
    Mean,
    averages,
    entry_titles,
    missing_entries,
    plain_averages,
    read_xares_result,
    xares_csv,
    xares_parts,
)
from bestrq2.evaluate.xares.tasks import DOMAINS, TASKS
from published_models import published_result, xares_score

CARDS = published_averages("X-ARES", "37 entries")


def scores_of(value_of: dict[str, tuple[float, float]]) -> list[TaskScore]:
    """Complete scores: domain → (linear, k-NN) of all its tasks."""
    return [
        xares_score(task.name, method, value_of[task.domain][method == "knn"], task.metric)
        for task in TASKS.values()
        if task.entries
        for method in task.methods
    ]


def test_entries_are_those_of_the_cards_and_of_the_paper() -> None:
    assert {domain: len(entries) for domain, entries in ENTRIES_37.entries.items()} == {
        "speech": 22,
        "music": 7,
        "environment": 8,
    }
    assert [len(entries) for entries in PAPER_LINEAR.entries.values()] == [10, 4, 7]
    assert [len(entries) for entries in PAPER_KNN.entries.values()] == [10, 3, 3]
    assert ("vocalimitations", "mlp") in ENTRIES_37.entries["speech"]
    assert ("vocalimitations", "mlp") in PAPER_LINEAR.entries["environment"]
    assert not [task for task, _ in ENTRIES_37.all_entries if task in ("librispeech", "finger_snap", "liveenv")]


def test_averages_of_given_scores_are_those_counted_by_hand() -> None:
    scores = scores_of({"speech": (0.8, 0.4), "music": (0.7, 0.35), "environment": (0.5, 0.9)})
    cards = averages(scores, ENTRIES_37)
    # Speech 11 x 0.8 + 11 x 0.4 = 13.2; music 4 x 0.7 + 3 x 0.35 = 3.85; environment 6 x 0.5 + 2 x 0.9 = 4.8
    assert [cards[domain].value for domain in DOMAINS] == pytest.approx([13.2 / 22, 3.85 / 7, 4.8 / 8])
    assert cards["global_mean"].value == pytest.approx(21.85 / 37)
    assert cards["mean_of_means"].value == pytest.approx((0.6 + 0.55 + 0.6) / 3)
    # Vocal Imitation brings 0.8 into the environment: 6 x 0.5 + 0.8 = 3.8
    linear = averages(scores, PAPER_LINEAR)
    assert linear["environment"].value == pytest.approx(3.8 / 7)
    assert linear["global_mean"].value == pytest.approx((10 * 0.8 + 4 * 0.7 + 3.8) / 21)
    # and 0.4 under k-NN: 2 x 0.9 + 0.4 = 2.2
    knn = averages(scores, PAPER_KNN)
    assert knn["environment"].value == pytest.approx(2.2 / 3)
    assert knn["global_mean"].value == pytest.approx((10 * 0.4 + 3 * 0.35 + 2.2) / 16)
    assert knn["mean_of_means"].value == pytest.approx((0.4 + 0.35 + 2.2 / 3) / 3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("Whisper", "whisper-base"), ("data2vec", "data2vec-audio-base"), ("Dasheng", "Dasheng-base")],
)
def test_published_scores_give_the_published_averages(ours: str, theirs: str) -> None:
    cards = averages(published_result(ours).scores, ENTRIES_37)
    (row,) = [row for row in CARDS if row.model == theirs]
    assert [mean.text for mean in cards.values()] == list(row.cells)


def test_published_scores_give_the_averages_of_the_paper() -> None:
    linear = averages(published_result("Whisper").scores, PAPER_LINEAR)
    (row,) = [row for row in published_averages("X-ARES", PAPER_LINEAR.name) if row.model == "Whisper"]
    assert (linear["global_mean"].value, linear["mean_of_means"].value) == pytest.approx((0.53, 0.49), abs=0.005)
    assert (row.global_mean, row.mean_of_means) == ("53", "49")


@pytest.mark.parametrize("row", CARDS, ids=lambda row: row.model)
def test_published_rows_agree_with_themselves(row) -> None:
    speech, music, environment = (float(cell) for cell in row.cells[:3])
    # Domain means are rounded to 0.005, and so are the means over them.
    of_music = 6 if row.model == "Audio-JEPA" else 7
    mean = (22 * speech + of_music * music + 8 * environment) / (30 + of_music)
    assert float(row.global_mean) == pytest.approx(mean, abs=0.0101)
    assert ("6 entries of music" in row.note) == (of_music == 6), "a row that does not fit must say so"
    assert float(row.mean_of_means) == pytest.approx((speech + music + environment) / 3, abs=0.0101)


def test_every_published_figure_has_a_source() -> None:
    rows = [*published_averages("X-ARES"), *published_averages("XARES-LLM")]
    assert len(rows) == 19
    assert all(row.source for row in rows)
    assert all(one.source and 0 <= one.percent <= 100 for one in published_scores())
    assert {(one.task, one.method) for one in published_scores()} == {*ENTRIES_37.all_entries, ("librispeech", "mlp")}


def test_a_mean_needs_all_its_entries() -> None:
    whole = published_result("Dasheng").scores
    partial = [score for score in whole if (score.task, score.method) != ("esc50", "knn")]
    cards = averages(partial, ENTRIES_37)
    assert cards["environment"] == Mean(None, 7, 8)
    assert cards["global_mean"] == Mean(None, 36, 37)
    assert cards["mean_of_means"] == Mean(None, 36, 37)
    assert cards["speech"].value is not None
    assert missing_entries(partial, ENTRIES_37) == [("esc50", "knn")]
    assert missing_entries(partial, PAPER_LINEAR) == []
    assert averages([], ENTRIES_37)["global_mean"] == Mean(None, 0, 37)


def test_scores_of_other_tasks_change_no_average() -> None:
    whole = published_result("Dasheng").scores
    more = [*whole, xares_score("soundworld_rhythm", "mlp", 0.01), xares_score("finger_snap", "knn", 0.0)]
    assert averages(more, ENTRIES_37) == averages(whole, ENTRIES_37)


def test_missing_entries_are_named_with_the_method_where_the_task_has_another() -> None:
    missing = (("clotho", "mlp"), ("esc50", "knn"), ("gtzan_genre", "mlp"), ("gtzan_genre", "knn"))
    assert entry_titles(missing) == ["Clotho", "ESC-50 (k-NN)", "GTZAN"]


SOME = ("esc50", "freemusicarchive", "gtzan_genre", "maestro", "nsynthinstument")


def partial(name: str = "mine") -> Result:
    some = published_result("Dasheng", only=SOME, name=name)
    own = (xares_score("soundworld_word", "mlp", 0.615), xares_score("soundworld_events", "mlp", 0.4, "mAP"))
    failures = {"desed": "desed/valid.tar is half downloaded: delete it", "soundworld_rhythm": "the encoder gave NaN"}
    return replace(some, scores=(*some.scores[:-1], *own), failures=failures)


def shown(result: Result) -> str:
    return str(replace(result, parts=xares_parts))


def line(table: str, start: str) -> str:
    return next(one for one in table.splitlines() if one.strip().startswith(start))


def test_a_complete_run_shows_its_averages_beside_the_published_ones() -> None:
    table = shown(published_result("Whisper", name="my encoder"))
    assert re.search(r"ASV2015\s+96\.6 /\s+84\.3\s+96\.4 /\s+86\.9", table)
    assert re.search(r"Clotho \(recallatk_r1\)\s+3\.8 /\s+–", table)
    assert re.search(r"my encoder\s+49\.19\s+38\.67\s+28\.61\s+42\.75\s+38\.82", table)
    assert re.search(r"BEST-RQ-2\s+38\.49\s+54\.40\s+46\.39\s+43\.21\s+46\.43", table)
    assert re.search(r"my encoder\s+73\.49\s+43\.65\s+29\.47\s+53\.13\s+48\.87", table)
    assert re.search(r"BEST-RQ-2\s+–\s+–\s+–\s+49\s+50", table)
    assert "Missing" not in table
    assert "arXiv:2606.30700" in table
    assert "xares 0.1.3" in table
    assert "The scores took 19.0 min." in table


def test_a_partial_run_shows_no_mean_over_what_it_has() -> None:
    table = shown(replace(partial(), scores=[score for score in partial().scores if score.task != "maestro"]))
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
    table = shown(Result(XARES, "mine", scores[:-1]))
    assert re.search(r"mine\s+0 of 22 entries\s+65\.07\s+1 of 8 entries\s+8 of 37 entries", table)
    assert "ESC-50 (k-NN)" in table
    assert re.search(r"ESC-50\s+85\.7 /\s+none", table)


def test_failures_are_told_with_their_reason() -> None:
    table = shown(partial())
    assert "DESED failed: desed/valid.tar is half downloaded: delete it" in table
    assert "soundworld_rhythm failed: the encoder gave NaN" in table
    assert re.search(r"DESED \(segmentf1_macro\)\s+failed /\s+–\s+53\.7", table)


def test_tasks_of_ones_own_stand_apart() -> None:
    table = shown(partial())
    before, after = table.split("tasks outside of X-ARES")
    assert "soundworld" not in before
    assert re.search(r"soundworld_word\s+61\.5", after)
    assert re.search(r"soundworld_events\s+40\.0 /\s+none\s+mAP", after)
    alone = shown(Result(XARES, "mine", partial().scores[-2:]))
    assert "None of the 37 entries of the published averages was scored" in alone
    assert "BEST-RQ-2" not in alone


def test_speech_recognition_and_private_tasks_stand_in_no_average() -> None:
    scores = (xares_score("librispeech", "mlp", 0.5, "WER_inv"), xares_score("finger_snap", "knn", 0.7))
    table = shown(Result(XARES, "mine", scores))
    assert table.index("tasks that no average counts") < table.index("LibriSpeech-ASR") < table.index("Finger snap")
    assert "global mean" not in table


def test_a_long_name_does_not_widen_the_table() -> None:
    long = shown(partial("runs/" + "very-long-name-" * 9 + "seed-3"))
    assert max(map(len, long.splitlines()[1:])) <= 120
    assert "seed-3" in long


def test_csv_has_all_scores_and_averages_with_their_sources() -> None:
    rows = list(csv.DictReader(io.StringIO(xares_csv(partial()))))
    own = [row for row in rows if row["model"] == "mine"]
    assert len([row for row in own if row["kind"] == "score"]) == len(partial().scores)
    (speech,) = [row for row in own if (row["name"], row["domain"]) == ("37 entries", "speech")]
    assert (speech["percent"], speech["entries"]) == ("", "0 of 22")
    (best,) = [
        row for row in rows if (row["model"], row["name"], row["domain"]) == ("BEST-RQ-2.2", "37 entries", "music")
    ]
    assert best["percent"] == "63.90"
    assert best["source"].startswith("model cards")


def test_the_file_holds_versions_and_averages_that_name_what_they_lack(tmp_path: Path) -> None:
    write_result(tmp_path / "xares.json", partial(), plain_averages(partial()))
    assert read_xares_result(tmp_path / "xares.json") == replace(partial(), scores=tuple(partial().scores))
    content = json.loads((tmp_path / "xares.json").read_text())
    assert content["provenance"]["xares"] == "0.1.3"
    cards = content["means"]["37 entries"]
    assert cards["environment"] == {"value": None, "found": 1, "expected": 8}
    assert "esc50/mlp" not in cards["missing"]
    assert "desed/mlp" in cards["missing"]
    assert len(cards["missing"]) == 29


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (
            xares_score("esc50", "svm", 0.5),
            "the svm score of 'esc50' has another method than those of the task",
        ),
        (
            xares_score("clotho", "knn", 0.5),
            "of 'clotho' has another method than those of the task: mlp;",
        ),
        (xares_score("esc50", "mlp", 0.5, "mAP"), "has the metric 'mAP', but X-ARES scores the task by 'accuracy'"),
        (xares_score("esc50", "mlp", 1.2), "the mlp score of 'esc50' is 1.2, which is not in 0..1"),
    ],
)
def test_scores_that_x_ares_does_not_give_are_refused(score: TaskScore, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "xares.json"
    write_result(path, Result(XARES, "mine", (score,)))
    with pytest.raises(DataError, match=re.escape(reason)) as error:
        read_xares_result(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("write a new one with `bestrq2 xares MODEL`")
