"""The work of one decoding process: from five minutes of a recording to samples at the model's rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeAlias

import numpy as np

from bestrq2.data.audio import open_audio, read_span
from bestrq2.data.decoders import AudioBytes, Decoder, UnreadableAudioError
from bestrq2.data.lanes import WINDOW, WINDOW_BYTES
from bestrq2.data.prepare.cutting import printable, reason_of
from bestrq2.data.remote import StreamSource
from bestrq2.data.sources import Source
from bestrq2.data.transfer import Sample, Shard
from bestrq2.errors import AudioError, BestRQ2Error

AnySource: TypeAlias = Source | StreamSource

# Decoded by one task; longer recordings take several.
SPAN_SECONDS = 300.0


class Stretch(NamedTuple):
    """Neighbouring recordings that one process embeds.

    Attributes:
        lane: number of the remote shard; 0 for a source with numbered recordings.
        start: number of the first recording.
        stop: number after the last; None for all that follow in the shard.
    """

    lane: int
    start: int
    stop: int | None


class Task(NamedTuple):
    """A span of a recording, or the end of a remote shard.

    Attributes:
        lane: see `Stretch`.
        number: of the recording in the lane.
        span: which span, from 0.
        sample: the encoded recording, where it comes from a remote shard.
        end: of a shard, what is wrong with it, "" if nothing is; None for a recording.
    """

    lane: int
    number: int
    span: int = 0
    sample: Sample | None = None
    end: str | None = None


class Span(NamedTuple):
    """What became of a task.

    Attributes:
        name: of the recording, or of the shard that ends.
        samples: [samples] at the model's rate, float32, or int16 (full scale 32768); None where there is a problem.
        spans: how many the whole recording has; known with the first one.
        problem: why the recording cannot be used.
    """

    name: str
    samples: np.ndarray | None = None
    spans: int = 1
    problem: str = ""


def tasks(source: AnySource, stretches: Iterable[Stretch]) -> Iterator[Task]:
    """The first task of every recording in some stretches, in their order; remote shards are read meanwhile.

    Raises:
        BestRQ2Error: a remote shard cannot be fetched now.
    """
    for stretch in stretches:
        if isinstance(source, StreamSource):
            yield from _shard_tasks(source, stretch)
        else:
            assert stretch.stop is not None
            yield from (Task(0, number) for number in range(stretch.start, stretch.stop))


def _shard_tasks(source: StreamSource, stretch: Stretch) -> Iterator[Task]:
    url, position = source.urls[stretch.lane], stretch.start
    shard = Shard(url, source.patience)
    try:
        while True:
            first, samples = shard.window(position, WINDOW, WINDOW_BYTES)
            if not samples:
                break
            for sample in samples[position - first :]:
                yield Task(stretch.lane, position, sample=sample)
                position += 1
    finally:
        shard.close()
    if shard.failure is not None and not shard.failure.lasting:
        raise BestRQ2Error(
            f"{url}: cannot be fetched ({shard.failure}); see to the network and run the same command again to continue"
        )
    problem = shard.damage if shard.failure is None else f"could not be fetched: {shard.failure}"
    yield Task(stretch.lane, position, end=problem or "")


def task_name(source: AnySource, task: Task) -> str:
    """What a task's recording, or the shard that ends, is called."""
    if task.sample is not None:
        return task.sample.name
    return source.urls[task.lane] if isinstance(source, StreamSource) else source.describe(task.number)


def decode_span(source: AnySource, sampling_rate: int, task: Task) -> Span:
    """Decode one span of a recording.

    Args:
        source: where the recording comes from.
        sampling_rate: wanted rate in Hz.
        task: which span.

    Raises:
        BestRQ2Error: the source as a whole cannot be read any more; what is wrong with one recording is in the result.
    """
    name = task_name(source, task)
    if task.end is not None:
        return Span(printable(name), problem=task.end)
    length = round(SPAN_SECONDS * sampling_rate)
    try:
        with _opened(source, task) as decoder:
            samples = read_span(decoder, task.span * length, length, sampling_rate)
            if not len(samples) and task.span == 0:
                raise AudioError("holds no samples.")
            # It may be a view into a file that is closed soon.
            return Span(printable(name), samples.copy(), _spans(decoder, len(samples), length, sampling_rate))
    except Exception as error:
        if isinstance(error, BestRQ2Error) and not isinstance(error, AudioError):
            raise
        place = f"from {task.span * SPAN_SECONDS:g} s on: " if task.span else ""
        return Span(printable(name), problem=place + reason_of(error, name))


def _opened(source: AnySource, task: Task) -> AbstractContextManager[Decoder]:
    if isinstance(source, Source):
        return source.opened(task.number)
    assert task.sample is not None
    if task.sample.problem:
        raise UnreadableAudioError(task.sample.problem)
    return open_audio(AudioBytes(task.sample.name, task.sample.content))


def _spans(decoder: Decoder, found: int, length: int, sampling_rate: int) -> int:
    if found < length:
        return 1
    return max(1, -(-decoder.measure() * sampling_rate // (decoder.rate * length)))
