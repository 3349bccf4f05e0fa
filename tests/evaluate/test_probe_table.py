from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bestrq2.errors import DataError
from bestrq2.evaluate.scores import ProbeScore, wilson_interval
from bestrq2.evaluate.table import format_table, read_scores, write_scores


def scores_of(features: str, shares: dict[str, int], method: str = "linear") -> list[ProbeScore]:
    """Scores from numbers of right answers out of 400, by task "domain/name"."""
    return [
        ProbeScore(
            features,
            task,
            task.split("/")[0],
            method,
            "accuracy",
            right / 400,
            *wilson_interval(right, 400),
            0.125,
            400,
        )
        for task, right in shares.items()
    ]


ENCODER = scores_of("BEST-RQ-2", {"speech/word": 252, "speech/voice": 300, "music/key": 120})
LOG_MEL = scores_of("log-mel statistics", {"speech/word": 152, "speech/voice": 320, "music/key": 120})


def line(table: str, label: str) -> str:
    (found,) = [text for text in table.splitlines() if text.strip().startswith(f"{label} ")]
    return re.sub(" +", " ", found).strip()


def test_table_shows_scores_with_intervals_and_marks_the_best_of_each_row() -> None:
    table = format_table([*ENCODER, *LOG_MEL])
    assert line(table, "word") == "word 12.5 63.0 [58.2, 67.6]* 38.0 [33.4, 42.8]"
    assert line(table, "voice") == "voice 12.5 75.0 [70.5, 79.0] 80.0 [75.8, 83.6]*"
    assert line(table, "key") == "key 12.5 30.0 [25.7, 34.7]* 30.0 [25.7, 34.7]*"


def test_table_shows_means_of_domains() -> None:
    lines = [re.sub(" +", " ", text).strip() for text in format_table([*ENCODER, *LOG_MEL]).splitlines()]
    assert "mean 12.5 69.0* 59.0" in lines
    assert "mean of domains 12.5 49.5* 44.5" in lines


def test_table_has_a_part_for_each_method() -> None:
    table = format_table([*ENCODER, *(dataclasses.replace(score, method="knn") for score in ENCODER)])
    assert table.index("linear probe") < table.index("k-NN")
    assert table.count("mean of domains") == 2
    assert "]*" not in table, "nothing is best where there is nothing to compare"


def test_columns_are_aligned_and_lines_fit_the_width() -> None:
    scores = [
        score for name in "abcdefgh" for score in scores_of(f"encoder {name}", {"speech/word": 252, "music/key": 9})
    ]
    for width in (70, 100, 120):
        lines = format_table(scores, width=width).splitlines()
        assert max(map(len, lines)) <= width
        header = next(text for text in lines if text.startswith("linear probe"))
        word = next(text for text in lines if text.startswith("  word"))
        assert word.index("63.0") == header.index("encoder a")
    assert format_table(scores, width=70).count("  word") == 4


def test_missing_tasks_are_shown_as_missing_and_leave_no_mean() -> None:
    table = format_table([*ENCODER, *LOG_MEL[:2]])
    assert line(table, "key").endswith("] -")
    assert "mean" not in table


def test_table_says_what_was_skipped_and_how_frames_are_scored() -> None:
    scores = [
        dataclasses.replace(ENCODER[0], skipped=("train clip 3: silent", "test clip 1: silent")),
        dataclasses.replace(ENCODER[1], metric="balanced accuracy", task="environment/present", domain="environment"),
    ]
    table = format_table(scores)
    assert "2 of speech/word (BEST-RQ-2)" in table
    assert "Balanced accuracy over frames, chance 1/classes: environment/present." in table


def test_tasks_of_unknown_domain_and_no_scores_at_all_have_a_table() -> None:
    assert "other" in format_table([dataclasses.replace(ENCODER[0], domain="", task="mine")])
    assert format_table([]) == "no scores"


def test_scores_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, ENCODER)
    write_scores(path, [*ENCODER, *LOG_MEL])
    assert read_scores(path) == [*ENCODER, *LOG_MEL]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, ENCODER)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_scores(path, LOG_MEL)
    assert read_scores(path) == ENCODER
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "format 1"),
        (b'{"format": 2, "scores": []}', "format 1"),
        (b'{"format": 1, "scores": [{"features": "a"}]}', "missing fields"),
        (b'{"format": 1, "scores": [7]}', "scores.json"),
    ],
)
def test_files_that_hold_no_scores_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_scores(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_scores(tmp_path / "none.json")
