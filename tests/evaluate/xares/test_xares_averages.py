"""The published averages come out of the published scores, and a partial run gets none."""

from __future__ import annotations

import pytest

from bestrq2.evaluate.published import published_averages, published_scores
from bestrq2.evaluate.xares.averages import ENTRIES_37, PAPER_KNN, PAPER_LINEAR, Mean, averages, entry_titles
from bestrq2.evaluate.xares.entries import TASKS, Score
from published_models import published_result

CARDS = published_averages("X-ARES", "37 entries")


def scores_of(value_of: dict[str, tuple[float, float]]) -> list[Score]:
    """Complete scores: domain → (linear, k-NN) of all its tasks."""
    return [
        Score(task.name, method, value_of[task.domain][method == "knn"], task.metric)
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
    assert not [task for task, _ in ENTRIES_37.all_entries if TASKS[task].private or task == "librispeech"]


def test_averages_of_given_scores_are_those_counted_by_hand() -> None:
    scores = scores_of({"speech": (0.8, 0.4), "music": (0.7, 0.35), "environment": (0.5, 0.9)})
    cards = averages(scores, ENTRIES_37)
    # Speech 11 x 0.8 + 11 x 0.4 = 13.2; music 4 x 0.7 + 3 x 0.35 = 3.85; environment 6 x 0.5 + 2 x 0.9 = 4.8
    assert [mean.value for mean in cards.domains.values()] == pytest.approx([13.2 / 22, 3.85 / 7, 4.8 / 8])
    assert cards.global_mean.value == pytest.approx(21.85 / 37)
    assert cards.mean_of_means.value == pytest.approx((0.6 + 0.55 + 0.6) / 3)
    # Vocal Imitation brings 0.8 into the environment: 6 x 0.5 + 0.8 = 3.8
    linear = averages(scores, PAPER_LINEAR)
    assert linear.domains["environment"].value == pytest.approx(3.8 / 7)
    assert linear.global_mean.value == pytest.approx((10 * 0.8 + 4 * 0.7 + 3.8) / 21)
    # and 0.4 under k-NN: 2 x 0.9 + 0.4 = 2.2
    knn = averages(scores, PAPER_KNN)
    assert knn.domains["environment"].value == pytest.approx(2.2 / 3)
    assert knn.global_mean.value == pytest.approx((10 * 0.4 + 3 * 0.35 + 2.2) / 16)
    assert knn.mean_of_means.value == pytest.approx((0.4 + 0.35 + 2.2 / 3) / 3)


@pytest.mark.parametrize(("ours", "theirs"), [("Whisper", "whisper-base"), ("data2vec", "data2vec-audio-base")])
def test_published_scores_give_the_published_averages(ours: str, theirs: str) -> None:
    cards = averages(published_result(ours).scores, ENTRIES_37)
    (row,) = [row for row in CARDS if row.model == theirs]
    assert [mean.text for mean in cards.means] == list(row.cells)


def test_published_scores_give_the_averages_of_the_paper() -> None:
    linear = averages(published_result("Whisper").scores, PAPER_LINEAR)
    (row,) = [row for row in published_averages("X-ARES", PAPER_LINEAR.name) if row.model == "Whisper"]
    assert (linear.global_mean.value, linear.mean_of_means.value) == pytest.approx((0.53, 0.49), abs=0.005)
    assert (row.global_mean, row.mean_of_means) == ("53", "49")


@pytest.mark.parametrize("row", CARDS, ids=lambda row: row.model)
def test_published_rows_agree_with_themselves(row) -> None:
    speech, music, environment = (float(cell) for cell in row.cells[:3])
    # Domain means are rounded to 0.005, and so are the means over them.
    of_music = 6 if row.model == "Audio-JEPA" else 7
    mean = (22 * speech + of_music * music + 8 * environment) / (30 + of_music)
    assert float(row.global_mean) == pytest.approx(mean, abs=0.0101)
    assert bool(row.note) == (of_music == 6), "a row that does not fit must say so"
    assert float(row.mean_of_means) == pytest.approx((speech + music + environment) / 3, abs=0.0101)


def test_every_published_figure_has_a_source() -> None:
    rows = [*published_averages("X-ARES"), *published_averages("XARES-LLM")]
    assert len(rows) == 18
    assert all(row.source for row in rows)
    assert all(one.source and 0 <= one.percent <= 100 for one in published_scores())
    assert {(one.task, one.method) for one in published_scores()} == {*ENTRIES_37.all_entries, ("librispeech", "mlp")}


def test_a_mean_needs_all_its_entries() -> None:
    whole = published_result("Dasheng").scores
    partial = [score for score in whole if (score.task, score.method) != ("esc50", "knn")]
    cards = averages(partial, ENTRIES_37)
    assert cards.domains["environment"] == Mean(None, 7, 8)
    assert cards.global_mean == Mean(None, 36, 37)
    assert cards.mean_of_means == Mean(None, 36, 37)
    assert cards.domains["speech"].value is not None
    assert cards.missing == (("esc50", "knn"),)
    assert averages(partial, PAPER_LINEAR).missing == ()
    assert averages([], ENTRIES_37).global_mean == Mean(None, 0, 37)


def test_scores_of_other_tasks_change_no_average() -> None:
    whole = published_result("Dasheng").scores
    more = [*whole, Score("soundworld_rhythm", "mlp", 0.01, "accuracy"), Score("finger_snap", "knn", 0.0, "accuracy")]
    assert averages(more, ENTRIES_37) == averages(whole, ENTRIES_37)


def test_missing_entries_are_named_with_the_method_where_the_task_has_another() -> None:
    missing = (("clotho", "mlp"), ("esc50", "knn"), ("gtzan_genre", "mlp"), ("gtzan_genre", "knn"))
    assert entry_titles(missing) == ["Clotho", "ESC-50 (k-NN)", "GTZAN"]
