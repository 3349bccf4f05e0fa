"""Progress of work on a corpus: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows files, files/s, hours of audio and the time left; used as a context.

    Args:
        label: what stands before it.
        total: how many there are; None where only the end will tell.
        unit: what is counted, such as "files".
        done: how many were done before.
        lines_every_seconds: how often a line is printed where there is no terminal.
    """

    def __init__(
        self, label: str, total: int | None, unit: str, done: float = 0.0, lines_every_seconds: float = 10.0
    ) -> None:
        self.label, self.total, self.unit, self.first = label, total, unit, done
        self.lines_every_seconds = lines_every_seconds
        self._bar: Any = None
        self._started = self._line_at = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total, initial=self.first, desc=self.label, unit=self.unit, dynamic_ncols=True,
                bar_format="{desc} {postfix}" if self.total is None else "{desc} {percentage:3.0f}% |{bar}| {postfix}",
            )  # fmt: skip
        return self

    def show(self, done: float, hours: float | None = None) -> None:
        """Show where the work is.

        Args:
            done: how many are done; a part of one counts as that part.
            hours: of audio so far, where audio is read.
        """
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(done, hours, now), refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._line_at >= self.lines_every_seconds:
            self._line_at = now
            print(f"{self.label}: {self._status(done, hours, now)}", file=sys.stderr, flush=True)

    def _status(self, done: float, hours: float | None, now: float) -> str:
        speed = (done - self.first) / max(1e-9, now - self._started)
        audio = "" if hours is None else f", {hours:.2f} h of audio"
        if self.total is None:
            return f"{int(done)} {self.unit}, {speed:.3g} {self.unit}/s{audio}"
        left = tqdm.format_interval((self.total - done) / speed) if speed else "?"
        return f"{int(done)}/{self.total} {self.unit}, {speed:.3g} {self.unit}/s{audio}, {left} left"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
