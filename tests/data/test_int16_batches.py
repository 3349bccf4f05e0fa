"""Batches of 16-bit samples are judged, converted and padded as those of floats."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import noise
from shard_crops import RATE, clips, fields

from bestrq2.data.audio import check_usable
from bestrq2.data.batch import fixed_batches
from bestrq2.data.waveforms import put_samples, to_float32
from bestrq2.errors import AudioError

SAMPLES = st.lists(st.one_of(st.integers(-8, 8), st.integers(-32768, 32767)), min_size=1, max_size=50)


@settings(max_examples=200, deadline=None)
@given(SAMPLES, st.integers(-32768, 32767))
def test_int16_is_judged_and_converted_as_float_is(samples, offset):
    pcm = np.clip(np.array(samples) + offset, -32768, 32767).astype(np.int16)
    verdicts = []
    for waveform in (pcm, to_float32(pcm)):
        try:
            check_usable(waveform)
            verdicts.append("")
        except AudioError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]
    row = np.full(len(pcm), np.nan, np.float32)
    put_samples(pcm, row)
    np.testing.assert_array_equal(row, to_float32(pcm))
    file = io.BytesIO()
    soundfile.write(file, pcm, RATE, format="WAV")
    np.testing.assert_array_equal(row, soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0])


def test_the_edge_of_silence_is_the_same_for_both():
    """3.28 steps from the mean are heard; the quick answer needs half the range to reach them."""
    pcm = np.zeros(1000, np.int16)
    for step, silent in ((3, True), (4, False), (6, False)):
        pcm[500] = step
        for waveform in (pcm, to_float32(pcm)):
            if silent:
                with pytest.raises(AudioError, match="is silent"):
                    check_usable(waveform)
            else:
                check_usable(waveform)


def test_batches_of_both_kinds_are_padded_with_zeros():
    waveforms = [np.arange(-50, 50, dtype=np.int16) * 300, noise(0.02, RATE)]
    (batch,) = fixed_batches(waveforms, fields(0.06), 4)
    assert batch.input_values.dtype == torch.float32
    found = clips(batch, fields(0.06))
    np.testing.assert_array_equal(found[0][1], waveforms[0] / np.float32(32768))
