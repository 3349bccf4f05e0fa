"""Audio made on the fly, with content by which position, pitch and level can be recognised."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from scipy.signal import butter, sosfiltfilt

CASES = Path(os.environ.get("BESTRQ2_CASES", Path(__file__).parents[3] / "shared" / "cases"))
"""Folder of odd files, with what the FFmpeg program decodes of them in audio/expected.json; need not exist."""


def tone(seconds: float, rate: int, hz: float = 440.0, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds: float, rate: int, seed: int = 0, highest_hz: float = 3000.0) -> np.ndarray:
    """Low-passed noise: every moment is unlike every other, so a crop has one place where it fits."""
    white = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    return (0.1 * sosfiltfilt(butter(8, highest_hz, fs=rate, output="sos"), white)).astype(np.float32)


def write_with_ffmpeg(
    path: Path, waveform: np.ndarray, rate: int, codec: str, options: dict | None = None, format: str | None = None
) -> Path:
    """Encode [samples] or [channels, samples] by PyAV; the suffix decides the container if `format` does not."""
    waveform = np.atleast_2d(waveform)
    layout = {1: "mono", 2: "stereo"}[len(waveform)]
    names = {".opus": "ogg", ".aac": "adts"}
    with av.open(str(path), "w", format=format or names.get(path.suffix), options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        for start in range(0, waveform.shape[1], 1024):
            piece = np.ascontiguousarray(waveform[:, start : start + 1024], np.float32)
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "u8.wav": ("WAV", "PCM_U8"),
    "s24.wav": ("WAV", "PCM_24"),
    "float.wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "ULAW"),
    "caf": ("CAF", "ALAC_16"),
}
CODECS = {
    "opus": "libopus",
    "m4a": "aac",
    "mp4": "aac",
    "aac": "aac",
    "webm": "libopus",
    "mkv": "flac",
    "lame.mp3": "libmp3lame",
}
RATES = {"webm": 48_000, "opus": 48_000}


def write(path: Path, waveform: np.ndarray, rate: int) -> Path:
    """Write [samples] or [channels, samples] in the format that the name ends in."""
    kind = path.name.partition(".")[2]
    if kind in CODECS:
        return write_with_ffmpeg(path, waveform, rate, CODECS[kind])
    container, subtype = FORMATS[kind]
    soundfile.write(path, waveform.T, rate, format=container, subtype=subtype)
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    """The first part of a file's bytes."""
    target = path.with_name(f"cut-{path.name}")
    content = path.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def announce(path: Path, samples: int) -> Path:
    """Make the header of a mono 16-bit WAV promise another number of samples."""
    content = bytearray(path.read_bytes())
    content[4:8] = (36 + 2 * samples).to_bytes(4, "little")
    content[40:44] = (2 * samples).to_bytes(4, "little")
    path.write_bytes(content)
    return path


def lag(found: np.ndarray, whole: np.ndarray, expected_at: int, reach: int = 3000) -> int:
    """By how many samples a crop begins later in `whole` than expected."""
    first = max(0, expected_at - reach)
    window = whole[first : expected_at + len(found) + reach]
    spectrum = np.fft.rfft(window) * np.conj(np.fft.rfft(found, len(window)))
    correlation = np.fft.irfft(spectrum, len(window))
    return first + int(np.argmax(correlation[: len(window) - len(found) + 1])) - expected_at
