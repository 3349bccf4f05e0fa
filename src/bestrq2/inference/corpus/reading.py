"""Decoded recordings in the order of the source, made ahead of the model by worker processes, in bounded memory."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from bestrq2.data.decoders import to_float32
from bestrq2.data.workers import WorkerPool
from bestrq2.inference.corpus.tasks import AnySource, Span, Stretch, Task, decode_span, task_name, tasks

# Bytes of decoded recordings that wait for the model, on disk those of long ones; and of encoded remote ones.
AHEAD_BYTES = ENCODED_BYTES = 256_000_000
# Sun's .au: mono float32 behind a header that leaves the length open, so that no recording is too long for it.
_AU = struct.Struct(">4s5I")


@dataclass(frozen=True)
class Recording:
    """A decoded recording, or the end of a remote shard.

    Attributes:
        lane: see `Stretch`.
        number: in its lane; of an end, the number of recordings in the shard.
        name: what the source calls it.
        audio: [samples] at the model's rate, float32 or int16; of a long one a file of these; None without audio.
        seconds: duration.
        problem: why there is no audio.
        is_end: whether a shard ends here.
    """

    lane: int
    number: int
    name: str
    audio: np.ndarray | Path | None = None
    seconds: float = 0.0
    problem: str = ""
    is_end: bool = False

    @property
    def size(self) -> int:
        """Bytes, in memory or on disk."""
        if isinstance(self.audio, Path):
            return self.audio.stat().st_size
        return 0 if self.audio is None else self.audio.nbytes


class _Decoding(Protocol):
    """What `WorkerPool.in_order` does, or its like in this process."""

    def __call__(
        self, tasks: Iterable[Task], urgent: bool = False, room: Callable[[], bool] = lambda: True
    ) -> Iterator[Span]: ...


class Reader:
    """Reads the recordings of some stretches; used as a context, and iterated once.

    A thread collects what the processes decode while the model runs.

    Args:
        source: where the recordings come from.
        stretches: which ones.
        sampling_rate: wanted rate in Hz.
        num_workers: processes that decode; 0 decodes in the thread.
        folder: for files of long recordings; whoever takes them deletes them.
    """

    def __init__(
        self, source: AnySource, stretches: Iterable[Stretch], sampling_rate: int, num_workers: int, folder: Path
    ) -> None:
        self._source, self._rate, self._folder = source, sampling_rate, folder
        self._stretches, self._num_workers = stretches, num_workers
        self._given: deque[Task] = deque()
        self._encoded = 0
        self._queue: deque[Recording] = deque()
        self._held = 0
        self._stopped = self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="corpus-reader")
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        self._stack.callback(self._thread.join, 10.0)
        work = partial(decode_span, self._source, self._rate)
        self._decode: _Decoding = partial(_decode_here, work)
        if self._num_workers:
            pool = WorkerPool[Task, Span](work, self._num_workers, partial(task_name, self._source))
            self._decode = self._stack.enter_context(pool).in_order
        self._stack.callback(self._stop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Recording]:
        """The recordings.

        Raises:
            BestRQ2Error: a process died, or the source cannot be read any more.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ended)
                if not self._queue:
                    break
                recording = self._queue.popleft()
                self._held -= recording.size
                self._changed.notify_all()
            yield recording
        if self._error is not None:
            raise self._error

    def _fill(self) -> None:
        """What the thread does."""
        try:
            for recording in self._recordings():
                with self._changed:
                    self._queue.append(recording)
                    self._held += recording.size
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._held < AHEAD_BYTES or self._stopped)
                    if self._stopped:
                        return
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _recordings(self) -> Iterator[Recording]:
        for span in self._decode(self._tasks(), room=lambda: self._encoded < ENCODED_BYTES):
            task = self._given.popleft()
            yield self._recording(task, span)
            self._encoded -= len(task.sample.content) if task.sample else 0

    def _tasks(self) -> Iterator[Task]:
        for task in tasks(self._source, self._stretches):
            self._given.append(task)
            self._encoded += len(task.sample.content) if task.sample else 0
            yield task

    def _recording(self, task: Task, span: Span) -> Recording:
        if task.end is not None or span.samples is None:
            return Recording(task.lane, task.number, span.name, problem=span.problem, is_end=task.end is not None)
        if span.spans == 1:
            seconds = len(span.samples) / self._rate
            return Recording(task.lane, task.number, span.name, span.samples, seconds)
        return self._long(task, span)

    def _long(self, task: Task, first: Span) -> Recording:
        """Put a recording of several spans into a file, from which the model reads window by window."""
        path, count = self._folder / f"{task.lane}-{task.number}.au", 0
        rest = self._decode((task._replace(span=number) for number in range(1, first.spans)), urgent=True)
        with path.open("wb") as file:
            file.write(_AU.pack(b".snd", _AU.size, 0xFFFFFFFF, 6, self._rate, 1))
            problem = ""
            for span in chain([first], rest):
                problem = problem or span.problem
                if span.samples is not None and not problem:
                    file.write(to_float32(span.samples).astype(">f4").tobytes())
                    count += len(span.samples)
        if problem:
            path.unlink()
            return Recording(task.lane, task.number, first.name, problem=problem)
        return Recording(task.lane, task.number, first.name, path, count / self._rate)


def _decode_here(
    work: Callable[[Task], Span],
    tasks: Iterable[Task],
    urgent: bool = False,
    room: Callable[[], bool] = lambda: True,
) -> Iterator[Span]:
    return map(work, tasks)
