"""Decoders: files, bytes and arrays as mono audio that can be read from any position.

`open_decoder` is the one place that distinguishes formats: libsndfile reads what it seeks exactly, FFmpeg the rest.

Decoders read only the requested span and average channels as they go, so a long file or one of many channels
takes no more memory than the span. Positions and counts are in samples per channel at the file's own rate. A span
equals that span of the whole file, sample for sample, and the whole file is all that can be decoded of it: a file that
ends before its header promised is used as far as it goes, and `shortfall` tells.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bestrq2.data.ffmpeg import FFmpegDecoder, id3_size, is_mpeg_audio
from bestrq2.data.libsndfile import SoundFileDecoder, open_soundfile
from bestrq2.data.places import AudioPlace, UnreadableAudioError, bytes_at, place_size
from bestrq2.data.waveforms import mixed_down


class Decoder(Protocol):
    """Mono audio that can be read from any position.

    Attributes:
        rate: sampling rate in Hz.
        frames: length in samples per channel; None where only `measure` finds it.
    """

    rate: int
    frames: int | None

    def measure(self) -> int:
        """Length in samples per channel, found by going through the file where its header does not state it."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""


def open_decoder(audio: AudioPlace) -> SoundFileDecoder | FFmpegDecoder:
    """Open a file, on disk or in memory; the caller closes the decoder.

    Raises:
        UnreadableAudioError: missing, empty, not a regular file, not audio, without samples, an impossible rate.
        AudioError: it cannot be opened now, for instance because too many files are open.
    """
    size = place_size(audio)
    if size == 0:
        raise UnreadableAudioError(f"{audio}: the file is empty (0 bytes).")
    tag = id3_size(audio)
    # libsndfile tries its MPEG decoder, which writes to the terminal, on whatever is called .mp3.
    if not (is_mpeg_audio(bytes_at(audio, tag, 2)) or str(audio).lower().endswith(".mp3")):
        file = open_soundfile(audio, size, tag)
        if file is not None:
            return SoundFileDecoder(audio, file)
    return FFmpegDecoder(audio)


class ArrayDecoder:
    """A waveform in memory as a decoder.

    Args:
        waveform: [samples] or [channels, samples], float or integer.
        rate: sampling rate in Hz.
    """

    def __init__(self, waveform: np.ndarray, rate: int) -> None:
        self.waveform = waveform
        self.rate = rate
        self.frames: int | None = waveform.shape[-1]

    def measure(self) -> int:
        """Length in samples per channel."""
        return int(self.waveform.shape[-1])

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""
        end = None if count is None else start + count
        return mixed_down(self.waveform[..., start:end])
