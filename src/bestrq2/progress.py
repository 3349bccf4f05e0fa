"""Progress display: a bar on a terminal, plain lines elsewhere; always on standard error.

Displays may be nested, such as that of a validation in that of the training: the innermost one is seen. A thread keeps
it up to date, so that a long step is not taken for a standstill.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any, ClassVar

# Time between two lines where standard error is no terminal (s), and the job's time up to which it stays as it is: from
# then on it grows in proportion, up to a minute.
_LINES_SECONDS, _STEADY_SECONDS, _MOST = 4.0, 600.0, 15.0
# Time between two updates of the display by the thread, and least time between two of a bar (s).
_TICK_SECONDS, _BAR_SECONDS = 0.5, 0.1
_drawing = threading.RLock()
if hasattr(os, "register_at_fork"):
    # No process is forked while another thread holds a lock of the display, which would never be released there.
    os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_drawing.release)


class Progress:
    """Count, rate and remaining time of a long job; used as a context.

    ```python
    with Progress("prepare", len(source), "files") as progress:
        for number, path in enumerate(paths, 1):
            ...
            progress.show(number)
    ```

    Args:
        label: text in front of the display, such as the name of the command.
        total: number of units; None where only the end will tell.
        unit: what is counted, in the plural: "files", "steps", "parts", "tasks"; "" for nothing but the time.
        done: units done before this job began, as after a resume; the rate does not count them.
        lines_every_seconds: least time between two lines where standard error is no terminal; it grows with the time.
        shown: False for no output at all; only the first of several processes shows any.
        leave: keep the bar on the terminal after the end.
        details: text that is shown at once, and until `show` gives another.
    """

    _open: ClassVar[list[Progress]] = []
    _line_at: ClassVar[float] = time.monotonic()

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "files",
        done: float = 0.0,
        lines_every_seconds: float = _LINES_SECONDS,
        shown: bool = True,
        leave: bool = True,
        details: str = "",
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.first = self.done = done
        self.lines_every_seconds, self.leave, self.details = lines_every_seconds, leave, details
        self.shown = shown and is_first_process()
        self.hours: float | None = None
        self._bar: Any = None
        self._stack = ExitStack()
        self._started, self._drawn_at = time.monotonic(), 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.shown:
            with _drawing:
                if self._open:
                    self._open[-1]._close_bar(leave=False)
                    if not self._open[-1].unit:
                        self._open[-1].details = ""  # what it said of the beginning is past
                self._open.append(self)
                self._open_bar()
                if self._bar is not None or self.details:
                    self._draw(now=True)
            threading.Thread(target=self._tick, daemon=True, name="progress").start()
        return self

    def __exit__(self, *_: object) -> None:
        with _drawing:
            self._ended.set()
            self._close_bar(self.leave)
            if self in self._open:
                self._open.remove(self)
                if self._open:
                    self._open[-1]._open_bar()
                    self._open[-1]._draw()

    def show(
        self, done: float | None = None, hours: float | None = None, *, details: str = "", now: bool = False
    ) -> None:
        """Update the display.

        Args:
            done: units done; a part of a unit counts as that part. None for as many as before.
            hours: hours of audio so far, where audio is read.
            details: more to show, such as a loss.
            now: print a line even if the last one is not old, as for the last step.
        """
        self.done = self.done if done is None else done
        self.hours, self.details = hours, details
        if self.shown:
            with _drawing:
                self._draw(now)

    def advance(self, units: float = 1) -> None:
        """Count units as done."""
        self.show(self.done + units)

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            with _drawing:
                if self._open and self._open[-1] is self:
                    self._draw()

    def _open_bar(self) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._bar = tqdm(
            total=self.total, initial=self.done, desc=self.label, dynamic_ncols=True,
            unit=self._status(time.monotonic()),
            # the status stands for the unit: what tqdm calls postfix begins with a comma
            bar_format="{desc}: {unit}" if self.total is None else "{desc} {percentage:3.0f}% |{bar:12}| {unit}",
        )  # fmt: skip
        self._stack.callback(self._bar.close)
        # log messages appear above the bar instead of in the middle of it
        self._stack.enter_context(logging_redirect_tqdm())

    def _close_bar(self, leave: bool) -> None:
        if self._bar is not None:
            self._update_bar()
            self._bar.leave = leave
        self._stack.close()
        self._bar = None

    def _update_bar(self) -> None:
        self._bar.n = self.done
        self._bar.unit = self._status(time.monotonic())

    def _draw(self, now: bool = False) -> None:
        clock = time.monotonic()
        if self._bar is not None:
            if now or clock - self._drawn_at >= _BAR_SECONDS:
                self._drawn_at = clock
                self._update_bar()
                self._bar.refresh()
            return
        pause = self.lines_every_seconds * min(_MOST, max(1.0, (clock - self._started) / _STEADY_SECONDS))
        if now or clock - Progress._line_at >= pause:
            Progress._line_at = clock
            status = self._status(clock)
            print(f"{self.label}: {status}" if status else self.label, file=sys.stderr, flush=True)

    def _status(self, clock: float) -> str:
        elapsed, moved = max(1e-9, clock - self._started), self.done > self.first
        speed = (self.done - self.first) / elapsed
        count = f"{int(self.done)}" if self.total is None else f"{int(self.done)}/{self.total}"
        parts = [f"{count} {self.unit}"] if self.unit else [self.details] if self.details else []
        parts += [f"{speed:.3g} {self.unit}/s"] if moved else []
        if moved and self.total is not None:
            parts.append(f"{format_duration((self.total - self.done) / speed)} left")
        elif not moved and elapsed >= 1:
            parts.append(f"{format_duration(elapsed)} so far")
        parts += [f"{self.hours:.2f} h of audio"] if self.hours is not None else []
        parts += [self.details] if self.details and self.unit else []
        return ", ".join(parts)


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that a launcher started, as its variables tell."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def starting(command: str) -> Progress:
    """The display of a whole command, seen while no part of it has its own: importing PyTorch alone takes seconds."""
    details = "" if "torch" in sys.modules else "loading PyTorch"
    return Progress(command, unit="", leave=False, details=details)


def format_duration(seconds: float) -> str:
    """Minutes and seconds as "05:09", hours as "1:05:09"."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes:02d}:{left:02d}"
