"""Mean and deviation per mel band of a corpus, estimated before training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bestrq2.data.band_sums import BandSums
from bestrq2.data.batch import AudioBatch
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.train.module import unequal_lengths


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
    sums = BandSums(model.config.num_mel_bands)
    rejected: list[tuple[str, str]] = []
    for batch in batches:
        rejected += batch.rejected
        sums.add(*model.log_mel(batch.to("cpu").input_values, unequal_lengths(batch)))
    return *sums.statistics(), rejected
