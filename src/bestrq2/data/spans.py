"""Spans: some minutes of a recording each, read by worker processes in order and in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from bestrq2.child_processes import become_worker
from bestrq2.data.audio import read_span, shorter_files
from bestrq2.data.decoders import Decoder
from bestrq2.data.rejections import Shorter
from bestrq2.data.sources import Source
from bestrq2.data.waveforms import to_float32
from bestrq2.errors import AudioError, BestRQ2Error
from bestrq2.progress import Progress

SPAN_SECONDS = 300.0
"""Audio that is read at once (s); longer recordings are read in several spans."""

# Bytes of decoded spans that wait for the job.
_AHEAD_BYTES = 256_000_000
# Names that are read between two updates of the display.
_NAMES_SHOWN = 1000
# A worker computes one task while the next one waits in its pipe.
_PER_WORKER = 2
# Tasks submitted before their turn, per worker: enough to keep all busy while one of them has a long task.
_AHEAD = 32
# Finished results that wait for their turn, in bytes. Above it, only the task whose turn it is gets done.
_HELD_BYTES = 256_000_000

Position = tuple[int, int]
"""A recording's number in the source, and a span's number in the recording."""


class Stretch(NamedTuple):
    """Neighbouring recordings to process: from a position to before the recording `stop`."""

    start: Position
    stop: int


class Task(NamedTuple):
    """One span of a recording to read.

    Attributes:
        recording: number of the recording in the source.
        number: number of the span in the recording.
        spans: spans of the recording; None before its first span is read.
        frames: samples per channel of the recording at its own rate; likewise.
    """

    recording: int
    number: int = 0
    spans: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Span:
    """A span of a recording after reading.

    Attributes:
        recording: number of the recording in the source.
        number: number of the span in the recording.
        path: printable description of the recording by its source.
        content: samples or rows, as the job reads them; None if there is a problem.
        seconds: duration of the span.
        spans: spans of the recording.
        frames: samples per channel of the recording at its own rate, if known.
        problem: why the span, or all of the recording, cannot be used.
        shorter: lengths of the recording, at its last span, if it ends before its header promised.
    """

    recording: int
    number: int
    path: str
    content: Any = None
    seconds: float = 0.0
    spans: int = 1
    frames: int | None = None
    problem: str = ""
    shorter: Shorter | None = None

    @property
    def is_last(self) -> bool:
        """Whether the recording ends with this span."""
        return self.number >= self.spans - 1

    @property
    def start(self) -> Position:
        """Position of the span."""
        return self.recording, self.number

    @property
    def stop(self) -> Position:
        """Position of the span that follows."""
        return (self.recording + 1, 0) if self.is_last else (self.recording, self.number + 1)


def printable(text: str) -> str:
    """A path with bytes that are not UTF-8, as in odd file names, written out as escapes."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a UTF-16 pair: impossible in a file name, possible in JSON
        return text.encode("utf-8", "backslashreplace").decode()


def reason_of(error: AudioError, name: str) -> str:
    """Printable reason why a recording cannot be used, without the recording's name."""
    return printable(str(error).removeprefix(f"{name}: "))


@dataclass(frozen=True)
class SpanReader:
    """Reader of spans, called in worker processes.

    Attributes:
        source: recordings.
        sampling_rate: rate in Hz at which spans are counted.
        span_samples: samples of a span at that rate; None reads recordings whole.
        read: returns the content of a task from an open recording, and its number of samples.
    """

    source: Source
    sampling_rate: int
    span_samples: int | None
    read: Callable[[Decoder, Task], tuple[Any, int]]

    def __call__(self, task: Task) -> Span:
        """Read one span; what is wrong with the recording becomes the span's problem.

        Raises:
            BestRQ2Error: the source as a whole cannot be read any more.
        """
        name = self.source.describe(task.recording)
        frames, spans = task.frames, task.spans
        try:
            with shorter_files() as shorter, self.source.opened(task.recording) as decoder:
                if frames is None or spans is None:
                    frames = decoder.measure()
                    spans = self._count(frames, decoder.rate)
                decoder.frames = frames  # saves measuring the file again
                content, samples = self.read(decoder, Task(task.recording, task.number, spans, frames))
            seconds = samples / self.sampling_rate
            span = Span(task.recording, task.number, printable(name), content, seconds, spans, frames)
            found = shorter[-1]._replace(path=span.path) if shorter and span.is_last else None
            return replace(span, shorter=found)
        except AudioError as error:  # `opened` turns every exception of its block into one
            start = task.number * (self.span_samples or 0) / self.sampling_rate
            problem = (f"from {start:g} s on: " if task.number else "") + reason_of(error, name)
            known = spans or task.number + 1
            return Span(task.recording, task.number, printable(name), spans=known, frames=frames, problem=problem)

    def _count(self, frames: int, rate: int) -> int:
        if self.span_samples is None:
            return 1
        return max(1, -(-frames * self.sampling_rate // (rate * self.span_samples)))


def sample_reader(source: Source, sampling_rate: int) -> SpanReader:
    """Reader of spans of samples: float32, or int16 with a full scale of 32768, at `sampling_rate` in Hz."""
    length = round(SPAN_SECONDS * sampling_rate)
    return SpanReader(source, sampling_rate, length, partial(_read_samples, length, sampling_rate))


def _read_samples(length: int, sampling_rate: int, decoder: Decoder, task: Task) -> tuple[np.ndarray, int]:
    samples = read_span(decoder, task.number * length, length, sampling_rate)
    if not len(samples) and task.number == 0:
        raise AudioError("holds no samples.")
    return samples.copy(), len(samples)  # it may be a view into a file that is closed soon


def span_samples(spans: Iterable[Span]) -> Iterator[np.ndarray]:
    """Samples of the spans of one recording, float32 [samples] each.

    Raises:
        AudioError: the reason why a span cannot be used.
    """
    for span in spans:
        if span.problem:
            raise AudioError(span.problem)
        yield to_float32(span.content)


def names_digest(source: Source, label: str) -> str:
    """Hash of the descriptions of all recordings, in hexadecimal; reading them is shown as progress of `label`."""
    digest = hashlib.blake2b(digest_size=16)
    with Progress(f"{label} reads names", len(source), "files", leave=False) as progress:
        for number, name in enumerate(source.names()):
            digest.update(os.fsencode(name) + b"\n")
            if not number % _NAMES_SHOWN:
                progress.show(number)
    return digest.hexdigest()


class SpanStream:
    """Spans of some stretches in order, read ahead in bounded memory; used as a context and iterated once.

    A thread collects what worker processes read while the job computes. All spans of a recording follow each other.

    Args:
        read: reads a task, for instance a `SpanReader`; picklable.
        stretches: recordings to read.
        num_workers: processes that read; 0 reads in the thread.
        describe: describes a recording, for the message about a process that died while reading it.
    """

    def __init__(
        self,
        read: Callable[[Task], Span],
        stretches: Iterable[Stretch],
        num_workers: int,
        describe: Callable[[int], str] = str,
    ) -> None:
        self._read, self._stretches, self._num_workers, self._describe = read, stretches, num_workers, describe
        self._in_order: Callable[..., Iterator[Span]] = self._here
        self._queue: deque[tuple[Span, int]] = deque()
        self._bytes = 0
        self._stopped = self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        # Daemon: a job that fails must not wait for a slow read.
        self._thread = threading.Thread(target=self._fill, daemon=True, name="span-stream")
        self._stack = ExitStack()

    def __enter__(self) -> SpanStream:
        self._stack.callback(self._thread.join, 10.0)
        if self._num_workers:
            # Forked before the thread starts, in the main thread: workers end with the thread that forked them.
            pool = WorkerPool(self._read, self._num_workers, self._describe)
            self._in_order = self._stack.enter_context(pool).in_order
        self._stack.callback(self._stop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Span]:
        """The spans.

        Raises:
            BestRQ2Error: a worker process died, or the source cannot be read any more.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ended)
                if not self._queue:
                    break
                span, size = self._queue.popleft()
                self._bytes -= size
                self._changed.notify_all()
            yield span
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _fill(self) -> None:
        try:
            for span in self._spans():
                size = 0 if span.content is None else int(span.content.nbytes)
                with self._changed:
                    self._queue.append((span, size))
                    self._bytes += size
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._bytes < _AHEAD_BYTES or self._stopped)
                    if self._stopped:
                        return
        except BaseException as error:  # raised again where the spans are consumed
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _spans(self) -> Iterator[Span]:
        for span in self._in_order(self._first_tasks()):
            yield span
            later = range(span.number + 1, span.spans)
            # Before the tasks of the recordings that follow, so that no recording waits half read.
            yield from self._in_order(
                (Task(span.recording, number, span.spans, span.frames) for number in later), urgent=True
            )

    def _first_tasks(self) -> Iterator[Task]:
        for (recording, number), stop in self._stretches:
            yield from (Task(each, number if each == recording else 0) for each in range(recording, stop))

    def _here(self, tasks: Iterable[Task], urgent: bool = False) -> Iterator[Span]:
        return map(self._read, tasks)


@dataclass
class _Worker:
    """One process, its pipe, and the numbers of its tasks."""

    process: BaseProcess
    connection: Connection
    tasks: deque[int] = field(default_factory=deque)


class WorkerPool:
    """Processes that read spans; used as a context.

    Unlike a `ProcessPoolExecutor` it bounds the bytes of spans that wait, lets some tasks go first, and names the
    recording during which a process died.

    Args:
        read: reads a task; picklable (on Linux it is forked).
        count: number of processes.
        describe: describes a recording, for the message about a process that died while reading it.
    """

    def __init__(self, read: Callable[[Task], Span], count: int, describe: Callable[[int], str]) -> None:
        self._read, self._count, self._describe = read, count, describe
        self._workers: list[_Worker] = []
        self._tasks: dict[int, Task] = {}
        self._waiting, self._urgent = deque[int](), deque[int]()
        self._done: dict[int, bytes] = {}
        self._held = self._number = 0

    def __enter__(self) -> WorkerPool:
        # Forked workers need no import guard in the user's script; they run no torch threads.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with _interruption_later():
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._read, os.getpid()), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # it writes no files that could be left incomplete
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()

    def in_order(self, tasks: Iterable[Task], urgent: bool = False) -> Iterator[Span]:
        """Spans of some tasks, in their order.

        Args:
            tasks: the tasks, read as far ahead as keeps all processes busy.
            urgent: do them before unfinished tasks of other calls; this call must be finished first.

        Raises:
            BestRQ2Error: a process died.
        """
        coming, numbers = iter(tasks), deque[int]()
        while True:
            while len(numbers) < _AHEAD * self._count:
                try:
                    task = next(coming)
                except StopIteration:
                    break
                self._tasks[self._number] = task
                (self._urgent if urgent else self._waiting).append(self._number)
                numbers.append(self._number)
                self._number += 1
            if not numbers:
                return
            yield self._result(numbers.popleft())

    def _result(self, number: int) -> Span:
        self._assign(number)
        while number not in self._done:
            for connection in wait([worker.connection for worker in self._workers]):
                self._receive(next(worker for worker in self._workers if worker.connection is connection))
            self._assign(number)
        content = self._done.pop(number)
        self._held -= len(content)
        del self._tasks[number]
        self._assign(number + 1)
        succeeded, outcome = pickle.loads(content)
        if not succeeded:
            raise outcome  # of the source as a whole: problems of a recording are in its span
        return outcome

    def _assign(self, wanted: int) -> None:
        """Give waiting tasks to processes that have room for one."""
        while queue := self._urgent or self._waiting:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            full = self._held > _HELD_BYTES and queue[0] != wanted
            if full or len(worker.tasks) >= _PER_WORKER:
                return
            number = queue.popleft()
            worker.tasks.append(number)
            try:
                worker.connection.send(self._tasks[number])
            except OSError:
                self._died(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            content = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._died(worker)
        self._done[worker.tasks.popleft()] = content
        self._held += len(content)

    def _died(self, worker: _Worker) -> NoReturn:
        worker.process.join(5.0)
        code = worker.process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        task = self._describe(self._tasks[worker.tasks[0]].recording) if worker.tasks else "nothing"
        raise BestRQ2Error(
            f"a worker process died ({how}) while it read {task}; if memory ran out use fewer --num-workers, otherwise "
            "take this recording out, and run the same command again"
        )


@contextlib.contextmanager
def _interruption_later() -> Iterator[None]:
    """Deliver Ctrl-C at the end of the block, so that a process started in it can ignore it first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, read: Callable[[Task], Span], parent: int) -> None:
    """Loop of a worker process: one task after the other until the main process ends."""
    become_worker(parent)
    torch.set_num_threads(1)  # the processes share the CPUs already
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcome: Any = True, read(task)
        except Exception as error:
            error.add_note(traceback.format_exc())
            outcome = False, error
        try:
            connection.send(outcome)
        except OSError:
            return
