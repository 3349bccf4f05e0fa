"""The work of one process: from ten minutes of a recording to encoded clips, or the reasons why there are none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import soundfile
import torch

from bestrq2.data.audio import check_usable, read_span
from bestrq2.data.band_sums import BandSums
from bestrq2.data.decoders import Decoder, UnreadableAudioError, to_float32
from bestrq2.data.prepare.options import FORMATS, SPAN_SECONDS, Options
from bestrq2.data.sources import Source
from bestrq2.errors import AudioError, BestRQ2Error
from bestrq2.model.log_mel import LogMel

Kind = Literal["broken", "silent", "too short", "duplicate"]
"""Why something was dropped."""

# Bytes of a content hash: no two of 10^12 clips share one by chance.
DIGEST_BYTES = 16


class Task(NamedTuple):
    """A span of a recording.

    Attributes:
        recording: its number in the source.
        number: of the span, from 0.
        frames: samples per channel of the whole recording, where they are known from an earlier span.
        spans: how many there are, likewise.
    """

    recording: int
    number: int
    frames: int | None = None
    spans: int | None = None


@dataclass(frozen=True)
class Clip:
    """A clip to keep.

    Attributes:
        segment: which one of its recording.
        samples: its length.
        audio: the encoded file.
        metadata: what goes beside it, ready for JSON.
        digest: hash of its samples.
        clipped: whether samples beyond full scale were cut off.
        sums: `BandSums.to_bytes` of its log-mel spectrogram.
    """

    segment: int
    samples: int
    audio: bytes
    metadata: dict[str, Any]
    digest: bytes
    clipped: bool
    sums: bytes


@dataclass(frozen=True)
class Drop:
    """A segment, or all the rest of a recording, that cannot be used.

    Attributes:
        segment: which one of its recording, or the first one.
        samples: its length, as far as it was decoded.
        kind: why; None for the remainder of a cut, which is nobody's fault.
        reason: in words.
    """

    segment: int
    samples: int
    kind: Kind | None
    reason: str = ""


@dataclass(frozen=True)
class Span:
    """What a task came to.

    Attributes:
        task: its task.
        name: what a person calls the recording.
        pieces: its segments, in order.
        frames: samples per channel of the whole recording.
        spans: how many tasks the recording takes.
    """

    task: Task
    name: str
    pieces: list[Clip | Drop]
    frames: int | None
    spans: int


def printable(name: str) -> str:
    """A name with the bytes that are no UTF-8, as in odd file names, written out."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a letter of UTF-16, which no file name can hold, but JSON can
        return name.encode("utf-8", "backslashreplace").decode()


def cut_span(source: Source, options: Options, task: Task) -> Span:
    """Decode a span of a recording, cut it into clips, check, encode and hash them.

    Args:
        source: where the recording comes from.
        options: how.
        task: which span.

    Returns:
        The clips, and in place of unusable ones the reasons; a recording that cannot be read, or that raises whatever
        nobody thought of, gives a reason only.

    Raises:
        BestRQ2Error: the source as a whole cannot be read any more.
    """
    name = source.describe(task.recording)
    frames, spans = task.frames, task.spans
    try:
        with source.opened(task.recording) as decoder:
            if frames is None or spans is None:
                frames = decoder.measure()
                spans = _count_spans(frames, decoder.rate, options)
            decoder.frames = frames  # spares the decoder going through the file again
            cutter = _Cutter(source, options, task, decoder, spans)
            return Span(task, printable(name), list(cutter.pieces()), frames, spans)
    except Exception as error:
        if isinstance(error, BestRQ2Error) and not isinstance(error, AudioError):
            raise
        first = task.number * options.segments_per_span
        reason = reason_of(error, name)
        if task.number:
            reason = f"from {first * (options.segment_seconds or 0):g} s on: {reason}"
        return Span(task, printable(name), [Drop(first, 0, "broken", reason)], frames, spans or task.number + 1)


def _count_spans(frames: int, rate: int, options: Options) -> int:
    if options.segment_samples is None:
        return 1
    samples = -(-frames * options.sampling_rate // rate)
    return max(1, -(-samples // (options.segment_samples * options.segments_per_span)))


def reason_of(error: Exception, name: str) -> str:
    """Why a recording of that name cannot be used, in words that can be printed; the name is left out."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})."
    if isinstance(error, AudioError):
        return printable(str(error).removeprefix(f"{name}: "))
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)} line {place.lineno}"
    return f"cannot be used ({type(error).__name__}: {printable(str(error))}, in {where})."


class _Cutter:
    """One span, cut from an open recording."""

    def __init__(self, source: Source, options: Options, task: Task, decoder: Decoder, spans: int) -> None:
        self.source, self.options, self.task, self.decoder, self.spans = source, options, task, decoder, spans

    def pieces(self) -> Iterator[Clip | Drop]:
        """Clips, and drops where there are none."""
        segments = list(self._segments())
        several = self.spans > 1 or len(segments) > 1
        for segment, found in segments:
            piece = self._damaged(segment, found) if isinstance(found, AudioError) else self._piece(segment, found)
            if several and isinstance(piece, Drop) and piece.kind:
                piece = Drop(segment, piece.samples, piece.kind, f"from {self._start(segment):g} s: {piece.reason}")
            yield piece

    def _segments(self) -> Iterator[tuple[int, np.ndarray | AudioError]]:
        """Number and samples of each segment; where the span as a whole is damaged, each is read for itself."""
        length, rate = self.options.segment_samples, self.options.sampling_rate
        if length is None:
            yield 0, read_span(self.decoder, 0, None, rate)
            return
        first, count = self.task.number * self.options.segments_per_span, self.options.segments_per_span
        try:
            samples = read_span(self.decoder, first * length, count * length, rate)
        except UnreadableAudioError:
            raise
        except AudioError as error:
            if count == 1:
                yield first, error
            else:
                yield from self._each(range(first, first + count), length)
            return
        # The first segment of a recording is there even if it is empty.
        ends = max(len(samples), 1 if self.task.number == 0 else 0)
        for place in range(0, ends, length):
            yield first + place // length, samples[place : place + length]

    def _each(self, segments: range, length: int) -> Iterator[tuple[int, np.ndarray | AudioError]]:
        for segment in segments:
            try:
                samples = read_span(self.decoder, segment * length, length, self.options.sampling_rate)
            except AudioError as error:
                yield segment, error
                continue
            if not len(samples):
                return
            yield segment, samples

    def _start(self, segment: int) -> float:
        return segment * (self.options.segment_samples or 0) / self.options.sampling_rate

    def _damaged(self, segment: int, error: AudioError) -> Drop:
        return Drop(segment, 0, "broken", reason_of(error, self.source.describe(self.task.recording)))

    def _piece(self, segment: int, waveform: np.ndarray) -> Clip | Drop:
        options = self.options
        if len(waveform) < options.min_samples:
            if segment:
                return Drop(segment, len(waveform), None)
            seconds = len(waveform) / options.sampling_rate
            reason = f"is too short: {seconds:.2f} s, at least {options.min_seconds:g} s are needed."
            return Drop(segment, len(waveform), "too short", reason)
        samples, clipped = to_int16(waveform)
        kept = samples / np.float32(32768)
        try:
            check_usable(kept)
        except AudioError as error:
            return Drop(segment, len(waveform), "silent", str(error))
        digest = content_digest(samples)
        audio = encoded(samples, options)
        metadata = self._metadata(segment, len(samples), digest)
        return Clip(segment, len(samples), audio, metadata, digest, clipped, band_sums(kept, options).to_bytes())

    def _metadata(self, segment: int, samples: int, digest: bytes) -> dict[str, Any]:
        """What is known of a clip; where the source is itself cut from recordings, its origin is the first of all."""
        known = json_ready(self.source.metadata(self.task.recording))
        path, start, original = (known.get(key) for key in ("path", "start", "original_sampling_rate"))
        rate = self.options.sampling_rate
        return {
            **known,
            "path": printable(path if isinstance(path, str) and path else self.source.describe(self.task.recording)),
            "start": (start if _is_number(start) else 0.0) + self._start(segment),
            "duration": samples / rate,
            "sampling_rate": rate,
            "original_sampling_rate": original if _is_number(original) else self.decoder.rate,
            "content_hash": digest.hex(),
        }


def json_ready(values: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that JSON can hold, as they come back from it; NaN and infinity are none of them."""
    ready = {}
    for name, value in values.items():
        with suppress(TypeError, ValueError, RecursionError):
            ready[str(name)] = json.loads(json.dumps(value, allow_nan=False))
    return ready


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def to_int16(waveform: np.ndarray) -> tuple[np.ndarray, bool]:
    """Round a waveform to 16 bit; what 16-bit PCM came from comes out the same.

    Args:
        waveform: [samples], float or int16.

    Returns:
        int16 [samples], full scale 32768, and whether there were samples beyond full scale, which are cut off.
    """
    # What is far beyond full scale would leave float32 too.
    scaled = np.rint(np.clip(to_float32(waveform), -2, 2) * np.float32(32768))
    clipped = bool(scaled.max() > 32768 or scaled.min() < -32768)
    return np.clip(scaled, -32768, 32767).astype(np.int16), clipped


def content_digest(samples: np.ndarray) -> bytes:
    """BLAKE2b over int16 samples as little-endian bytes: 16 bytes."""
    return hashlib.blake2b(samples.astype("<i2", copy=False).tobytes(), digest_size=DIGEST_BYTES).digest()


def encoded(samples: np.ndarray, options: Options) -> bytes:
    """An audio file of int16 [samples]."""
    file = io.BytesIO()
    soundfile.write(file, samples, options.sampling_rate, format=FORMATS[options.format], subtype="PCM_16")
    return file.getvalue()


@lru_cache(maxsize=4)
def _log_mel(options: Options) -> LogMel:
    return LogMel(options.front_end())


@torch.inference_mode()
def band_sums(waveform: np.ndarray, options: Options) -> BandSums:
    """Sums of the log-mel spectrogram of float32 [samples], of each ten minutes for itself."""
    log_mel = _log_mel(options)
    sums = BandSums(log_mel.config.num_mel_bands)
    for part in torch.from_numpy(waveform).split(round(SPAN_SECONDS * options.sampling_rate)):
        sums.add(*log_mel(part[None]))
    return sums
