"""Pads raw audio and remembers its lengths; the spectrogram is the model's own business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor


class BestRQ2FeatureExtractor(SequenceFeatureExtractor):
    """Waveforms of unequal length to one padded batch with its attention mask.

    Args:
        feature_size: values per sample, 1.
        sampling_rate: Hz the model expects.
        padding_value: what stands behind the end of a clip; the model never reads it.
        kwargs: passed on to transformers.
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
            sampling_rate: Hz of the clips; None trusts that it is the model's.
            padding: as in transformers: True or "longest", "max_length", False.
            max_length: samples, for "max_length" and truncation.
            truncation: whether clips longer than `max_length` are cut.
            return_tensors: "pt", "np" or None.
            kwargs: passed on to `pad`.

        Returns:
            `input_values` float32 [B, S] and `attention_mask` int32 [B, S], 1 = sample of the clip.

        Raises:
            ValueError: for another sampling rate than the model's, or clips that are not mono.
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
