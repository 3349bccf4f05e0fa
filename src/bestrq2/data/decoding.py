"""Decoders: one mono view of any audio, whatever reads it. libsndfile first, FFmpeg (PyAV) where that cannot.

MP3 goes to FFmpeg too: libsndfile's decoder guesses the length of files without a header for it, and writes notes to
stderr when it seeks in sound ones.

Each decodes only the asked-for span and averages channels as it goes, so a long or many-channelled file costs no more
memory than the span. Positions and counts are in frames (samples per channel) at the file's own rate.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import soundfile

from bestrq2.data.completeness import declared_bytes, is_mpeg_audio
from bestrq2.errors import AudioError

BLOCK_FRAMES = 1 << 18
# Decoded and thrown away before the wanted position, so that codecs with memory (MP3, AAC, Opus) have settled.
PREROLL_SECONDS = 0.5
# libsndfile's log of headers that promise more than the file holds; the sizes of 2 GB and more are those that writers
# into a pipe leave behind (0x7FFFF000, 0x80000000, 0xFFFFFFFF).
PROMISE = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
PIPED_BYTES = 0x7FFF0000
# FFmpeg formats whose headers or timestamps state the duration; of others it only has an estimate from the bit rate.
TIMED_FORMATS = {"mov", "matroska", "ogg", "asf", "avi", "flv", "mpegts", "wav", "aiff", "caf", "w64", "au"}
FULL_SCALE = {"int8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}


class UnreadableAudioError(AudioError):
    """No part of this audio can be used, whatever crop is asked for."""


class Decoder(Protocol):
    """Mono audio that can be read from any position.

    Attributes:
        rate: Hz.
        channels: channels of the original.
        frames: length in samples per channel; None where only `measure` would tell.
    """

    rate: int
    channels: int
    frames: int | None

    def measure(self) -> int:
        """Length in samples per channel, found by going through the file where its header does not say."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""

    def close(self) -> None:
        """Release the file."""


def to_float32(samples: np.ndarray) -> np.ndarray:
    """Samples of any common format as float32: integers scaled to [-1, 1), uint8 centred on 128 as in WAV files.

    Raises:
        UnreadableAudioError: a dtype without a defined full scale.
    """
    name = samples.dtype.name
    if name == "uint8":
        return (samples.astype(np.float32) - 128.0) / 128.0
    if name in FULL_SCALE:
        return (samples * (1.0 / FULL_SCALE[name])).astype(np.float32)
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    raise UnreadableAudioError(
        f"samples of type {name} have no defined full scale; give floats in [-1, 1], or int8, int16, int32 or uint8."
    )


def mixed_down(samples: np.ndarray) -> np.ndarray:
    """Mean over channels of [samples] or [channels, samples], as float32 [samples]; integers as in `to_float32`."""
    samples = to_float32(samples)
    if samples.ndim == 2:
        return samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
    return samples


def open_decoder(path: Path) -> Decoder:
    """Decoder for a file; the caller closes it.

    Raises:
        UnreadableAudioError: missing, empty, truncated, not a regular file, or not audio.
    """
    size = _regular_size(path)
    try:
        declared = declared_bytes(path)
    except OSError as error:
        raise UnreadableAudioError(f"{path}: cannot be opened ({error.strerror}).") from error
    if declared is not None and declared > size:
        raise _truncated(path, f"its headers promise {declared:,} bytes, {size:,} are there")
    # libsndfile's MPEG decoder writes to the terminal when it meets what is not MPEG.
    if is_mpeg_audio(path) or path.suffix.lower() in (".mp3", ".mp2"):
        return AvDecoder(path, verified=declared is not None)
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, TypeError, ValueError):
        return AvDecoder(path, verified=declared is not None)
    # A stream written into a pipe has no length for libsndfile.
    if file.format == "MP3" or (size > 1024 and not 0 < file.frames < 1 << 62):
        file.close()
        return AvDecoder(path, verified=declared is not None)
    return SoundFileDecoder(path, file)


def _regular_size(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UnreadableAudioError(f"{path}: the file does not exist.") from None
    except (OSError, ValueError) as error:
        raise UnreadableAudioError(f"{path}: cannot be opened ({error}).") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UnreadableAudioError(f"{path}: is {kind}, expected an audio file.")
    if status.st_size == 0:
        raise UnreadableAudioError(f"{path}: the file is empty (0 bytes).")
    return status.st_size


def _truncated(path: Path, detail: str) -> UnreadableAudioError:
    return UnreadableAudioError(f"{path}: the file is truncated: {detail}; copy or download it again.")


class SoundFileDecoder:
    """What libsndfile reads: WAV, FLAC, Ogg, Opus, AIFF, AU, CAF and others, with exact seeking."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self.file = file
        self.rate = int(file.samplerate)
        self.channels = int(file.channels)
        self.frames: int | None = int(file.frames)
        try:
            self._check()
        except UnreadableAudioError:
            file.close()
            raise

    def _check(self) -> None:
        if self.rate <= 0:
            raise UnreadableAudioError(f"{self.path}: declares a sampling rate of {self.rate} Hz.")
        if not self.frames:
            raise UnreadableAudioError(f"{self.path}: holds no samples.")
        log = self.file.extra_info
        for promised, present in ((int(p), int(f)) for p, f in PROMISE.findall(log)):
            if present + 64 < promised < PIPED_BYTES:
                raise _truncated(self.path, f"its headers promise {promised:,} bytes, {present:,} are there")
        if "truncated file" in log:
            raise _truncated(self.path, "its headers promise more than is there")
        if self.file.format == "FLAC":
            self._check_end()

    def _check_end(self) -> None:
        try:
            self.file.seek(self.measure() - 1)
            found = len(self.file.read(1, dtype="float32"))
            self.file.seek(0)
        except soundfile.SoundFileError:
            found = 0
        if not found:
            raise _truncated(self.path, f"its header promises {self.frames:,} samples, the last of them are missing")

    def measure(self) -> int:
        """Length in samples per channel."""
        assert self.frames is not None
        return self.frames

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are.

        Raises:
            AudioError: the span cannot be decoded or is not there.
        """
        end = self.measure() if count is None else min(self.measure(), start + count)
        blocks = [np.zeros(0, np.float32)]
        position = start
        try:
            if position < end:
                self.file.seek(position)
            while position < end:
                block = self.file.read(min(BLOCK_FRAMES, end - position), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block[:, 0] if self.channels == 1 else block.mean(axis=1, dtype=np.float32))
                position += len(block)
        except soundfile.SoundFileError as error:
            raise AudioError(f"{self.path}: damaged at about {position / self.rate:.1f} s.") from error
        if position < end:
            promised = f"its header promises {self.frames:,} samples"
            raise _truncated(self.path, f"{promised}, {position:,} could be decoded")
        return np.concatenate(blocks)

    def close(self) -> None:
        """Release the file."""
        self.file.close()


class AvDecoder:
    """What FFmpeg reads and libsndfile does not: MP3, M4A/AAC, WebM, the sound of videos, and others.

    Positions are exact to the container's time stamps (1 ms in Matroska and WebM, one sample in MP4).

    Args:
        path: the file.
        verified: its bytes are known to be all there, so that an early end is no truncation but an inexact header.
    """

    def __init__(self, path: Path, verified: bool) -> None:
        self.path = path
        self.verified = verified
        self.container = self._open()
        self.fresh = True
        stream = self._stream()
        context = stream.codec_context
        self.rate = int(stream.rate or 0) if context is not None else 0
        self.channels = int(stream.channels or 0) if context is not None else 0
        if self.rate <= 0 or self.channels <= 0:
            self.close()
            raise UnreadableAudioError(f"{path}: its audio track has no readable codec, rate or channels.")
        self.format = self.container.format.name.split(",")[0]
        self.frames = self._declared_frames(stream)

    def _open(self) -> Any:
        try:
            # Only this file: a playlist in disguise must not make FFmpeg fetch what it names.
            return av.open(f"file:{self.path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise UnreadableAudioError(f"{self.path}: is not audio that libsndfile or FFmpeg can read.") from error

    def _stream(self) -> Any:
        if not self.container.streams.audio:
            self.close()
            raise UnreadableAudioError(f"{self.path}: holds no audio track.")
        return self.container.streams.audio[0]

    def _declared_frames(self, stream: Any) -> int | None:
        if self.format not in TIMED_FORMATS and not (self.format == "mp3" and self.verified):
            return None
        if stream.duration:
            return round(stream.duration * stream.time_base * self.rate)
        own = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        if own:
            return round((int(own[1]) * 3600 + int(own[2]) * 60 + Fraction(own[3])) * self.rate)
        return round(Fraction(self.container.duration, 1_000_000) * self.rate) if self.container.duration else None

    def _rewound(self) -> Any:
        """The stream at its beginning, with a new decoder."""
        if not self.fresh:
            self.container.close()
            self.container = self._open()
        self.fresh = False
        return self._stream()

    def measure(self) -> int:
        """Length in samples per channel; packets are counted, not decoded, where the header does not say.

        Raises:
            UnreadableAudioError: no audio packets, or the last one is incomplete.
        """
        if self.frames is None:
            stream = self._rewound()
            origin, end, last = stream.start_time or 0, 0, b""
            try:
                for packet in self.container.demux(stream):
                    if packet.pts is not None:
                        end = max(end, packet.pts - origin + (packet.duration or 0))
                        last = bytes(packet)
            except av.error.FFmpegError as error:
                raise UnreadableAudioError(f"{self.path}: its packets cannot be read.") from error
            if self.format == "aac" and len(last) > 5:
                promised = (last[3] & 3) << 11 | last[4] << 3 | last[5] >> 5
                if promised > len(last):
                    raise _truncated(self.path, f"its last packet promises {promised} bytes, {len(last)} are there")
            self.frames = round(end * stream.time_base * self.rate)
        if self.frames <= 0:
            raise UnreadableAudioError(f"{self.path}: holds no samples.")
        return self.frames

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are.

        Raises:
            AudioError: the span cannot be decoded or is not there.
        """
        total = self.measure()
        end = total if count is None else min(total, start + count)
        pieces = self._pieces(start, end, seek=start > PREROLL_SECONDS * self.rate)
        if pieces is None:
            pieces = self._pieces(start, end, seek=False)
        samples = np.concatenate([np.zeros(0, np.float32), *(pieces or [])])
        missing = end - start - len(samples)
        if missing > 0:
            if not self.verified and missing > max(self.rate // 4, total // 100):
                raise _truncated(self.path, f"its header promises {total:,} samples, {total - missing:,} are there")
            self.frames = start + len(samples)
        return samples

    def _pieces(self, start: int, end: int, seek: bool) -> list[np.ndarray] | None:
        """The span in decoder frames; None if seeking overshot the start."""
        pieces: list[np.ndarray] = []
        for position, samples in self._decoded(start, seek):
            if not pieces and position > start and seek:
                return None
            first = max(0, start - position)
            if first < len(samples):
                pieces.append(samples[first : end - position])
            if position + len(samples) >= end:
                break
        return pieces

    def _decoded(self, start: int, seek: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Positions and mono samples of successive decoder frames, from the beginning or shortly before `start`."""
        stream = self._rewound()
        origin = stream.start_time or 0
        position = None if seek else 0
        try:
            if seek:
                wanted = Fraction(start, self.rate) - Fraction(PREROLL_SECONDS)
                self.container.seek(int(wanted / stream.time_base) + origin, stream=stream)
            for packet in self.container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    if seek and (position is None or position < start):
                        continue
                    raise
                for frame in frames:
                    if position is None:
                        position = round((frame.pts - origin) * frame.time_base * self.rate) if frame.pts else start + 1
                    samples = self._mono(frame)
                    yield position, samples
                    position += len(samples)
        except av.error.FFmpegError as error:
            raise AudioError(f"{self.path}: damaged at about {(position or start) / self.rate:.1f} s.") from error

    def _mono(self, frame: Any) -> np.ndarray:
        if frame.sample_rate != self.rate:
            raise AudioError(f"{self.path}: changes its sampling rate from {self.rate} to {frame.sample_rate} Hz.")
        samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, frame.layout.nb_channels).T
        return mixed_down(samples)

    def close(self) -> None:
        """Release the file."""
        self.container.close()


class ArrayDecoder:
    """A waveform in memory, seen as a decoder.

    Args:
        waveform: [samples] or [channels, samples], float or integer.
        rate: Hz.
    """

    def __init__(self, waveform: np.ndarray, rate: int) -> None:
        self.waveform = waveform
        self.rate = rate
        self.channels = 1 if waveform.ndim == 1 else len(waveform)
        self.frames: int | None = waveform.shape[-1]

    def measure(self) -> int:
        """Length in samples per channel."""
        return int(self.waveform.shape[-1])

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""
        end = None if count is None else start + count
        return mixed_down(self.waveform[..., start:end])

    def close(self) -> None:
        """Nothing to release."""
