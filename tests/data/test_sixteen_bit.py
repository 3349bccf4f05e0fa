"""Rounding to 16 bit: exact where the samples are audio, and quiet where they are absurd."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from bestrq2.data.prepare import cutting
from bestrq2.soundworld import corpus


def both(wave):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantised, clipped = cutting.to_int16(wave)
        np.testing.assert_array_equal(corpus.to_int16(wave), quantised)
    assert quantised.dtype == np.int16
    return quantised, clipped


def test_samples_of_absurd_size_are_cut_off_without_a_word():
    wave = np.array([3e38, -3e38, 1e30, 0.25, -7.0], np.float32)
    quantised, clipped = both(wave)
    assert quantised.tolist() == [32767, -32768, 32767, 8192, -32768]
    assert clipped


@pytest.mark.parametrize(
    ("sample", "wanted", "beyond"), [(1.0, 32767, False), (-1.0, -32768, False), (1.001, 32767, True)]
)
def test_the_edges_of_full_scale_stay_where_they_were(sample, wanted, beyond):
    quantised, clipped = both(np.array([sample, 0.5], np.float32))
    assert (quantised[0], clipped) == (wanted, beyond)


def test_every_sample_of_16_bit_comes_back_the_same():
    samples = np.arange(-32768, 32768).astype(np.int16)
    quantised, clipped = both(samples / np.float32(32768))
    np.testing.assert_array_equal(quantised, samples)
    assert not clipped
