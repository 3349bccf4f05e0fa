"""Progress display: a bar on a terminal, a plain line every ten seconds elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any


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
        unit: what is counted, in the plural: "files", "steps", "parts", "tasks".
        done: units done before this job began, as after a resume; the rate does not count them.
        lines_every_seconds: least time between two lines where standard error is no terminal.
        shown: False for no output at all, as in all processes but the first.
        leave: keep the bar on the terminal after the end.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "files",
        done: float = 0.0,
        lines_every_seconds: float = 10.0,
        shown: bool = True,
        leave: bool = True,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.first = self.done = done
        self.lines_every_seconds, self.shown, self.leave = lines_every_seconds, shown, leave
        self._bar: Any = None
        self._stack = ExitStack()
        self._started = self._line_at = time.monotonic()

    def __enter__(self) -> Progress:
        self._started = self._line_at = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = tqdm(
                total=self.total, initial=self.first, desc=self.label, unit=self.unit, dynamic_ncols=True,
                leave=self.leave,
                bar_format="{desc} {postfix}" if self.total is None else "{desc} {percentage:3.0f}% |{bar}| {postfix}",
            )  # fmt: skip
            self._stack.callback(self._bar.close)
            # log messages appear above the bar instead of in the middle of it
            self._stack.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._bar = None

    def show(self, done: float, hours: float | None = None, *, details: str = "", now: bool = False) -> None:
        """Update the display.

        Args:
            done: units done; a part of a unit counts as that part.
            hours: hours of audio so far, where audio is read.
            details: more to show, such as a loss.
            now: print a line even if the last one is not old, as for the last step.
        """
        self.done = done
        if not self.shown:
            return
        time_now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(hours, details, time_now), refresh=False)
            self._bar.update(done - self._bar.n)
        elif now or time_now - self._line_at >= self.lines_every_seconds:
            self._line_at = time_now
            print(f"{self.label}: {self._status(hours, details, time_now)}", file=sys.stderr, flush=True)

    def advance(self, units: float = 1) -> None:
        """Count units as done."""
        self.show(self.done + units)

    def _status(self, hours: float | None, details: str, now: float) -> str:
        speed = (self.done - self.first) / max(1e-9, now - self._started)
        count = f"{int(self.done)}" if self.total is None else f"{int(self.done)}/{self.total}"
        parts = [f"{count} {self.unit}", f"{speed:.3g} {self.unit}/s"]
        parts += [f"{hours:.2f} h of audio"] if hours is not None else []
        parts += [details] if details else []
        if self.total is not None:
            parts.append(f"{format_duration((self.total - self.done) / speed) if speed else '?'} left")
        return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Minutes and seconds as "05:09", hours as "1:05:09"."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes:02d}:{left:02d}"
