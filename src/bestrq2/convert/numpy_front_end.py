"""Front end of an exported encoder in numpy: resampling, windows and log-mel spectrogram; and pooling of its frames.

This file is copied into every ONNX export as `front_end.py`; it needs neither torch nor bestrq2.

    session = onnxruntime.InferenceSession("exported/model.onnx")
    clip, frames, seconds = embed(session, waveform, sampling_rate)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SETTINGS_KEY = "front_end"
"""Key in the metadata of the ONNX file for the settings of its front end, as JSON."""

POWER_FLOOR = 1e-10
# As in training: float samples beyond it are integers, and more rows are samples or a batch.
LARGEST_SAMPLE, MOST_CHANNELS = 16.0, 64
# Resampling filter: passes 91 % of the band that both rates share, with aliases below -125 dB.
PASSBAND, ATTENUATION_DB = 0.913, 125.0
# Windows per call of the encoder.
BATCH = 8


class FrontEnd:
    """Log-mel spectrogram in dB: Hann window, reflect padding, power, triangular bands on the HTK scale.

    Args:
        sampling_rate: Hz.
        hop_length: samples between spectrogram frames.
        mel_min_hz: lower edge of the lowest band.
        mel_max_hz: upper edge of the highest band.
        spectra: length of the Fourier transform and of the Hann window, samples, and number of bands, of each
            spectrogram, the longest one first; their bands follow each other.
        patch_frames: spectrogram frames in one frame of the encoder.
        max_samples: samples of the longest clip that the encoder was trained for.
        pooling: pooling of the encoder's frames to one vector per clip, see `pool`.
    """

    def __init__(
        self,
        sampling_rate: int,
        hop_length: int,
        mel_min_hz: float,
        mel_max_hz: float,
        spectra: Sequence[tuple[int, int, int]],
        patch_frames: int,
        max_samples: int,
        pooling: str = "mean",
    ) -> None:
        self.sampling_rate, self.hop_length = sampling_rate, hop_length
        self.patch_frames, self.max_samples, self.pooling = patch_frames, max_samples, pooling
        self.window_frames = self.frames(max_samples)
        # One whole patch: shorter clips are extended to it by reflection.
        self.min_samples = (patch_frames - 1) * hop_length
        self.filters = []
        for n_fft, win_length, bands in spectra:
            before = (n_fft - win_length) // 2
            window = np.pad(hann_window(win_length), (before, n_fft - win_length - before))
            energy = np.square(window).sum(dtype=np.float32)
            self.filters.append((window, mel_filters(n_fft, bands, mel_min_hz, mel_max_hz, sampling_rate) / energy))

    @classmethod
    def of(cls, session: Any) -> FrontEnd:
        """Front end of an onnxruntime session of an exported encoder; ValueError for other ONNX files."""
        settings = session.get_modelmeta().custom_metadata_map.get(SETTINGS_KEY)
        if settings is None:
            raise ValueError(f"this ONNX file has no '{SETTINGS_KEY}' in its metadata: it is not an export of bestrq2")
        return cls(**json.loads(settings))

    @property
    def hop_seconds(self) -> float:
        """Seconds between the frames of the encoder."""
        return self.patch_frames * self.hop_length / self.sampling_rate

    def frames(self, samples: int) -> int:
        """Number of encoder frames for a clip of that many samples: whole patches only, at least one."""
        return max(1, (1 + samples // self.hop_length) // self.patch_frames)

    def log_mel(self, waveform: np.ndarray) -> np.ndarray:
        """Spectrogram of one clip: float [samples >= 1] in [-1, 1] to float32 [bands, frames] in dB.

        Raises:
            ValueError: for another shape or type, no samples, NaN, or samples far outside [-1, 1].
        """
        waveform = checked(waveform, channels=False).astype(np.float32)
        total = max(len(waveform), self.min_samples)
        bands = []
        for window, filters in self.filters:
            reach = len(window) // 2
            padded = waveform[reflected(np.arange(-reach, total + reach), len(waveform))]
            frames = np.lib.stride_tricks.sliding_window_view(padded, len(window))[:: self.hop_length]
            spectrum = np.fft.rfft((frames * window).astype(np.float64), axis=1)
            power = (np.square(spectrum.real) + np.square(spectrum.imag)).astype(np.float32)
            bands.append(10 * np.log10(np.maximum(power @ filters, np.float32(POWER_FLOOR))).T)
        return np.concatenate(bands)

    def windows(self, waveform: np.ndarray, overlap: float = 0.5) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Cut [samples] into overlapping windows for the encoder, all of full length where there are several.

        Yields:
            First encoder frame of the window, its samples, and the weights of its frames against those of neighbouring
            windows, float32 [frames]: frames fade out over the overlap, where they have less context.

        Raises:
            ValueError: if `overlap`, the share of a window that the next one repeats, is not from 0 to 0.5, or as for
                `log_mel`.
        """
        waveform = checked(waveform, channels=False)
        if not 0 <= overlap <= 0.5:
            raise ValueError(f"overlap must be from 0 to 0.5, got {overlap}")
        hop = self.patch_frames * self.hop_length
        shared = int(overlap * self.window_frames)
        total = self.frames(len(waveform))
        last = max(0, total - self.window_frames)
        rising = np.arange(1, self.window_frames + 1, dtype=np.float32) / np.float32(shared + 1)
        for first in (*range(0, last, self.window_frames - shared), last):
            weights = np.ones(min(total, self.window_frames), np.float32)
            if first > 0:
                weights = np.minimum(weights, rising)
            if first < last:
                weights = np.minimum(weights, rising[::-1])
            end = first * hop + self.max_samples if first < last else len(waveform)
            yield first, waveform[first * hop : end], weights


def embed(
    session: Any,
    waveform: np.ndarray,
    sampling_rate: float,
    front_end: FrontEnd | None = None,
    overlap: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embed a recording of any length, in overlapping windows whose frames are cross-faded.

    Args:
        session: onnxruntime session of the exported encoder.
        waveform: float [samples] or [channels, samples] in [-1, 1]; channels are averaged.
        sampling_rate: sampling rate of the waveform (Hz); resampled where it differs from the encoder's.
        front_end: front end of the session; created if None.
        overlap: share of a window that the next one repeats, 0 to 0.5; 0 takes half the time.

    Returns:
        clip float32 [D'], pooled over all frames; frames float32 [T, D]; centres of the frames, float64 [T] seconds.

    Raises:
        ValueError: for audio of another shape or type, without samples, with NaN or samples far outside [-1, 1], or an
            impossible rate or overlap.
    """
    front_end = FrontEnd.of(session) if front_end is None else front_end
    waveform = checked(waveform)
    mono = waveform if waveform.ndim == 1 else waveform.mean(axis=0)
    windows = list(front_end.windows(resample(mono, sampling_rate, front_end.sampling_rate), overlap))
    states: list[np.ndarray] = []
    for first in range(0, len(windows), BATCH):
        states += encode(session, [front_end.log_mel(piece) for _, piece, _ in windows[first : first + BATCH]])
    total = windows[-1][0] + len(states[-1])
    frames, sums = np.zeros((total, states[0].shape[1]), np.float32), np.zeros((total, 1), np.float32)
    for (first, _, weights), window in zip(windows, states, strict=True):
        frames[first : first + len(window)] += window * weights[:, None]
        sums[first : first + len(window)] += weights[:, None]
    frames /= sums
    seconds = (np.arange(total) + 0.5) * front_end.hop_seconds
    return pool(frames, front_end.pooling), frames, seconds


def pool(frames: np.ndarray, pooling: str) -> np.ndarray:
    """Pool the frames of one clip, as the encoder does.

    Args:
        frames: float [T, D], T at least 1.
        pooling: "mean", "std" (standard deviation), "max", "quarters" (means of the four quarters of the clip, which
            share frames where there are fewer than four), "attention" (mean with the weights softmax(sqrt(D)
            cos(frame, mean frame))), or several joined by "+", which are concatenated.

    Returns:
        float32 [D] for one mean, [4 D] for quarters.
    """
    mean, count = frames.mean(axis=0, dtype=np.float64), len(frames)
    parts = []
    for part in pooling.split("+"):
        if part == "mean":
            parts.append(mean)
        elif part == "std":
            # In blocks: an array of squares would double the memory of hours of frames.
            blocks = (frames[first : first + 4096] for first in range(0, count, 4096))
            parts.append(np.sqrt(sum(np.square(block - mean).sum(axis=0) for block in blocks) / count))
        elif part == "max":
            parts.append(frames.max(axis=0))
        elif part == "quarters":
            spans = [(n * count // 4, max(n * count // 4 + 1, (n + 1) * count // 4)) for n in range(4)]
            parts += [frames[first:end].mean(axis=0, dtype=np.float64) for first, end in spans]
        else:
            parts.append(_attention(frames, mean))
    return np.concatenate(parts).astype(np.float32)


def _attention(frames: np.ndarray, mean: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.einsum("td,td->t", frames, frames)) * np.linalg.norm(mean)
    scores = np.sqrt(frames.shape[1]) * (frames @ mean.astype(np.float32)) / np.maximum(norms, 1e-12)
    weights = np.exp(scores - scores.max())  # the maximum cancels and prevents overflow
    return np.asarray((weights / weights.sum()).astype(np.float32) @ frames)


def checked(waveform: np.ndarray, channels: bool = True) -> np.ndarray:
    """A waveform as an array, if it is float [samples], or with `channels` also [channels, samples], in [-1, 1].

    Raises:
        ValueError: for another shape or type, no samples, NaN, or samples far outside [-1, 1].
    """
    waveform = np.asarray(waveform)
    found = f"{waveform.dtype} of shape {waveform.shape}"
    shapes = "[samples] or [channels, samples]" if channels else "[samples]"
    if waveform.dtype.kind != "f" or waveform.ndim not in ((1, 2) if channels else (1,)) or not waveform.size:
        raise ValueError(f"expected float samples in [-1, 1] as {shapes}; got {found}")
    if waveform.ndim == 2 and len(waveform) > min(waveform.shape[1], MOST_CHANNELS):
        raise ValueError(f"expected {shapes}, at most {MOST_CHANNELS} channels; got {found}: transpose it")
    largest = float(np.abs(waveform).max())
    if not largest <= LARGEST_SAMPLE:  # also NaN
        raise ValueError(f"expected float samples in [-1, 1]; got {largest:g}")
    return waveform


def encode(session: Any, spectrograms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Frames of clips of unequal length in one batch: float32 [bands, frames] each to float32 [T', D] each."""
    counts = np.array([spectrogram.shape[1] for spectrogram in spectrograms], dtype=np.int64)
    batch = np.zeros((len(counts), spectrograms[0].shape[0], counts.max()), dtype=np.float32)
    for row, spectrogram in zip(batch, spectrograms, strict=True):
        row[:, : spectrogram.shape[1]] = spectrogram
    frames, mask = session.run(["frames", "frame_mask"], {"log_mel": batch, "frames_per_clip": counts})
    return [clip[inside] for clip, inside in zip(frames, mask, strict=True)]


def reflected(positions: np.ndarray, length: int) -> np.ndarray:
    """Positions in `length` samples after repeated reflection at their ends."""
    period = max(1, 2 * (length - 1))
    folded = positions % period
    return np.minimum(folded, period - folded)


def hann_window(length: int) -> np.ndarray:
    """Periodic Hann window, float32 [length], rounded to float32 where training does: quiet bands depend on it."""
    angles = np.arange(length, dtype=np.float32) * np.float32(2 * math.pi / length)
    return np.float32(0.5) - np.float32(0.5) * np.cos(angles.astype(np.float64)).astype(np.float32)


def mel_filters(n_fft: int, bands: int, low: float, high: float, sampling_rate: int) -> np.ndarray:
    """Triangular filters on the HTK scale without area normalisation, float32 [n_fft/2+1, bands].

    Rounded to float32 where training does: filters computed in float64 change quiet bands.
    """
    lowest, highest = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (low, high))
    exponents = evenly(lowest, highest, bands + 2) / np.float32(2595)
    corners = np.float32(700) * ((10.0 ** exponents.astype(np.float64)).astype(np.float32) - np.float32(1))
    bins = evenly(0.0, sampling_rate // 2, n_fft // 2 + 1)
    widths = np.diff(corners)
    distances = corners[None] - bins[:, None]
    rising, falling = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
    return np.maximum(np.minimum(rising, falling), np.float32(0))


def evenly(first: float, last: float, count: int) -> np.ndarray:
    """Evenly spaced float32 [count], computed from the nearer end with a float32 step, as in torch."""
    step = np.float64((np.float32(last) - np.float32(first)) / np.float32(count - 1))
    steps = np.arange(count)
    from_first, from_last = np.float32(first) + step * steps, np.float32(last) - step * steps[::-1]
    return np.where(steps < count // 2, from_first, from_last).astype(np.float32)


def resample(waveform: np.ndarray, from_rate: float, to_rate: int) -> np.ndarray:
    """Resample [samples] from one rate in Hz to another by a Kaiser-windowed sinc; unchanged where they are equal.

    Returns:
        float32 [samples * to_rate / from_rate, rounded, at least one].

    Raises:
        ValueError: for a rate that is not a positive whole number, or a waveform as for `FrontEnd.log_mel`.
    """
    waveform = checked(waveform, channels=False)
    if not (math.isfinite(from_rate) and from_rate >= 1 and from_rate == int(from_rate)):
        raise ValueError(f"a sampling rate must be a positive whole number of Hz, got {from_rate}")
    if from_rate == to_rate:
        return np.asarray(waveform, dtype=np.float32)
    common = math.gcd(int(from_rate), to_rate)
    up, down = to_rate // common, int(from_rate) // common
    # In units of input samples: half of the common band, and the reach of the filter to either side.
    cutoff = min(1.0, up / down) * (1 + PASSBAND) / 2
    transition = math.pi * min(1.0, up / down) * (1 - PASSBAND)
    reach = math.ceil((ATTENUATION_DB - 7.95) / (2.285 * transition) / 2)
    count = max(1, round(len(waveform) * up / down))
    padded = np.pad(np.asarray(waveform, dtype=np.float64), (reach, reach + down + 1))
    stretches = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    result = np.empty(count, dtype=np.float32)
    # Output sample m is at input position m * down / up: all m of one remainder share their taps.
    for phase in range(min(up, count)):
        start, fraction = divmod(phase * down, up)
        offsets = np.arange(-reach, reach + 1) - fraction / up
        bell = np.i0(0.1102 * (ATTENUATION_DB - 8.7) * np.sqrt(np.maximum(0, 1 - (offsets / (reach + 1)) ** 2)))
        taps = cutoff * np.sinc(cutoff * offsets) * bell / np.i0(0.1102 * (ATTENUATION_DB - 8.7))
        chosen = len(range(phase, count, up))
        result[phase::up] = stretches[start::down][:chosen] @ taps
    return result
