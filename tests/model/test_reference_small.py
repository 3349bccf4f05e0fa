"""Parity with the reference implementation in a bare clone.

Only the part of the reference fixture that fits into the repository is compared here: spectrogram, mel filters,
positions and targets of one clip (`make_reference_small.py`). Parity of encoder, predictor, head and loss needs the
whole fixture: `tests/convert/test_reference_parity.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bestrq2 import BestRQ2Config, BestRQ2Model
from bestrq2.model.log_mel import LogMel, mel_filters
from bestrq2.model.patches import patchify, sine_cosine_positions
from bestrq2.model.quantizer import RandomProjectionQuantizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("reference_small.npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def log_mel(small) -> torch.Tensor:
    waveform = torch.from_numpy(small["waveform"].astype(np.float32) / 32768)
    return LogMel(BestRQ2Config())(waveform[None])[0][0]


def test_log_mel_equals_the_reference_within_a_thousandth_of_a_decibel(small, log_mel):
    assert log_mel.shape == (128, 257)
    assert np.ptp(small["log_mel"]) > 60  # loud and quiet places are among them
    assert np.abs(log_mel[:, :256].numpy() - small["log_mel"]).max() < 1e-3


def test_mel_filters_equal_the_reference(small):
    filters = mel_filters(2048, 128, 0.0, 8000.0, 16_000, CPU).numpy()
    assert filters.shape == small["mel_filters"].shape
    np.testing.assert_allclose(filters, small["mel_filters"], atol=1e-6)
    assert np.array_equal(filters > 0, small["mel_filters"] > 0)


@pytest.mark.parametrize("part", ["encoder", "predictor"])
def test_positions_equal_the_reference(small, part):
    expected = small[f"{part}_positions"]
    found = sine_cosine_positions(8, 16, expected.shape[1], CPU).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_codes_equal_those_of_the_reference_quantizer(small, log_mel):
    config = BestRQ2Config(codebook_size=512)
    quantizer = RandomProjectionQuantizer(config)
    quantizer.projection.copy_(torch.from_numpy(small["projection"])[None])
    quantizer.codebook.copy_(torch.from_numpy(small["codebook"])[None])
    codes = quantizer(patchify(log_mel[None, :, :256], (16, 16)))[0].numpy()
    assert np.array_equal(codes[small["mask"]], small["targets"])
    assert len(np.unique(small["targets"])) > 5


def test_patches_of_the_model_are_cut_from_this_spectrogram(small, log_mel):
    config = BestRQ2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    waveform = torch.from_numpy(small["waveform"].astype(np.float32) / 32768)
    patches = BestRQ2Model(config).patches(waveform[None])
    row, column = 5, 11
    patch = log_mel[row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16]
    assert torch.equal(patches.encoder_input[0, row * 16 + column], patch.flatten())
    assert (patches.columns, patches.valid) == (16, None)
