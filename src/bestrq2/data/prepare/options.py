"""What decides the content of a prepared corpus, besides its source."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bestrq2.errors import ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config

FORMATS = {"wav": "WAV", "flac": "FLAC"}
"""Formats of clips, with libsndfile's names for them."""

FRONT_END = ("sampling_rate", "n_fft", "win_length", "hop_length", "num_mel_bands", "mel_min_hz", "mel_max_hz")
"""Fields of `BestRQ2Config` that decide what a mel band is."""

# A task of a worker is at most that long, so that hours of audio are never in memory at once.
SPAN_SECONDS = 600.0


@dataclass(frozen=True)
class Options:
    """Settings of a prepared corpus.

    Attributes:
        sampling_rate: Hz of the clips.
        format: "wav" or "flac", both 16-bit PCM.
        segment_seconds: longer recordings are cut into clips of that length; None keeps them whole.
        min_seconds: shortest clip.
        shard_size: MB (10^6 bytes) at which a tar is full.

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
        """Samples of a clip cut from a longer recording; None where recordings stay whole."""
        return None if self.segment_seconds is None else max(1, round(self.segment_seconds * self.sampling_rate))

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip."""
        return max(1, round(self.min_seconds * self.sampling_rate))

    @property
    def segments_per_span(self) -> int:
        """Clips that one task cuts: those of ten minutes, or one."""
        if self.segment_samples is None:
            return 1
        return max(1, round(SPAN_SECONDS * self.sampling_rate) // self.segment_samples)

    @property
    def num_mel_bands(self) -> int:
        """Mel bands of the spectrogram whose statistics are taken."""
        return self.front_end().num_mel_bands

    def front_end(self) -> BestRQ2Config:
        """The default log-mel spectrogram at this sampling rate."""
        highest = min(8000.0, self.sampling_rate / 2)
        seconds = 60_000 / self.sampling_rate  # more than one patch, whatever the rate
        return BestRQ2Config(sampling_rate=self.sampling_rate, mel_max_hz=highest, max_seconds=max(10.0, seconds))

    def as_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return asdict(self)
