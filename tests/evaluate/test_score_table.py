"""Tables and means of probe scores."""

from __future__ import annotations

import dataclasses
import re

import pytest

from bestrq2.evaluate.metrics import wilson_interval
from bestrq2.evaluate.result import PROBE, Result, TaskScore
from bestrq2.evaluate.score_table import all_means, domain_means, format_scores, probe_parts, score_tables


def scores_of(features: str, shares: dict[str, int], method: str = "linear") -> list[TaskScore]:
    """Scores from numbers of correct predictions out of 400, by task "domain/name"."""
    return [
        TaskScore(features, task, method, "accuracy", right / 400, *wilson_interval(right, 400), 0.125, 400, domain)
        for task, right in shares.items()
        for domain in [task.split("/")[0]]
    ]


def score_of(features: str, task: str, domain: str, score: float, method: str = "linear") -> TaskScore:
    return TaskScore(features, task, method, "accuracy", score, domain=domain)


ENCODER = scores_of("BEST-RQ-2", {"speech/word": 252, "speech/voice": 300, "music/key": 120})
LOG_MEL = scores_of("log-mel statistics", {"speech/word": 152, "speech/voice": 320, "music/key": 120})


def line(table: str, label: str) -> str:
    (found,) = [text for text in table.splitlines() if text.strip().startswith(f"{label} ")]
    return re.sub(" +", " ", found).strip()


def test_table_shows_scores_with_intervals_and_marks_the_best_of_each_row() -> None:
    table = format_scores([*ENCODER, *LOG_MEL])
    assert line(table, "word") == "word 12.5 63.0 [58.2, 67.6]* 38.0 [33.4, 42.8]"
    assert line(table, "voice") == "voice 12.5 75.0 [70.5, 79.0] 80.0 [75.8, 83.6]*"
    assert line(table, "key") == "key 12.5 30.0 [25.7, 34.7]* 30.0 [25.7, 34.7]*"


def test_table_shows_means_of_domains() -> None:
    lines = [re.sub(" +", " ", text).strip() for text in format_scores([*ENCODER, *LOG_MEL]).splitlines()]
    assert "mean 64.6* 53.1" in lines
    assert "mean of domains 42.3* 36.6" in lines


def test_table_has_a_part_for_each_method() -> None:
    table = format_scores([*ENCODER, *(dataclasses.replace(score, method="knn") for score in ENCODER)])
    assert table.index("linear probe") < table.index("k-NN")
    assert table.count("mean of domains") == 2
    assert "]*" not in table, "nothing is best where there is nothing to compare"


def test_columns_are_aligned_and_lines_fit_the_width() -> None:
    scores = [
        score for name in "abcdefgh" for score in scores_of(f"encoder {name}", {"speech/word": 252, "music/key": 9})
    ]
    for width in (70, 100, 120):
        lines = format_scores(scores, width=width).splitlines()
        assert max(map(len, lines)) <= width
        header = next(text for text in lines if text.startswith("linear probe"))
        word = next(text for text in lines if text.startswith("  word"))
        assert word.index("67.6]") + len("67.6]") == header.index("encoder a") + len("encoder a")
    assert format_scores(scores, width=70).count("  word") == 4


def test_missing_tasks_are_shown_as_missing_and_leave_no_mean() -> None:
    table = format_scores([*ENCODER, *LOG_MEL[:2]])
    assert line(table, "key").endswith("] -")
    assert "mean" not in table


def test_a_single_task_has_no_means_and_few_clips_are_named() -> None:
    (many,) = scores_of("BEST-RQ-2", {"birds": 300})
    few = dataclasses.replace(many, n_test=12)
    assert "mean" not in format_scores([many]).replace("Means are relative", "")
    assert "Few test clips" not in format_scores([many])
    assert "hardly separate encoders: birds (12)." in " ".join(format_scores([few]).split())


def test_table_says_what_was_skipped_and_how_frames_are_scored() -> None:
    scores = [
        dataclasses.replace(ENCODER[0], skipped=("train clip 3: silent", "test clip 1: silent")),
        dataclasses.replace(ENCODER[1], metric="balanced accuracy", task="environment/present", domain="environment"),
    ]
    table = format_scores(scores)
    assert "2 of speech/word (BEST-RQ-2)" in table
    assert "Balanced accuracy, chance 1/classes: environment/present." in table


def test_tasks_of_unknown_domain_and_no_scores_at_all_have_a_table() -> None:
    assert "other" in format_scores([dataclasses.replace(ENCODER[0], domain="", task="mine")])
    assert format_scores([]) == "no scores"


def test_domain_means_weigh_domains_equally() -> None:
    scores = [
        score_of("a", "speech/word", "speech", 0.5),
        score_of("a", "speech/voice", "speech", 0.7),
        score_of("a", "music/key", "music", 0.2),
        score_of("a", "music/key", "music", 0.9, method="knn"),
    ]
    assert domain_means(scores, "linear", "a") == pytest.approx({"speech": 0.6, "music": 0.2, "mean": 0.4})


def test_means_are_left_out_where_features_were_probed_on_other_tasks() -> None:
    scores = [score_of("a", "music/key", "music", 0.2), score_of("a", "music/tempo", "music", 0.3)]
    assert all_means(scores)["a"]["linear"] == pytest.approx({"music": 0.25, "mean": 0.25})
    assert all_means([*scores, score_of("b", "music/key", "music", 0.9)]) == {}
    assert all_means([scores[0], scores[0]]) == {}


def test_tables_have_the_same_cells_in_markdown_and_csv() -> None:
    (table,) = score_tables([*ENCODER, *LOG_MEL])
    assert "| word | 12.5 | 63.0 [58.2, 67.6]* | 38.0 [33.4, 42.8] |" in table.markdown()
    assert 'word,12.5,"63.0 [58.2, 67.6]*","38.0 [33.4, 42.8]"' in table.csv().splitlines()


def test_a_result_prints_as_its_table_and_shows_as_html():
    result = Result(PROBE, "BEST-RQ-2", (*ENCODER, *LOG_MEL), parts=probe_parts)
    assert str(result) == format_scores(result.scores)
    shown = result._repr_html_()
    assert shown.count("<table>") == len(score_tables(result.scores))
    assert '<td class="number">63.0 [58.2, 67.6]*</td>' in shown
    assert result == Result(PROBE, "BEST-RQ-2", result.scores)
