"""The numpy front end computes the same as the torch front end of the model."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from bestrq2.convert import numpy_front_end
from bestrq2.convert.numpy_front_end import FrontEnd, embed, hann_window, mel_filters, resample
from bestrq2.convert.onnx import front_end_settings
from bestrq2.inference.windows import WindowGrid
from bestrq2.model.log_mel import LogMel
from bestrq2.model.log_mel import mel_filters as torch_mel_filters
from example_sounds import chirp, scene, tones

SPECTROGRAMS = {
    "paper": {},
    "10ms": {"hop_length": 160, "n_fft": 512, "win_length": 400, "num_mel_bands": 64, "mel_min_hz": 50.0},
    "two windows": {
        "hop_length": 160,
        "n_fft": 1024,
        "win_length": 1024,
        "num_mel_bands": 72,
        "patch_size": [24, 4],
        "short_win_length": 400,
        "short_mel_bands": 24,
    },
    "odd-window": {"hop_length": 160, "n_fft": 1024, "win_length": 401, "num_mel_bands": 32, "mel_max_hz": 7600.0},
}


def both(tiny_config: Callable, waveform: np.ndarray, **changes) -> tuple[np.ndarray, np.ndarray]:
    config = tiny_config(**changes)
    expected = LogMel(config)(torch.from_numpy(waveform)[None])[0][0].numpy()
    return FrontEnd(**front_end_settings(config)).log_mel(waveform), expected


def test_the_front_end_imports_only_numpy_and_the_standard_library():
    source = ast.parse(Path(numpy_front_end.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize(
    ("n_fft", "bands", "low", "high"), [(2048, 128, 0.0, 8000.0), (1024, 64, 50.0, 7600.0), (512, 48, 20.0, 8000.0)]
)
def test_filters_and_window_are_those_of_training(n_fft: int, bands: int, low: float, high: float):
    expected = torch_mel_filters(n_fft, bands, low, high, 16_000, torch.device("cpu")).numpy()
    np.testing.assert_allclose(mel_filters(n_fft, bands, low, high, 16_000), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(hann_window(n_fft), torch.hann_window(n_fft).numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("spectrogram", SPECTROGRAMS)
@pytest.mark.parametrize("samples", [1, 2, 100, 1023, 1024, 1025, 9374, 9375, 9376, 30_001, 80_000])
@pytest.mark.parametrize("sound", [scene, chirp, lambda samples: tones(samples, 440.0, 1200.0), np.zeros])
def test_log_mel_equals_that_of_the_model(tiny_config: Callable, spectrogram: str, samples: int, sound: Callable):
    found, expected = both(tiny_config, sound(samples).astype(np.float32), **SPECTROGRAMS[spectrogram])
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    # torch's own Fourier transform rounds at -140 dB of the loudest: what is 65 dB below it is sure to 1e-3 dB.
    heard = expected > expected.max(axis=0) - 65
    errors = np.abs(found - expected)
    assert errors[heard].max() <= 1e-3
    assert errors.max() <= 0.1


WINDOWS = {
    "whole patches": {},
    "a rest": {"max_seconds": 5.3},
    "an odd number": {"max_seconds": 4.5},
    "one frame": {"patch_size": (128, 1), "position_embedding": "rope_time", "max_seconds": 0.5},
}


@pytest.mark.parametrize("overlap", [0.5, 0.3, 0])
@pytest.mark.parametrize("changes", WINDOWS.values(), ids=WINDOWS)
def test_windows_are_those_of_the_embedder(tiny_config: Callable, changes: dict, overlap: float):
    config = tiny_config(**changes)
    front_end = FrontEnd(**front_end_settings(config))
    grid = WindowGrid(config, 1, overlap)
    longest, hop = config.max_samples, config.frame_hop_samples
    for samples in (1, longest, longest + hop - 1, longest + hop, 2 * longest + 3 * hop + 1, 5 * longest + 12_345):
        expected = list(grid.cut(iter([scene(samples)])))
        found = list(front_end.windows(scene(samples), overlap))
        assert [first for first, _, _ in found] == [window.first for window in expected]
        for (_, piece, weights), window in zip(found, expected, strict=True):
            assert np.array_equal(piece, window.waveform)
            assert np.array_equal(weights, grid.weights(window))


@pytest.mark.parametrize("overlap", [-0.1, 0.6, float("nan")])
def test_impossible_overlaps_are_refused(tiny_config: Callable, overlap: float):
    with pytest.raises(ValueError, match=r"overlap must be from 0 to 0\.5"):
        list(FrontEnd(**front_end_settings(tiny_config())).windows(scene(1_000), overlap))


@pytest.mark.parametrize(
    "rate", [8000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, pytest.param(44_099, marks=pytest.mark.slow)]
)
def test_resampling_preserves_the_common_band(rate: int):
    tones = [80, 997, 0.35 * min(rate, 16_000)]

    def sound(at: int) -> np.ndarray:
        return sum(0.2 * np.sin(2 * np.pi * hertz * np.arange(at // 2) / at) for hertz in tones)

    found = resample(sound(rate), rate, 16_000)
    soxr_found = soxr.resample(sound(rate), rate, 16_000, quality="HQ")
    assert found.dtype == np.float32
    assert abs(len(found) - len(soxr_found)) <= 1
    inner = slice(800, 7200)  # at the ends filters ring, each in its own way
    assert np.abs(found - sound(16_000)[: len(found)])[inner].max() < 1e-6
    assert np.abs(found[inner] - soxr_found[inner]).max() < 5e-5


def test_resampling_does_not_alias():
    seconds = np.arange(48_000) / 48_000
    above = np.sin(2 * np.pi * 9000 * seconds)
    assert np.abs(resample(above, 48_000, 16_000)[800:-800]).max() < 1e-5


@pytest.mark.parametrize("rate", [0, -16_000, 0.5, float("nan"), float("inf"), 44_100.5])
def test_impossible_rates_are_refused(rate: float):
    with pytest.raises(ValueError, match="positive whole number of Hz"):
        resample(np.ones(10), rate, 16_000)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (scene(0), "expected float samples"),
        (scene(1_000).reshape(500, 2), "at most 64 channels; got .*: transpose it"),
        (scene(20_000).reshape(100, 200), "at most 64 channels; got .*: transpose it"),
        (scene(1_000).reshape(1, 2, 500), r"\[channels, samples\]; got float32 of shape \(1, 2, 500\)"),
        ((32768 * scene(1_000)).astype(np.int16), r"expected float samples in \[-1, 1\] as .*; got int16"),
        (32768 * scene(1_000), r"expected float samples in \[-1, 1\]; got \d+"),
        (np.array([0.1, np.nan]), "got nan"),
    ],
)
def test_invalid_waveforms_are_refused(tiny_config: Callable, waveform: np.ndarray, message: str):
    front_end = FrontEnd(**front_end_settings(tiny_config()))
    with pytest.raises(ValueError, match=message):
        embed(None, waveform, 16_000, front_end)
    mono = r"as \[samples\]; got" if waveform.ndim > 1 else "expected float samples"
    windows, doubled = lambda given: list(front_end.windows(given)), lambda given: resample(given, 8_000, 16_000)
    for function in (front_end.log_mel, windows, doubled):
        with pytest.raises(ValueError, match=mono):
            function(waveform)
