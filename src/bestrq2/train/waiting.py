"""How long training waits for data."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class DataClock:
    """Counts the time in which a step could have run if its batch had been there.

    On a CPU that is the time between the end of a batch and the arrival of the next. A GPU still works on earlier steps
    while this process waits: there it is the time in which the device had nothing to do, taken from events on the
    device and known a step or two later.
    """

    def __init__(self) -> None:
        self._on_gpu = False
        self._started = self._ended = 0.0
        self._waited = 0.0
        self._end_event: Any = None
        self._gaps: deque[tuple[Any, Any]] = deque()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def waited(self) -> float:
        """Seconds of it spent waiting."""
        self._collect()
        return self._waited

    def _collect(self) -> None:
        """Take the gaps that the device has come past."""
        while self._gaps and self._gaps[0][1].query():
            end, begin = self._gaps.popleft()
            self._waited += end.elapsed_time(begin) / 1000

    def start(self, device: torch.device) -> None:
        """Training begins."""
        self._on_gpu = device.type == "cuda"
        self._started = self._ended = time.monotonic()

    def batch_arrived(self) -> None:
        """A batch is there."""
        if self._on_gpu and self._end_event is not None:
            self._collect()
            self._gaps.append((self._end_event, _event()))
        else:
            self._waited += time.monotonic() - self._ended

    def batch_ended(self) -> None:
        """All that is done with a batch has been done, or been asked of the device."""
        self._ended = time.monotonic()
        if self._on_gpu:
            self._end_event = _event()


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
