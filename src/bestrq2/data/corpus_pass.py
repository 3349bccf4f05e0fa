"""One pass over a corpus: an ordered, bounded stream of spans of its recordings, turned into parts by a job.

`embed`, `predict`, `prepare` and `prepare --check` are `CorpusJob`s. Worker processes read recordings in spans of some
minutes (`SpanStream`); the job turns spans into parts, tables of rows for neighbouring recordings; a `PartsFolder`
keeps finished parts, so that a killed job continues after them. Processes started by torchrun and actors of Ray Data
make the same parts: a part depends on the recordings alone, not on where it is made.
"""

from __future__ import annotations

import hashlib
import os
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bestrq2.data.audio import read_span
from bestrq2.data.decoders import Decoder, to_float32
from bestrq2.data.parts import Part, Position, Stretch
from bestrq2.data.sources import Source
from bestrq2.data.worker_pool import WorkerPool
from bestrq2.errors import AudioError, BestRQ2Error, ConfigError
from bestrq2.progress import Progress

BLOCK = 64
"""Neighbouring recordings that are handed out together; no part extends over the end of a block."""

PART_SECONDS = 1800.0
"""Audio in a part (s): a kill loses at most one part."""

SPAN_SECONDS = 300.0
"""Audio that is read at once (s); longer recordings are read in several spans."""

# Bytes of decoded spans that wait for the job.
_AHEAD_BYTES = 256_000_000
# Names that are read between two updates of the display.
_NAMES_SHOWN = 1000


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
    """

    recording: int
    number: int
    path: str
    content: Any = None
    seconds: float = 0.0
    spans: int = 1
    frames: int | None = None
    problem: str = ""

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


def reason_of(error: Exception, name: str) -> str:
    """Printable reason why a recording cannot be used, without the recording's name."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})."
    if isinstance(error, AudioError):
        return printable(str(error).removeprefix(f"{name}: "))
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)} line {place.lineno}"
    return f"cannot be used ({type(error).__name__}: {printable(str(error))}, in {where})."


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
            with self.source.opened(task.recording) as decoder:
                if frames is None or spans is None:
                    frames = decoder.measure()
                    spans = self._count(frames, decoder.rate)
                decoder.frames = frames  # saves measuring the file again
                content, samples = self.read(decoder, Task(task.recording, task.number, spans, frames))
                seconds = samples / self.sampling_rate
                return Span(task.recording, task.number, printable(name), content, seconds, spans, frames)
        except Exception as error:
            if isinstance(error, BestRQ2Error) and not isinstance(error, AudioError):
                raise
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
    with Progress(f"{label} reads names", len(source), "files") as progress:
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
        self._thread = threading.Thread(target=self._fill, daemon=True, name="span-stream")
        self._stack = ExitStack()

    def __enter__(self) -> SpanStream:
        self._stack.callback(self._thread.join, 10.0)
        if self._num_workers:
            # Forked before the thread starts, in the main thread: workers end with the thread that forked them.
            pool = WorkerPool[Task, Span](self._read, self._num_workers, lambda task: self._describe(task.recording))
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


class CorpusJob(ABC):
    """Work on every recording of a corpus, defined span by span.

    Attributes:
        identity: everything that the results depend on, as text: source, options, model, version.
        read: reads a task in worker processes; picklable.
        block: recordings that are handed out together.
        streams_long: whether `long_part` processes recordings of several spans, instead of `part`.
    """

    identity: dict[str, str]
    read: Callable[[Task], Span]
    block: int | None = None
    streams_long = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of recordings."""

    @abstractmethod
    def describe(self, recording: int) -> str:
        """Description of a recording for messages."""

    @abstractmethod
    def part(self, spans: list[Span]) -> Part:
        """Part of neighbouring spans."""

    def long_part(self, first: Span, following: Iterator[Span]) -> Part:
        """Part of one long recording; takes exactly the rest of its spans from `following`."""
        raise NotImplementedError

    def parts(self, spans: Iterable[Span]) -> Iterator[Part]:
        """Parts of a stream of spans: each ends at the end of a block or after half an hour of audio."""
        coming, waiting = iter(spans), list[Span]()
        for span in coming:
            if self.streams_long and not span.is_last:
                if waiting:
                    yield self.part(waiting)
                    waiting = []
                yield self.long_part(span, coming)
                continue
            waiting.append(span)
            block_ends = span.is_last and (span.recording + 1) % (self.block or BLOCK) == 0
            if block_ends or sum(one.seconds for one in waiting) >= PART_SECONDS:
                yield self.part(waiting)
                waiting = []
        if waiting:
            yield self.part(waiting)

    def blocks(self, process: Process) -> Iterator[range]:
        """Blocks of recordings that belong to a process, dealt out in turn."""
        size = self.block or BLOCK
        for start in range(process.rank * size, len(self), process.world_size * size):
            yield range(start, min(start + size, len(self)))


def part_of(spans: list[Span], rows: pa.Table, rejected: list[tuple[str, str]]) -> Part:
    """Part of complete spans with their results."""
    seconds, recordings = sum(span.seconds for span in spans), sum(1 / span.spans for span in spans)
    return Part(spans[0].start, spans[-1].stop, rows, rejected, seconds, recordings)


class Process(NamedTuple):
    """One of several processes that share a corpus, as numbered by torchrun.

    Attributes:
        rank: number of the process.
        world_size: number of processes.
        local_rank: number of the process on its machine.
        local_world_size: number of processes on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


ALONE = Process()


def this_process() -> Process:
    """The process according to RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; the only one if they are not set.

    Raises:
        ConfigError: they are not numbers, or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not all(value.isascii() and value.isdigit() for value in found.values()) or not (
        int(found["RANK"]) < int(found["WORLD_SIZE"])
    ):
        raise ConfigError(f"{' '.join('='.join(pair) for pair in found.items())}: expected numbers, RANK < WORLD_SIZE")
    return Process(**{name.lower(): int(value) for name, value in found.items()})


@dataclass(frozen=True)
class Workers:
    """Processes that make the parts.

    Attributes:
        num_workers: processes that read for this one; 0 reads in a thread.
        process: which one of several processes started by torchrun this is.
        ray: "local" or the address of a Ray cluster; None without Ray.
        ray_actors: number of Ray actors; None for one per GPU, or per CPU without GPUs.
    """

    num_workers: int = 0
    process: Process = ALONE
    ray: str | None = None
    ray_actors: int | None = None

    @property
    def are_several(self) -> bool:
        """Whether parts are made by more than this process and its readers."""
        return self.process.world_size > 1 or self.ray is not None


def choose_workers(
    num_workers: int | None, ray: str | None = None, ray_actors: int | None = None, most: int | None = None
) -> Workers:
    """Processes to use, from the arguments of a command and the variables that torchrun sets.

    Args:
        num_workers: processes that read; None for one per available CPU, shared by the processes of this machine.
        ray: "local", the address of a cluster, or None.
        ray_actors: number of actors.
        most: limit of the default.

    Raises:
        ConfigError: a number is out of range, or Ray and torchrun are used together.
    """
    process = this_process()
    if ray is not None and process.world_size > 1:
        raise ConfigError("--ray distributes the work itself; start one process, without torchrun")
    if ray_actors is not None and (ray is None or ray_actors < 1):
        raise ConfigError(f"ray_actors is {ray_actors}; it must be 1 or more, and requires --ray")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more")
    if num_workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = max(1, min(most or cpus, cpus // process.local_world_size))
    return Workers(num_workers, process, ray, ray_actors)


def make_parts(
    job: CorpusJob,
    stretches: list[Stretch],
    workers: Workers,
    *,
    label: str,
    unit: str,
    remake: Callable[[], CorpusJob] | None = None,
    device: str | None = None,
) -> Iterator[Part]:
    """Parts of some stretches as they are made, with progress on standard error.

    Args:
        job: the work.
        stretches: recordings to do, for instance from `PartsFolder.missing`.
        workers: processes that make the parts; without Ray the parts come in order.
        label: name of the work in the display.
        unit: unit of the display, such as "files".
        remake: makes the same job in another process, for Ray; picklable.
        device: device of the job; with "cpu" Ray reserves no GPU.

    Raises:
        BestRQ2Error: a worker died, or the source cannot be read any more.
    """
    total = sum(map(len, job.blocks(workers.process)))
    begun = total - sum(stop - start[0] for start, stop in stretches)
    if not stretches:
        return
    with Progress(label, total, unit, begun, shown=workers.process.rank == 0) as progress:
        done, seconds = float(begun), 0.0

        def count(recordings: float, audio: float) -> None:
            nonlocal done, seconds
            done, seconds = done + recordings, seconds + audio
            progress.show(done, seconds / 3600)

        if workers.ray is None:
            with SpanStream(job.read, stretches, workers.num_workers, job.describe) as stream:
                yield from job.parts(_counted(stream, count))
            return
        from bestrq2.data.ray_parts import ray_parts

        assert remake is not None
        for part in ray_parts(remake, job.identity, stretches, workers.ray, workers.ray_actors, device):
            count(part.recordings, part.seconds)
            yield part


def _counted(spans: Iterable[Span], count: Callable[[float, float], None]) -> Iterator[Span]:
    for span in spans:
        yield span
        count(1 / span.spans, span.seconds)
