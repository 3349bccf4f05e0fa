"""Decoding by FFmpeg, through PyAV."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from bestrq2.data.decoder import AudioBytes, AudioPlace, UnreadableAudioError, mixed_down, truncated
from bestrq2.errors import AudioError

# Decoded and thrown away before the wanted position, so that codecs with memory (MP3, AAC, Opus) have settled.
PREROLL_SECONDS = 0.5
# FFmpeg formats whose headers or timestamps state the duration; of others it only has an estimate from the bit rate.
TIMED_FORMATS = {"mov", "matroska", "ogg", "asf", "avi", "flv", "mpegts", "wav", "aiff", "caf", "w64", "au"}


class AvDecoder:
    """What FFmpeg reads and libsndfile does not: MP3, M4A/AAC, WebM, the sound of videos, and others.

    Positions are exact to the container's time stamps (1 ms in Matroska and WebM, one sample in MP4).

    Args:
        audio: the file, on disk or in memory.
        verified: its bytes are known to be all there, so that an early end is no truncation but an inexact header.
    """

    def __init__(self, audio: AudioPlace, verified: bool) -> None:
        self.audio = audio
        self.verified = verified
        self.container = self._open()
        self.fresh = True
        stream = self._stream()
        context = stream.codec_context
        self.rate = int(stream.rate or 0) if context is not None else 0
        self.channels = int(stream.channels or 0) if context is not None else 0
        if self.rate <= 0 or self.channels <= 0:
            self.close()
            raise UnreadableAudioError(f"{audio}: its audio track has no readable codec, rate or channels.")
        self.format = self.container.format.name.split(",")[0]
        self.frames = self._declared_frames(stream)

    def _open(self) -> Any:
        # Only this file: a playlist in disguise must not make FFmpeg fetch what it names.
        if isinstance(self.audio, AudioBytes):
            place: Any = self.audio.open()
            protocol = "none"
        else:
            place, protocol = f"file:{self.audio}", "file"
        try:
            return av.open(place, options={"protocol_whitelist": protocol}, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise UnreadableAudioError(f"{self.audio}: is not audio that libsndfile or FFmpeg can read.") from error

    def _stream(self) -> Any:
        if not self.container.streams.audio:
            self.close()
            raise UnreadableAudioError(f"{self.audio}: holds no audio track.")
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
                raise UnreadableAudioError(f"{self.audio}: its packets cannot be read.") from error
            if self.format == "aac" and len(last) > 5:
                promised = (last[3] & 3) << 11 | last[4] << 3 | last[5] >> 5
                if promised > len(last):
                    raise truncated(self.audio, f"its last packet promises {promised} bytes, {len(last)} are there")
            self.frames = round(end * stream.time_base * self.rate)
        if self.frames <= 0:
            raise UnreadableAudioError(f"{self.audio}: holds no samples.")
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
                raise truncated(self.audio, f"its header promises {total:,} samples, {total - missing:,} are there")
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
            raise AudioError(f"{self.audio}: damaged at about {(position or start) / self.rate:.1f} s.") from error

    def _mono(self, frame: Any) -> np.ndarray:
        if frame.sample_rate != self.rate:
            raise AudioError(f"{self.audio}: changes its sampling rate from {self.rate} to {frame.sample_rate} Hz.")
        samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, frame.layout.nb_channels).T
        return mixed_down(samples)

    def close(self) -> None:
        """Release the file."""
        self.container.close()
