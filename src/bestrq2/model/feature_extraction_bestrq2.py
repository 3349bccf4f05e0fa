"""Feature extractor: padding of raw audio and its attention mask; the model computes the spectrogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor


class BestRQ2FeatureExtractor(SequenceFeatureExtractor):
    """Feature extractor that pads waveforms of unequal length to a batch with an attention mask.

    Args:
        feature_size: values per sample, 1.
        sampling_rate: sampling rate of the model, Hz.
        padding_value: value of samples after the end of a clip; the model never reads them.
        kwargs: arguments of transformers' `SequenceFeatureExtractor`.
    """

    model_input_names = ("input_values", "attention_mask")

    def __init__(
        self, feature_size: int = 1, sampling_rate: int = 16_000, padding_value: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[float] | Sequence[np.ndarray] | Sequence[Sequence[float]],
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pad clips to a common length.

        Args:
            raw_speech: one clip [samples] or a list of clips, mono, samples in [-1, 1].
            sampling_rate: sampling rate of the clips, Hz; None assumes the model's.
            padding: True or "longest", "max_length", or False, as in transformers.
            max_length: length for "max_length" padding and truncation, samples.
            truncation: whether to cut clips longer than `max_length`.
            return_tensors: "pt", "np" or None.
            kwargs: further arguments of `pad`.

        Returns:
            `input_values` float32 [B, S] and `attention_mask` int32 [B, S], 1 for samples of the clip.

        Raises:
            ValueError: for a sampling rate other than the model's, or clips that are not mono.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the model expects {self.sampling_rate} Hz, got {sampling_rate} Hz: resample the audio first, "
                "or use bestrq2.load(...).embed(audio, sampling_rate=...), which does"
            )
        # A list of numbers is one clip, anything else that can be iterated is a batch of clips.
        single = np.ndim(raw_speech[0]) == 0
        clips = [np.asarray(clip, dtype=np.float32) for clip in ([raw_speech] if single else raw_speech)]
        for clip in clips:
            if clip.ndim != 1:
                raise ValueError(f"every clip must be mono, [samples]; got shape {clip.shape}")
        return self.pad(
            BatchFeature({"input_values": clips}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            return_attention_mask=True,
            return_tensors=return_tensors,
            **kwargs,
        )
