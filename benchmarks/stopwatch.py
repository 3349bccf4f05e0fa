"""Exclusive times of the parts of a run, by wrapping functions from outside."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Exclusive times of named parts; all other time is attributed to `rest`.

    In the training thread, wall time is measured; on a GPU also the time of the device, from events at every change of
    part, so that idle time is attributed to the part in which the device was idle. In forked workers and other threads,
    processor time is measured and summed over them.

    Args:
        parts: names of all parts that may be timed outside of the training thread
        rest: name of the remaining time
    """

    def __init__(self, parts: Sequence[str], rest: str) -> None:
        self._rest = rest
        self._stack = [rest]
        self._thread, self._process = threading.get_ident(), os.getpid()
        self._on_gpu = False
        self._since = 0.0
        self._started = self._stopped = 0.0
        self._host: dict[str, float] = defaultdict(float)
        self._changes: list[tuple[str, Any]] = []
        self._numbers = {name: number for number, name in enumerate(parts)}
        self._elsewhere: Any = multiprocessing.get_context("fork").Array("d", len(parts))
        self._elsewhere_before = [0.0] * len(parts)
        self._elsewhere_at_stop: list[float] | None = None
        self._own = threading.local()

    def start(self, device: torch.device) -> None:
        """Forget what was measured before."""
        self._on_gpu = device.type == "cuda"
        self._host.clear()
        self._changes.clear()
        self._elsewhere_before = list(self._elsewhere)
        self._since = self._started = time.perf_counter()
        self._mark()

    def stop(self) -> None:
        """End of what is measured."""
        self._change()
        self._stopped = self._since
        self._elsewhere_at_stop = list(self._elsewhere)

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._started > self._stopped

    @property
    def seconds(self) -> float:
        """Wall time between start and stop."""
        return self._stopped - self._started

    def host_seconds(self) -> dict[str, float]:
        """By part, wall time of the training thread; they add up to `seconds`."""
        return dict(self._host)

    def device_seconds(self) -> dict[str, float]:
        """By part, time of the GPU between the events at its ends; empty on a CPU."""
        sums: dict[str, float] = defaultdict(float)
        if self._on_gpu:
            torch.cuda.synchronize()
            for (name, begin), (_, end) in zip(self._changes, self._changes[1:], strict=False):
                sums[name] += begin.elapsed_time(end) / 1000
        return dict(sums)

    def elsewhere_seconds(self) -> dict[str, float]:
        """By part, processor time of workers and of other threads than the training one."""
        ends = self._elsewhere_at_stop or list(self._elsewhere)
        return {name: ends[number] - self._elsewhere_before[number] for name, number in self._numbers.items()}

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._changes.append((self._stack[-1], event))

    def _change(self) -> None:
        """Book the time since the last change to the part in charge."""
        now = time.perf_counter()
        if self.running:
            self._host[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in this block belongs to that part, but for what belongs to parts within it."""
        if os.getpid() == self._process and threading.get_ident() == self._thread:
            self._change()
            self._stack.append(name)
            self._mark_if_running()
            try:
                yield
            finally:
                self._change()
                self._stack.pop()
                self._mark_if_running()
            return
        inner_before = getattr(self._own, "inner", 0.0)
        self._own.inner, begin = 0.0, time.thread_time()
        try:
            yield
        finally:
            spent = time.thread_time() - begin
            self.add_elsewhere(name, spent - self._own.inner)
            self._own.booked = self.booked_here() + spent - self._own.inner
            self._own.inner = inner_before + spent

    def booked_here(self) -> float:
        """Processor time that all parts took so far in this thread, elsewhere than in the training one."""
        return float(getattr(self._own, "booked", 0.0))

    def _mark_if_running(self) -> None:
        if self.running:
            self._mark()

    def add_elsewhere(self, name: str, seconds: float) -> None:
        """Book processor time of another process or thread."""
        if name in self._numbers:
            with self._elsewhere.get_lock():
                self._elsewhere[self._numbers[name]] += seconds

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function; its time belongs to that part."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return wrapper

    @contextmanager
    def watching(self, places: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Time functions within this block.

        Args:
            places: (class or module, name of the function in it, part); those that do not exist are passed over.
        """
        before: list[tuple[Any, str, Any, bool]] = []
        try:
            for owner, attribute, name in places:
                function = getattr(owner, attribute, None)
                if function is None:
                    continue
                before.append((owner, attribute, function, attribute in vars(owner)))
                setattr(owner, attribute, self.timed(function, name))
            yield
        finally:
            for owner, attribute, function, own in reversed(before):
                if own:
                    setattr(owner, attribute, function)
                else:
                    delattr(owner, attribute)
