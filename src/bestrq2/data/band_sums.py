"""Mean and standard deviation per mel band, from sums that can be merged."""

from __future__ import annotations

import torch
from torch import Tensor

# In dB: normalisation would otherwise turn a band that never changes into noise.
_SMALLEST_DEVIATION = 1.0


class BandSums:
    """Number of frames, sums and sums of squares per mel band over any number of log-mel spectrograms.

    Args:
        bands: number of mel bands.

    Attributes:
        count: float64 [], number of frames.
        total: float64 [bands], sum over frames, dB.
        squares: float64 [bands], sum of squares over frames, dB².
    """

    def __init__(self, bands: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(bands, dtype=torch.float64)
        self.squares = torch.zeros(bands, dtype=torch.float64)

    @torch.no_grad()
    def add(self, log_mel: Tensor, frames: Tensor) -> None:
        """Add the valid frames of some clips.

        Args:
            log_mel: float [B, bands, T], dB.
            frames: int [B], number of valid frames of each clip.
        """
        inside = torch.arange(log_mel.shape[-1]) < frames[:, None]
        values = log_mel.double().transpose(1, 2)[inside]
        self.count += len(values)
        self.total += values.sum(dim=0)
        self.squares += values.square().sum(dim=0)

    def merge(self, other: BandSums) -> None:
        """Add the sums of another one."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in dB, float32 [bands] each; the deviation is at least 1 dB."""
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp_min(0.0).sqrt()
        return mean.float(), deviation.clamp_min(_SMALLEST_DEVIATION).float()

    def to_bytes(self) -> bytes:
        """The sums as little-endian float64: count, totals, squares."""
        return torch.cat([self.count[None], self.total, self.squares]).numpy().astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> BandSums:
        """The sums written by `to_bytes`."""
        values = torch.frombuffer(bytearray(content), dtype=torch.float64)
        sums = cls(len(values) // 2)
        sums.count, (sums.total, sums.squares) = values[0], values[1:].split(len(values) // 2)
        return sums
