"""Baseline features that need no training: log-mel statistics."""

from __future__ import annotations

import numpy as np

from bestrq2.data.labels import ClipAudio
from bestrq2.inference.embedder import Embeddings
from bestrq2.inference.inputs import mono_blocks


class LogMelStatistics:
    """Mean and standard deviation over time of every band of the paper's log-mel spectrogram, in dB.

    A clip embedding covers the whole clip; a frame covers one patch column of 16 spectrogram frames, 625 ms. Clips are
    never padded, so results do not depend on the batch.

    Attributes:
        name: name of the features in tables.
    """

    name = "log-mel statistics"

    def __init__(self) -> None:
        from bestrq2.model.configuration_bestrq2 import BestRQ2Config
        from bestrq2.model.log_mel import LogMel

        self._config = BestRQ2Config()
        self._log_mel = LogMel(self._config)

    def embed(self, audio: list[ClipAudio], sampling_rate: int | None = None) -> Embeddings:
        """Compute the features of clips.

        Args:
            audio: waveforms [samples] or [channels, samples] at `sampling_rate`, or files.
            sampling_rate: sampling rate of the waveforms in Hz; None for 16 000.

        Returns:
            `Embeddings` with D = 256: 128 means, then 128 standard deviations.

        Raises:
            AudioError: a clip cannot be decoded, is empty, or holds NaN or infinity.
        """
        spectrograms = [self._spectrogram(one, sampling_rate) for one in audio]
        stretch = self._config.patch_size[1]
        counts = [max(1, len(spectrogram) // stretch) for spectrogram in spectrograms]
        width = 2 * self._config.num_mel_bands
        frames = np.zeros((len(audio), max(counts, default=0), width), dtype=np.float32)
        mask = np.arange(frames.shape[1]) < np.array(counts, dtype=np.int64)[:, None]
        for row, (spectrogram, count) in enumerate(zip(spectrograms, counts, strict=True)):
            for column in range(count):
                frames[row, column] = _mean_and_deviation(spectrogram[column * stretch : (column + 1) * stretch])
        clip = np.array([_mean_and_deviation(spectrogram) for spectrogram in spectrograms], dtype=np.float32)
        seconds = stretch * self._config.hop_length / self._config.sampling_rate
        timestamps = np.where(mask, (np.arange(frames.shape[1]) + 0.5) * seconds, np.nan)
        return Embeddings(clip.reshape(len(audio), width), frames, mask, timestamps)

    def _spectrogram(self, audio: ClipAudio, sampling_rate: int | None) -> np.ndarray:
        """Log-mel spectrogram of one clip, float64 [frames, bands]."""
        import torch

        rate = self._config.sampling_rate
        name = "audio" if isinstance(audio, np.ndarray) else str(audio)
        waveform = np.concatenate(list(mono_blocks(name, audio, sampling_rate or rate, rate)))
        with torch.inference_mode():
            log_mel, _ = self._log_mel(torch.from_numpy(waveform)[None])
        return log_mel[0].T.double().numpy()


def _mean_and_deviation(spectrogram: np.ndarray) -> np.ndarray:
    """Reduce [frames, bands] to [2 * bands]."""
    return np.concatenate([spectrogram.mean(axis=0), spectrogram.std(axis=0)])
