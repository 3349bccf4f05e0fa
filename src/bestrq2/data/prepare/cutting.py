"""Cutting: the settings of a prepared corpus, and the clips that a span of a recording gives with them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard, get_type_hints

import numpy as np
import pyarrow as pa
import soundfile
import torch

from bestrq2.data.audio import check_usable, read_span
from bestrq2.data.decoders import Decoder
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.prepare.summary import BandSums
from bestrq2.data.sources import Source
from bestrq2.data.spans import SPAN_SECONDS, Task, printable, reason_of
from bestrq2.data.waveforms import to_float32
from bestrq2.errors import AudioError, ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.log_mel import LogMel

FORMATS = {"wav": "WAV", "flac": "FLAC"}
"""Formats of clips, with their names in libsndfile."""

KINDS = ("broken", "silent", "too short", "duplicate")
"""Reasons for dropping a piece, as counted in the summary."""

CLIP, REMAINDER = "clip", "remainder"
"""Kinds of pieces that are not counted as dropped: clips to keep, and ends of recordings shorter than a clip."""

SHORTER = "shorter"
"""Kind of a piece without audio, before those of the last span of a recording that is shorter than announced."""

DIGEST_BYTES = 16
"""Bytes of a content hash: 10^12 clips have no collision by chance."""


@dataclass(frozen=True)
class Options:
    """Settings of a prepared corpus.

    Attributes:
        sampling_rate: sampling rate of the clips in Hz.
        format: "wav" or "flac", both 16-bit PCM.
        segment_seconds: longer recordings are cut into clips of this length (s); None keeps them whole.
        min_seconds: length of the shortest clip (s).
        shard_size: size at which a tar is full, in MB (10^6 bytes).

    Raises:
        ConfigError: a value is out of range.
    """

    sampling_rate: int
    format: str
    segment_seconds: float | None
    min_seconds: float
    shard_size: float

    def __post_init__(self) -> None:
        if not 1000 <= self.sampling_rate <= 768_000:
            raise ConfigError(f"sampling_rate is {self.sampling_rate}; expected 1000 to 768000 Hz.")
        if self.format not in FORMATS:
            raise ConfigError(f"format is {self.format!r}; expected {' or '.join(FORMATS)}.")
        for name, value in (("min_seconds", self.min_seconds), ("shard_size", self.shard_size)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value}; it must be positive.")
        segment = self.segment_seconds
        if segment is not None and not (self.min_seconds <= segment < math.inf):
            raise ConfigError(
                f"segment_seconds is {segment}; it must be at least min_seconds ({self.min_seconds:g}), or null to "
                "keep recordings whole."
            )

    @property
    def segment_samples(self) -> int | None:
        """Samples of a clip cut from a longer recording; None if recordings stay whole."""
        return None if self.segment_seconds is None else max(1, round(self.segment_seconds * self.sampling_rate))

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip."""
        return max(1, round(self.min_seconds * self.sampling_rate))

    @property
    def segments_per_span(self) -> int:
        """Clips cut from one span: those of five minutes, or one."""
        if self.segment_samples is None:
            return 1
        return max(1, round(SPAN_SECONDS * self.sampling_rate) // self.segment_samples)

    @property
    def span_samples(self) -> int | None:
        """Samples of a span, a whole number of clips; None if recordings stay whole."""
        return None if self.segment_samples is None else self.segment_samples * self.segments_per_span

    @property
    def num_mel_bands(self) -> int:
        """Mel bands of the spectrogram of the statistics."""
        return self.front_end().num_mel_bands

    def front_end(self) -> BestRQ2Config:
        """Configuration of the default log-mel spectrogram at this sampling rate."""
        highest = min(8000.0, self.sampling_rate / 2)
        seconds = 60_000 / self.sampling_rate  # more than one patch, whatever the rate
        return BestRQ2Config(sampling_rate=self.sampling_rate, mel_max_hz=highest, max_seconds=max(10.0, seconds))


class Piece(NamedTuple):
    """A clip to keep, or a stretch of a recording that is dropped.

    Attributes:
        recording: number of the recording in the source.
        segment: number of the clip in the recording; of a dropped rest of a recording, its first one.
        path: printable description of the recording.
        samples: length at the new rate, as far as it was decoded.
        kind: `CLIP`, `REMAINDER`, `SHORTER` or one of `KINDS`.
        reason: why it was dropped.
        audio: encoded clip.
        metadata: JSON to write beside the clip; of `SHORTER`, the announced and the found length in seconds.
        digest: hash of the samples.
        clipped: whether samples beyond full scale were limited.
        band_sums: `BandSums.to_bytes` of the log-mel spectrogram.
        is_last: whether the recording ends with this piece.
    """

    recording: int
    segment: int
    path: str
    samples: int
    kind: str
    reason: str = ""
    audio: bytes = b""
    metadata: str = ""
    digest: bytes = b""
    clipped: bool = False
    band_sums: bytes = b""
    is_last: bool = False


_TYPES = {int: pa.int64(), str: pa.string(), bytes: pa.large_binary(), bool: pa.bool_()}
PIECES = pa.schema([(name, _TYPES[kind]) for name, kind in get_type_hints(Piece).items()])
"""Columns of a table of pieces."""


def pieces_table(pieces: Iterable[Piece]) -> pa.Table:
    """Pieces as rows of a table, which travels between processes and into files."""
    columns = list(zip(*pieces, strict=True)) or [()] * len(PIECES)
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, PIECES.types, strict=True)], schema=PIECES)


def read_pieces(table: pa.Table) -> Iterator[Piece]:
    """Pieces in the rows of a table."""
    for batch in table.to_batches(max_chunksize=64):  # a copy of few clips at a time
        yield from map(Piece._make, zip(*(column.to_pylist() for column in batch.columns), strict=True))


def cut(source: Source, options: Options, decoder: Decoder, task: Task) -> tuple[pa.Table, int]:
    """Decode a span of a recording, cut it into clips, check, encode and hash them.

    Returns:
        Table of pieces, and the number of samples decoded.

    Raises:
        AudioError: nothing of the span can be decoded.
    """
    pieces = list(_Cutter(source, options, decoder, task).pieces())
    if pieces and task.number == (task.spans or 1) - 1:
        pieces[-1] = pieces[-1]._replace(is_last=True)
    return pieces_table(pieces), sum(piece.samples for piece in pieces)


class _Cutter:
    """Clips of one span of an open recording."""

    def __init__(self, source: Source, options: Options, decoder: Decoder, task: Task) -> None:
        self.source, self.options, self.decoder, self.task = source, options, decoder, task
        self.name = source.describe(task.recording)
        self.path = printable(self.name)

    def pieces(self) -> Iterator[Piece]:
        """Clips, and the reasons where there are none."""
        segments = list(self._segments())
        several = (self.task.spans or 1) > 1 or len(segments) > 1
        for segment, found in segments:
            if isinstance(found, AudioError):
                piece = self._dropped(segment, 0, "broken", reason_of(found, self.name))
            else:
                piece = self._piece(segment, found)
            if several and piece.reason:
                piece = piece._replace(reason=f"from {self._start(segment):g} s: {piece.reason}")
            yield piece

    def _segments(self) -> Iterator[tuple[int, np.ndarray | AudioError]]:
        """Number and samples of each segment; in a damaged span each segment is read on its own."""
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
        # The first segment of a recording counts even if it is empty.
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

    def _dropped(self, segment: int, samples: int, kind: str, reason: str = "") -> Piece:
        return Piece(self.task.recording, segment, self.path, samples, kind, reason)

    def _piece(self, segment: int, waveform: np.ndarray) -> Piece:
        options, length = self.options, len(waveform)
        if length < options.min_samples:
            # Only a recording that is too short as a whole is worth a line in the list of rejections.
            if segment:
                return self._dropped(segment, length, REMAINDER)
            seconds = length / options.sampling_rate
            reason = f"is too short: {seconds:.2f} s, at least {options.min_seconds:g} s are needed."
            return self._dropped(segment, length, "too short", reason)
        samples, clipped = to_int16(waveform)
        # What a reader of the clip will hear: quiet sound may be silence after rounding to 16 bit.
        kept = samples / np.float32(32768)
        try:
            check_usable(kept)
        except AudioError as error:
            return self._dropped(segment, length, "silent", str(error))
        digest = content_digest(samples)
        metadata = json.dumps(self._metadata(segment, length, digest))
        sums = band_sums(kept, options).to_bytes()
        return self._dropped(segment, length, CLIP)._replace(
            audio=encoded(samples, options), metadata=metadata, digest=digest, clipped=clipped, band_sums=sums
        )

    def _metadata(self, segment: int, samples: int, digest: bytes) -> dict[str, Any]:
        """Metadata of a clip; path and start are those of the original if the source was cut from recordings itself."""
        known = json_ready(self.source.metadata(self.task.recording))
        path, start, original = (known.get(key) for key in ("path", "start", "original_sampling_rate"))
        rate = self.options.sampling_rate
        return {
            **known,
            "path": printable(path) if isinstance(path, str) and path else self.path,
            "start": (start if _is_number(start) else 0.0) + self._start(segment),
            "duration": samples / rate,
            "sampling_rate": rate,
            "original_sampling_rate": original if _is_number(original) else self.decoder.rate,
            "content_hash": digest.hex(),
        }


def json_ready(values: dict[str, Any]) -> dict[str, Any]:
    """Entries that JSON can hold, as they are read back from it; NaN and infinity are not among them."""
    ready = {}
    for name, value in values.items():
        with suppress(TypeError, ValueError, RecursionError):
            ready[str(name)] = json.loads(json.dumps(value, allow_nan=False))
    return ready


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def to_int16(waveform: np.ndarray) -> tuple[np.ndarray, bool]:
    """Round a waveform to 16 bit; 16-bit PCM is restored exactly.

    Args:
        waveform: [samples], float or int16.

    Returns:
        int16 [samples], full scale 32768, and whether samples beyond full scale were limited.
    """
    # Samples far beyond full scale would leave the range of float32.
    scaled = np.rint(np.clip(to_float32(waveform), -2, 2) * np.float32(32768))
    clipped = bool(scaled.max() > 32768 or scaled.min() < -32768)
    return np.clip(scaled, -32768, 32767).astype(np.int16), clipped


def content_digest(samples: np.ndarray) -> bytes:
    """BLAKE2b over int16 samples as little-endian bytes: 16 bytes."""
    return hashlib.blake2b(samples.astype("<i2", copy=False).tobytes(), digest_size=DIGEST_BYTES).digest()


def encoded(samples: np.ndarray, options: Options) -> bytes:
    """Audio file with int16 [samples]."""
    file = io.BytesIO()
    soundfile.write(file, samples, options.sampling_rate, format=FORMATS[options.format], subtype="PCM_16")
    return file.getvalue()


@lru_cache(maxsize=4)
def _log_mel(options: Options) -> LogMel:
    return LogMel(options.front_end())


@torch.inference_mode()
def band_sums(waveform: np.ndarray, options: Options) -> BandSums:
    """Sums over the log-mel spectrogram of float32 [samples], computed in pieces of five minutes."""
    log_mel = _log_mel(options)
    sums = BandSums(log_mel.config.num_mel_bands)
    for part in torch.from_numpy(waveform).split(round(SPAN_SECONDS * options.sampling_rate)):
        sums.add(*log_mel(part[None]))
    return sums
