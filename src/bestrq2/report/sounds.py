"""Playable cuts of recordings inside a page: MP3 as data URIs, with an outline of the loudness."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SECONDS, HIGHEST_RATE, OUTLINE_POINTS = 4.0, 16_000, 120
# Audio of all the cuts of a page: about 6 MB, whatever the number of clips.
PAGE_SECONDS = 1200.0
MP3_RATES = (8_000, 11_025, 12_000, HIGHEST_RATE)


@dataclass(frozen=True)
class Sound:
    """Playable cut of a clip.

    Attributes:
        name: unique on the page.
        uri: data URI of an audio file; "" where the page holds the sound of this name already.
        start, seconds: place and length of the cut in the clip.
        outline: SVG path of its loudness.
    """

    name: str
    uri: str
    start: float
    seconds: float
    outline: str


def playable(
    waveform: NDArray[np.int16], rate: int, name: str, again: bool = False, longest: float = SECONDS
) -> Sound | None:
    """The loudest seconds of a recording; None where it has no samples.

    Args:
        waveform: [S] at `rate` Hz.
        rate: sampling rate in Hz.
        name: unique name on the page.
        again: whether the page holds the sound of this name already.
        longest: longest cut in seconds.
    """
    samples, rate = _at_most_16_khz(np.asarray(waveform, dtype=np.int16).reshape(-1), rate)
    if not samples.size:
        return None
    length = max(1, int(longest * rate))
    start = loudest_start(samples, rate, length)
    cut = samples[start : start + length]
    return Sound(name, "" if again else mp3_uri(cut, rate), start / rate, len(cut) / rate, _outline(cut))


def int16(waveform: np.ndarray) -> NDArray[np.int16]:
    """16-bit samples of a waveform with full scale 1."""
    return (32767 * np.clip(waveform, -1, 1)).astype(np.int16)


def cut_seconds(clips: int) -> float:
    """Longest cut of each of so many clips on a page, in seconds."""
    return round(min(SECONDS, PAGE_SECONDS / max(1, clips)), 1)


def loudest_start(samples: NDArray[np.int16], rate: int, length: int) -> int:
    """First of the loudest `length` samples of `samples` [S], on a grid of a quarter of a second."""
    if len(samples) <= length:
        return 0
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    starts = np.arange(0, len(samples) - length + 1, max(rate // 4, 1))
    return int(starts[np.argmax(energy[starts + length] - energy[starts])])


def mp3_uri(samples: NDArray[np.int16], rate: int) -> str:
    """A mono MP3 of about 28 kbit/s of `samples` [S] at `rate` Hz as a data URI; every browser plays it.

    Where libsndfile was built without MP3 it is FLAC, five times as large.
    """
    import soundfile

    buffer = io.BytesIO()
    kind = "mpeg" if "MP3" in soundfile.available_formats() else "flac"
    if kind == "mpeg":
        soundfile.write(buffer, samples, rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.8)
    else:
        soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _at_most_16_khz(samples: NDArray[np.int16], rate: int) -> tuple[NDArray[np.int16], int]:
    if rate in MP3_RATES:
        return samples, rate
    import soxr

    return np.asarray(soxr.resample(samples, rate, HIGHEST_RATE), dtype=np.int16), HIGHEST_RATE


def _outline(samples: NDArray[np.int16]) -> str:
    """SVG path of the loudness in a box of OUTLINE_POINTS × 100, peaks scaled to fill it."""
    groups = np.array_split(np.abs(samples.astype(np.float64)), min(OUTLINE_POINTS, len(samples)))
    peaks = np.array([group.max() for group in groups])
    heights = np.maximum(46 * peaks / max(float(peaks.max()), 1.0), 1.0)
    width = OUTLINE_POINTS / len(heights)
    return "".join(f"M{(i + 0.5) * width:.1f} {50 - h:.0f}v{2 * h:.0f}" for i, h in enumerate(heights))
