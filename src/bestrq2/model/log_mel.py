"""Log-mel spectrogram in dB, computed for each clip as if it were alone, and input statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .configuration_bestrq2 import BestRQ2Config
from .kernels import cached, to_device, traced

POWER_FLOOR = 1e-10
# Typical statistics of recordings in dB, used until `set_statistics` provides measured ones.
DEFAULT_MEAN, DEFAULT_DEVIATION = -20.0, 20.0


@cached
def _window(win_length: int, device: torch.device) -> Tensor:
    return torch.hann_window(win_length, dtype=torch.float32, device="cpu").to(device)


@cached
def mel_filters(n_fft: int, bands: int, low: float, high: float, sampling_rate: int, device: torch.device) -> Tensor:
    """Triangular mel filters on the HTK scale without area normalization, float32 [n_fft/2+1, bands].

    Computed in float32 as in the reference: filters computed in float64 (as in `transformers.audio_utils`) differ by
    1e-5, which moves quiet bands by more than 1e-3 dB.
    """
    lowest, highest = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (low, high))
    mels = torch.linspace(lowest, highest, bands + 2, dtype=torch.float32, device="cpu")
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    bins = torch.linspace(0.0, sampling_rate // 2, n_fft // 2 + 1, dtype=torch.float32, device="cpu")
    widths = corners.diff()
    distances = corners[None] - bins[:, None]
    rising, falling = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
    return torch.minimum(rising, falling).clamp_min(0.0).to(device)


def reflect_index(positions: Tensor, length: Tensor | int) -> Tensor:
    """Reflect positions outside of a clip of `length` samples into it.

    The end samples are not repeated; a clip shorter than the padding is reflected repeatedly.
    """
    period = torch.clamp(torch.as_tensor(2 * (length - 1), device=positions.device), min=1)
    folded = positions.remainder(period)
    return torch.minimum(folded, period - folded)


class Decibels(nn.Module):
    """Conversion of a power spectrum to mel bands in dB, 10 log10(max(power, 1e-10))."""

    def forward(self, power: Tensor, filters: Tensor) -> Tensor:
        """Map float32 [B, bins, T] and filters [bins, bands] to [B, bands, T]."""
        mel = power.transpose(1, 2) @ filters
        return mel.clamp_min(POWER_FLOOR).log10().mul(10.0).transpose(1, 2)


class LogMel(nn.Module):
    """Log-mel spectrogram of the paper (section 3): Hann window, reflect padding, power, HTK bands, dB.

    It has no parameters or buffers, so it adds nothing to a checkpoint, and always runs in float32.
    """

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.config = config
        self.decibels = Decibels()
        # One whole patch: shorter clips are continued by reflection until they fill it.
        self.min_samples = (config.patch_size[1] - 1) * config.hop_length

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the spectrogram.

        Args:
            waveform: float [B, S], samples in [-1, 1].
            lengths: int [B], samples of every clip; None if all have S. Samples after the end are never read.

        Returns:
            log_mel: float32 [B, bands, T] in dB, 10 log10(max(power, 1e-10)).
            frames: int64 [B], number of frames inside each clip (on the device of `lengths`).
        """
        device = waveform.device
        with torch.autocast(device.type, enabled=False):
            padded, frames = self._pad(waveform.float(), lengths)
            if device.type == "cpu" and not torch.compiler.is_compiling():
                # A few clips at a time fit the CPU caches: twice as fast as the whole batch at once.
                chunks = padded.split(max(1, torch.get_num_threads()))
                return torch.cat([self._decibels(chunk) for chunk in chunks]), frames
            return self._decibels(padded), frames

    def packed(self, rows: Tensor, frames: Tensor) -> Tensor:
        """Compute the spectrograms of packed rows, in which every clip has been reflected at its ends already.

        Args:
            rows: float [R, S], samples in [-1, 1].
            frames: int64 [R, C], first frame of each patch column; frame t begins at sample t * hop_length.

        Returns:
            float32 [R, bands, C * patch width] in dB.

        Raises:
            ValueError: for frames that the rows do not have.
        """
        device, width = rows.device, self.config.patch_size[1]
        available = 1 + (rows.shape[1] - self.config.n_fft) // self.config.hop_length
        if frames.device.type == "cpu" and not traced() and (last := int(frames.max()) + width) > available:
            raise ValueError(f"the packing reads {last} frames of rows that have {available}")
        index = (frames[..., None] + torch.arange(width, device=frames.device)).flatten(1)
        index = to_device(index, device)[:, None].expand(-1, self.config.num_mel_bands, -1)
        with torch.autocast(device.type, enabled=False):
            if device.type == "cpu" and not torch.compiler.is_compiling():
                size = max(1, torch.get_num_threads())  # as in `forward`
                parts = zip(rows.float().split(size), index.split(size), strict=True)
                return torch.cat([self._decibels(part).gather(2, places) for part, places in parts])
            return self._decibels(rows.float()).gather(2, index)

    def _decibels(self, padded: Tensor) -> Tensor:
        """Map padded waveforms [B, S + n_fft] to [B, bands, T] in dB."""
        config, device = self.config, padded.device
        window = _window(config.win_length, device)
        spectrum = torch.stft(
            padded,
            n_fft=config.n_fft,
            hop_length=config.hop_length,
            win_length=config.win_length,
            window=window,
            center=False,
            return_complex=True,
        )
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        filters = mel_filters(
            config.n_fft, config.num_mel_bands, config.mel_min_hz, config.mel_max_hz, config.sampling_rate, device
        )
        # Scaling the window instead would round the quietest bands differently from the reference.
        return self.decibels(power, filters / window.square().sum())

    def _pad(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reflect every clip at its own ends; return [B, S + n_fft] and the number of frames of each clip."""
        batch, samples = waveform.shape
        reach = self.config.n_fft // 2
        if samples == 0:
            raise ValueError("a waveform of 0 samples has no spectrogram")
        full, shortest = lengths is None, 0
        if lengths is None:
            lengths, shortest = torch.full((batch,), samples, dtype=torch.int64), samples
        elif lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            # On other devices, finding the shortest clip would cost a synchronization.
            shortest = int(lengths.min())
        lengths = lengths.to(torch.int64)
        if shortest >= max(self.min_samples, reach + 1):
            padded = nn.functional.pad(waveform[:, None], (reach, reach), mode="reflect")[:, 0]
            if not full:
                padded = _reflect_ends(padded, to_device(lengths, waveform.device)[:, None], reach)
            return padded, 1 + lengths // self.config.hop_length
        total = max(samples, self.min_samples)
        positions = torch.arange(-reach, total + reach, device=waveform.device)
        index = reflect_index(positions, to_device(lengths, waveform.device)[:, None])
        frames = 1 + lengths.clamp_min(self.min_samples) // self.config.hop_length
        return waveform.gather(1, index), frames


def _reflect_ends(padded: Tensor, length: Tensor, reach: int) -> Tensor:
    """Append to every clip its last `reach` samples in reverse, then zeros.

    Args:
        padded: float32 [B, S + 2 * reach], clips starting at `reach`.
        length: int64 [B, 1], samples of each clip, more than `reach`.
        reach: padding on either side, samples.
    """
    steps = torch.arange(reach, device=padded.device)
    end = length + reach
    places = torch.arange(padded.shape[1], device=padded.device)
    tail = padded.gather(1, end - 2 - steps)
    return padded.masked_fill(places >= end, 0.0).scatter(1, end + steps, tail)


class InputStatistics(nn.Module):
    """Mean and deviation of each mel band in dB over the corpus, stored with the model."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(config.num_mel_bands))
        self.register_buffer("deviation", torch.empty(config.num_mel_bands))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset to typical statistics of recordings."""
        self.mean.fill_(DEFAULT_MEAN)
        self.deviation.fill_(DEFAULT_DEVIATION)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Standardize [B, bands, T] in dB per band, to mean 0 and deviation 1 over the corpus."""
        return (log_mel - self.mean.float()[:, None]) / self.deviation.float()[:, None]
