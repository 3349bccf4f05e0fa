import io
import logging
import sys
import time

import pytest

from bestrq2 import progress as display
from bestrq2.progress import Progress, format_duration


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """A line was printed just now, and the thread prints none by itself."""
    monkeypatch.setattr(Progress, "_line_at", time.monotonic())
    monkeypatch.setattr(display, "_TICK_SECONDS", 60.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def still(monkeypatch):
    """Time does not pass."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)


def test_without_a_terminal_progress_is_plain_lines(capsys, still):
    with Progress("prepare", 200, "files", done=100, lines_every_seconds=0) as progress:
        progress._started -= 10
        progress.show(150, 1.5)
    assert capsys.readouterr().err == "prepare: 150/200 files, 5 files/s, 00:10 left, 1.50 h of audio\n"


def test_lines_are_rare_unless_asked_for(capsys):
    with Progress("train", 2, "steps") as progress:
        progress.show(1, details="loss 2.000")
        assert capsys.readouterr().err == ""
        progress.show(2, details="loss 1.000", now=True)
    line = capsys.readouterr().err
    assert line.startswith("train: 2/2 steps, ")
    assert line.endswith("00:00 left, loss 1.000\n")


def test_an_unknown_total_shows_count_and_rate_only(capsys, still):
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


@pytest.mark.parametrize(("hours", "pause"), [(0.0, 4.0), (1.0, 24.0), (10.0, 60.0)])
def test_lines_become_rarer_in_the_course_of_hours(capsys, monkeypatch, hours, pause):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress("train", 100, "steps") as progress:
        progress._started -= 3600 * hours
        Progress._line_at = now
        now += 0.95 * pause
        progress.advance()
        assert capsys.readouterr().err == ""
        now += 0.1 * pause
        progress.advance()
    assert capsys.readouterr().err.startswith("train: 2/100 steps, ")


def test_a_step_that_takes_long_is_no_silence(capsys, monkeypatch):
    monkeypatch.setattr(display, "_TICK_SECONDS", 0.01)
    with Progress("train", 2, "steps", lines_every_seconds=0.05) as progress:
        progress._started -= 9
        time.sleep(0.5)
    assert "train: 0/2 steps, 00:09 so far\n" in capsys.readouterr().err


def test_of_nested_displays_the_innermost_is_seen(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("train", 2, "steps"):
        shown = len(screen.getvalue())
        with Progress("validation", 4, "clips", leave=False) as inner:
            inner.show(2, now=True)
            assert "train" not in screen.getvalue()[shown:].rpartition("validation")[2]
            assert " 50%" in screen.getvalue()
        assert "train" in screen.getvalue().rpartition("validation")[2]


def test_a_command_says_what_it_begins_with_only_until_a_part_of_it_begins(capsys):
    with Progress("demo", unit="", details="loading PyTorch") as outer:
        with Progress("training", 2, "steps"):
            pass
        outer._started -= 9
        outer.show(now=True)
    assert capsys.readouterr().err.splitlines() == ["demo: loading PyTorch", "demo: 00:09 so far"]


def test_nothing_is_shown_where_it_is_not_wanted(capsys):
    with Progress("train", 2, "steps", lines_every_seconds=0, shown=False) as progress:
        progress.show(2, now=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (309.4, "05:09"), (3909, "1:05:09")])
def test_durations_are_minutes_and_seconds(seconds, text):
    assert format_duration(seconds) == text
