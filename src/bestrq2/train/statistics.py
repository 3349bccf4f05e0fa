"""Mean and deviation per mel band of a corpus, estimated before training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bestrq2.data.batches import AudioBatch
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.train.module import padding_mask

# A band that never changes would otherwise be blown up to noise.
_SMALLEST_DEVIATION = 1.0


@torch.no_grad()
def band_statistics(model: BestRQ2Model, batches: Iterable[AudioBatch]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Statistics of the log-mel spectrogram over the valid frames of all clips.

    Args:
        model: gives the spectrogram.
        batches: of audio.

    Returns:
        mean and deviation in dB, float32 [bands] each (the deviation at least 1 dB), and the recordings rejected on the
        way with their reasons.
    """
    bands = model.config.num_mel_bands
    count = torch.zeros((), dtype=torch.float64)
    total, squares = torch.zeros(bands, dtype=torch.float64), torch.zeros(bands, dtype=torch.float64)
    rejected: list[tuple[str, str]] = []
    for batch in batches:
        rejected += batch.rejected
        lengths = None if padding_mask(batch) is None else batch.lengths
        log_mel, frames = model.log_mel(batch.input_values, lengths)
        inside = torch.arange(log_mel.shape[-1]) < frames[:, None]
        values = log_mel.double().transpose(1, 2)[inside]
        count += len(values)
        total += values.sum(dim=0)
        squares += values.square().sum(dim=0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0.0).sqrt().clamp_min(_SMALLEST_DEVIATION)
    return mean.float(), deviation.float(), rejected
