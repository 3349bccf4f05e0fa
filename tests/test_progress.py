import io
import logging
import sys

import pytest

from bestrq2.progress import Progress, format_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Progress("prepare", 200, "files", done=100, lines_every_seconds=0) as progress:
        progress._started -= 10
        progress.show(150, 1.5)
    assert capsys.readouterr().err == "prepare: 150/200 files, 5 files/s, 1.50 h of audio, 00:10 left\n"


def test_lines_are_rare_unless_asked_for(capsys):
    with Progress("train", 2, "steps") as progress:
        progress.show(1, details="loss 2.000")
        assert capsys.readouterr().err == ""
        progress.show(2, details="loss 1.000", now=True)
    line = capsys.readouterr().err
    assert line.startswith("train: 2/2 steps, ")
    assert line.endswith("loss 1.000, 00:00 left\n")


def test_an_unknown_total_shows_count_and_rate_only(capsys):
    with Progress("embed", None, "files", lines_every_seconds=0) as progress:
        progress._started -= 10
        progress.advance(5)
    assert capsys.readouterr().err == "embed: 5 files, 0.5 files/s\n"


def test_a_terminal_gets_a_bar_and_log_messages_above_it(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with Progress("index", 4, "tars") as progress:
        progress.advance(2)
        logging.getLogger("bestrq2").warning("a message")
        progress.advance(2)
    assert logging.getLogger().handlers == [handler]
    assert "100%" in screen.getvalue()
    assert "\na message\n" in screen.getvalue().replace("\r", "\n")


def test_nothing_is_shown_where_it_is_not_wanted(capsys):
    with Progress("train", 2, "steps", lines_every_seconds=0, shown=False) as progress:
        progress.show(2, now=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (309.4, "05:09"), (3909, "1:05:09")])
def test_durations_are_minutes_and_seconds(seconds, text):
    assert format_duration(seconds) == text
