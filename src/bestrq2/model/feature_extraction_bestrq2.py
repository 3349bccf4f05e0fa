"""Feature extractor: padding of raw audio and its attention mask; the model computes the spectrogram."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor

from .waveforms import as_array, is_array, range_problem, to_float32


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
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pad clips to a common length.

        Args:
            raw_speech: one clip, a list of clips, or as in all of transformers an array [clips, samples]. A clip is an
                array, torch tensor or list of numbers [samples], mono, of float type in [-1, 1], or int8, int16, int32
                or uint8, which are scaled.
            sampling_rate: sampling rate of the clips, Hz; None assumes the model's.
            padding: True or "longest", "max_length", or False, as in transformers.
            max_length: length for "max_length" padding and truncation, samples.
            truncation: whether to cut clips longer than `max_length`.
            return_attention_mask: whether to return the mask; None returns it. Without it, padding counts as audio.
            return_tensors: "pt", "np" or None.
            kwargs: further arguments of `pad`.

        Returns:
            `input_values` float32 [B, S] and `attention_mask` int32 [B, S], 1 for samples of the clip.

        Raises:
            ValueError: for a sampling rate other than the model's, or clips that are empty, not mono, or hold NaN,
                infinity, or samples far outside [-1, 1].
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the model expects {self.sampling_rate} Hz, got {sampling_rate} Hz: resample the audio first, "
                "or use bestrq2.load(...).embed(audio, sampling_rate=...), which does"
            )
        return self.pad(
            BatchFeature({"input_values": [_samples(index, clip) for index, clip in enumerate(_clips(raw_speech))]}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            return_attention_mask=return_attention_mask is not False,
            return_tensors=return_tensors,
            **kwargs,
        )


def _clips(raw_speech: Any) -> list[Any]:
    """The clips of one argument: a list of numbers is one clip, anything else that can be iterated is a batch."""
    if is_array(raw_speech):
        waveform = as_array(raw_speech)
        if waveform.ndim != 2:
            return [waveform]
        if len(waveform) > waveform.shape[1]:
            raise ValueError(
                f"an array of shape {waveform.shape} has more clips than samples; "
                "give [clips, samples], and one clip of several channels as their mean"
            )
        return list(waveform)
    clips = [raw_speech]
    if isinstance(raw_speech, Iterable) and not isinstance(raw_speech, str | bytes | dict):
        clips = list(raw_speech)
    if not clips:
        raise ValueError("there is no audio: the list is empty")
    return [clips] if all(isinstance(clip, Real) for clip in clips) else clips


def _samples(index: int, clip: Any) -> np.ndarray:
    """One clip as float32 [samples]."""
    try:
        samples = to_float32(as_array(clip))
    except ValueError as error:
        raise ValueError(f"raw_speech[{index}]: {error}") from error
    if samples.ndim != 1:
        raise ValueError(f"raw_speech[{index}]: every clip must be mono, [samples]; got shape {samples.shape}")
    problem = range_problem(samples) if len(samples) else "holds no samples."
    if problem:
        raise ValueError(f"raw_speech[{index}]: {problem}")
    return samples
