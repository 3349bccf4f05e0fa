"""Wall time of a run: seconds of training over all its parts, and the share of it spent waiting for data."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bestrq2.errors import DataError
from bestrq2.files import write_text
from bestrq2.run_records import read_table


class RunClock:
    """Measures training time, writes it to timing.csv, and counts the time in which a step waited for its batches.

    On a CPU the waiting time is that between the end of a step and the arrival of the next batches. A GPU still works
    on earlier steps while this process waits: there it is the time in which the device had nothing to do, taken from
    events on the device and known a step or two later.

    timing.csv is a file of its own because metrics.csv is the same to the byte however often a run was interrupted.

    Args:
        path: timing.csv, with the columns step and seconds; None to write none.
        start: step from which training (re)starts; later rows are dropped.
    """

    def __init__(self, path: Path | None, start: int = 0) -> None:
        self.path = path
        self._rows: dict[int, float] = {}
        self._before = self._started = self._ended = self._waited = 0.0
        if start and path is not None:
            # A missing or damaged file costs a figure, not the run; the time of one part would be a wrong figure.
            with suppress(DataError, KeyError):
                steps, seconds = read_table(path)["seconds"]
                self._rows = {
                    int(step): float(value) for step, value in zip(steps, seconds, strict=True) if step <= start
                }
                self._before = max(self._rows.values(), default=0.0)
        self._complete = not start or bool(self._rows)
        self._on_gpu = False
        self._end_event: Any = None
        self._gaps: deque[tuple[Any, Any]] = deque()

    @property
    def elapsed(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._started

    @property
    def waited(self) -> float:
        """Seconds of them spent waiting for data."""
        while self._gaps and self._gaps[0][1].query():  # gaps that the device has passed
            end, begin = self._gaps.popleft()
            self._waited += end.elapsed_time(begin) / 1000
        return self._waited

    def start(self, device: torch.device) -> None:
        """Start the clock before the first step."""
        self._on_gpu = device.type == "cuda"
        self._started = self._ended = time.monotonic()

    def batches_arrived(self) -> None:
        """The batches of a step are there."""
        if self._on_gpu and self._end_event is not None:
            self._gaps.append((self._end_event, _event()))
        else:
            self._waited += time.monotonic() - self._ended

    def step_ended(self) -> None:
        """All work of a step has been done, or handed to the device."""
        self._ended = time.monotonic()
        if self._on_gpu:
            self._end_event = _event()

    def record(self, step: int) -> None:
        """Write the time at which a step was done."""
        if self.path is None or not self._complete:
            return
        self._rows[step] = self._before + self.elapsed
        lines = [f"{step},{seconds:.3f}\n" for step, seconds in sorted(self._rows.items())]
        with suppress(OSError):
            write_text(self.path, "step,seconds\n" + "".join(lines))


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
