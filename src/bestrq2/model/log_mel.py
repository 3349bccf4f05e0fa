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

# Samples of frames that a CPU's thread transforms at a time, and products that its mel filters are divided into.
_SAMPLES_ON_CPU, _PRODUCTS_ON_CPU = 2**18, 4


@cached
def _window(win_length: int, n_fft: int, device: torch.device) -> Tensor:
    """Hann window in the middle of a frame, float32 [n_fft]."""
    window = torch.hann_window(win_length, dtype=torch.float32, device="cpu")
    before = (n_fft - win_length) // 2
    return nn.functional.pad(window, (before, n_fft - win_length - before)).to(device)


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


@cached
def banded_filters(
    n_fft: int, win_length: int, bands: int, low: float, high: float, sampling_rate: int, groups: int,
    device: torch.device,
) -> list[tuple[int, int, Tensor]]:  # fmt: skip
    """Mel filters divided by the energy of the window, in groups of neighbouring bands.

    Returns:
        For each group the first bin that it reads, the bin after the last, and the filters float32 [bins, bands].
    """
    filters = mel_filters(n_fft, bands, low, high, sampling_rate, torch.device("cpu"))
    # Scaling the window instead would round the quietest bands differently from the reference.
    filters = filters / _window(win_length, n_fft, torch.device("cpu")).square().sum()
    if groups == 1:
        return [(0, len(filters), filters.to(device))]
    parts = []
    for part in filters.split(-(-bands // groups), dim=1):
        bins = part.any(dim=1).nonzero()
        first, end = (int(bins[0]), int(bins[-1]) + 1) if len(bins) else (0, 1)
        parts.append((first, end, part[first:end].contiguous().to(device)))
    return parts


class Decibels(nn.Module):
    """Conversion of power to dB, 10 log10(max(power, 1e-10))."""

    def forward(self, power: Tensor) -> Tensor:
        """Map float32 [...] to the same shape."""
        return power.clamp_min(POWER_FLOOR).log10().mul(10.0)


class LogMel(nn.Module):
    """Log-mel spectrogram of the paper (section 3): Hann window, reflect padding, power, HTK bands, dB.

    With a second, shorter window its bands follow those of the long one; the centres of the frames are the same.
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
            return self._decibels(padded).transpose(1, 2), frames

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
        index = to_device(index + available * torch.arange(len(index), device=index.device)[:, None], device)
        with torch.autocast(device.type, enabled=False):
            return self._decibels(rows.float()).flatten(0, 1)[index].transpose(1, 2)

    def _decibels(self, padded: Tensor) -> Tensor:
        """Map padded waveforms [B, S + n_fft] to [B, T, bands] in dB."""
        spectra = []
        for n_fft, win_length, bands in self.config.spectra:
            before = (self.config.n_fft - n_fft) // 2
            spectra.append(self._spectrum(padded[:, before : padded.shape[1] - before], n_fft, win_length, bands))
        return spectra[0] if len(spectra) == 1 else torch.cat(spectra, dim=-1)

    def _spectrum(self, padded: Tensor, n_fft: int, win_length: int, bands: int) -> Tensor:
        """Map waveforms [B, S + n_fft] to [B, T, bands] in dB by one window."""
        config, device = self.config, padded.device
        in_pieces = device.type == "cpu" and not traced()
        # On a CPU each product reads few bins.
        filters = banded_filters(
            n_fft, win_length, bands, config.mel_min_hz, config.mel_max_hz,
            config.sampling_rate, _PRODUCTS_ON_CPU if in_pieces else 1, device,
        )  # fmt: skip
        window = _window(win_length, n_fft, device)
        frames = padded.unfold(1, n_fft, config.hop_length)
        if not in_pieces:
            return self._bands(frames, window, filters)
        # Pieces of long clips, and several short ones at a time, fit the CPU caches.
        count, size = frames.shape[1], max(1, torch.get_num_threads() * _SAMPLES_ON_CPU // n_fft)
        clips = frames.split(max(1, size // count))
        pieces = [piece for some in clips for piece in some.tensor_split(-(-count // size), dim=1)]
        decibels = torch.cat([self._bands(piece, window, filters).flatten(0, 1) for piece in pieces])
        return decibels.unflatten(0, (len(padded), count))

    def _bands(self, frames: Tensor, window: Tensor, filters: list[tuple[int, int, Tensor]]) -> Tensor:
        """Map frames [B, T, n_fft] to [B, T, bands] in dB."""
        spectrum = torch.view_as_real(torch.fft.rfft((frames * window).flatten(0, 1))).square_()
        power = spectrum[..., 0] + spectrum[..., 1]
        bands = torch.cat([power[:, first:end] @ part for first, end, part in filters], dim=1)
        return self.decibels(bands).unflatten(0, frames.shape[:2])

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
            # On a CPU three times as fast as padding by PyTorch.
            ends = waveform[:, 1 : reach + 1].flip(1), waveform[:, -reach - 1 : -1].flip(1)
            padded = torch.cat([ends[0], waveform, ends[1]], dim=1)
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
