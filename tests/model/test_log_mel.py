"""The spectrogram: right by an independent calculation, and the same for a clip whatever it is batched with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq2 import BestRQ2Config
from bestrq2.model.log_mel import LogMel, mel_filters, reflect_index
from example_sounds import RATE, bursts, chirp, scene, scenes, tones

PATCH_SAMPLES = 15 * 625  # the shortest clip with a whole patch of 16 frames


def htk_filters(bands: int, low: float, high: float, n_fft: int, rate: int) -> np.ndarray:
    """Triangles whose corners are equally far apart on the HTK mel scale, float64 [n_fft / 2 + 1, bands]."""
    lowest, highest = 2595 * np.log10(1 + np.array([low, high]) / 700)
    corners = 700 * (10 ** (np.linspace(lowest, highest, bands + 2) / 2595) - 1)
    hertz = np.arange(n_fft // 2 + 1) * rate / n_fft
    filters = np.zeros((len(hertz), bands))
    for band, (left, peak, right) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        filters[:, band] = np.interp(hertz, [left, peak, right], [0, 1, 0])
    return filters


def log_mel_by_definition(waveform: np.ndarray, config: BestRQ2Config) -> np.ndarray:
    """The spectrogram of the paper (section 3) in float64, frame by frame."""
    n, hop = config.n_fft, config.hop_length
    window = np.zeros(n)
    start = (n - config.win_length) // 2
    turn = 2 * np.pi * np.arange(config.win_length) / config.win_length
    window[start : start + config.win_length] = 0.5 - 0.5 * np.cos(turn)
    padded = np.pad(waveform.astype(np.float64), n // 2, mode="reflect")
    frames = np.stack([padded[i : i + n] for i in range(0, len(padded) - n + 1, hop)])
    power = np.abs(np.fft.rfft(frames * window) / np.sqrt((window**2).sum())) ** 2
    filters = htk_filters(config.num_mel_bands, config.mel_min_hz, config.mel_max_hz, n, config.sampling_rate)
    return 10 * np.log10(np.maximum(power @ filters, 1e-10)).T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hop_length": 160, "n_fft": 512, "win_length": 400, "num_mel_bands": 80, "patch_size": [80, 4]},
        {"mel_min_hz": 50.0, "mel_max_hz": 7000.0, "num_mel_bands": 64},
        {"sampling_rate": 32_000, "n_fft": 1024, "win_length": 1024, "hop_length": 320, "mel_max_hz": 14_000.0},
    ],
    ids=["paper", "conformer", "narrower band", "32 kHz"],
)
def test_log_mel_follows_its_definition(changes):
    config = BestRQ2Config(**changes)
    waveform = scene(40_000, seed=3)
    log_mel, frames = LogMel(config)(torch.from_numpy(waveform)[None])
    expected = log_mel_by_definition(waveform, config)
    assert log_mel.shape == (1, *expected.shape)
    assert frames.tolist() == [1 + 40_000 // config.hop_length]
    np.testing.assert_allclose(log_mel[0].numpy(), expected, atol=0.01)


def test_the_bands_of_a_short_window_follow_those_of_the_long_one():
    changes = {"hop_length": 160, "patch_size": [24, 4]}
    both = BestRQ2Config(
        n_fft=1024, win_length=1024, num_mel_bands=72, short_win_length=400, short_mel_bands=24, **changes
    )
    waveform = scene(40_000, seed=3)
    found = LogMel(both)(torch.from_numpy(waveform)[None])[0][0].numpy()
    long = BestRQ2Config(n_fft=1024, win_length=1024, num_mel_bands=48, **changes)
    short = BestRQ2Config(n_fft=512, win_length=400, num_mel_bands=24, **changes)
    expected = np.concatenate([log_mel_by_definition(waveform, config) for config in (long, short)])
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_mel_filters_agree_with_filters_in_double_precision():
    found = mel_filters(2048, 128, 0.0, 8000.0, RATE, torch.device("cpu")).numpy()
    np.testing.assert_allclose(found, htk_filters(128, 0, 8000, 2048, RATE), atol=5e-5)


def test_a_tone_peaks_in_the_band_of_its_frequency():
    config = BestRQ2Config()
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    for band in (20, 60, 100):
        waveform = torch.from_numpy(tones(RATE, corners[band + 1])).float()[None]
        log_mel, _ = LogMel(config)(waveform)
        assert log_mel[0].mean(dim=1).argmax() == band


def test_ten_seconds_give_257_frames_and_four_times_the_amplitude_is_twelve_decibels_more():
    quiet = torch.from_numpy(chirp(10 * RATE) + bursts(10 * RATE)).float()[None] * 0.1
    module = LogMel(BestRQ2Config())
    log_mel, frames = module(quiet)
    assert log_mel.shape == (1, 128, 257)
    assert frames.tolist() == [257]
    louder, _ = module(quiet * 4)  # a power of two: no sample is rounded
    np.testing.assert_allclose((louder - log_mel).numpy(), 20 * np.log10(4), atol=1e-3)


def test_power_below_the_floor_is_minus_100_decibels():
    waveform = torch.zeros(1, 2 * RATE)
    waveform[:, :RATE] = torch.from_numpy(scene(RATE))
    log_mel, _ = LogMel(BestRQ2Config())(waveform)
    assert torch.all(log_mel[..., RATE // 625 + 3 :] == -100.0)
    assert log_mel.min() == -100.0


@pytest.mark.parametrize("length", [1, 2, 100, 1024, 1025, PATCH_SAMPLES - 1, PATCH_SAMPLES, PATCH_SAMPLES + 1, 23_456])
def test_frames_do_not_depend_on_samples_after_the_end(length):
    module = LogMel(BestRQ2Config())
    clip = torch.from_numpy(scene(length, seed=2))
    alone, frames_alone = module(clip[None])
    batch = torch.full((3, 30_000), float("nan"))
    batch[0, :length] = clip
    batch[1] = torch.from_numpy(scene(30_000, seed=5))
    batch[2, :12_000] = torch.from_numpy(scene(12_000, seed=6))
    together, frames = module(batch, torch.tensor([length, 30_000, 12_000]))
    assert torch.isfinite(together).all()
    assert frames.tolist() == [frames_alone.item(), 49, 20]
    inside = frames_alone.item()
    assert inside == max(16, 1 + length // 625)
    torch.testing.assert_close(together[0, :, :inside], alone[0, :, :inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 100, 5000, PATCH_SAMPLES - 1])
def test_a_clip_shorter_than_a_patch_is_reflected_until_it_fills_one(length):
    clip = scene(length, seed=4)
    period = np.concatenate([clip, clip[-2:0:-1]]) if length > 1 else clip
    continued = np.tile(period, 2 + PATCH_SAMPLES // len(period))[:PATCH_SAMPLES]
    module = LogMel(BestRQ2Config())
    short, frames = module(torch.from_numpy(clip)[None])
    filled, _ = module(torch.from_numpy(continued.copy())[None])
    assert (short.shape, frames.tolist()) == ((1, 128, 16), [16])
    # The last frames reach beyond the filled patch, where the two are reflected at different places.
    torch.testing.assert_close(short[..., :14], filled[..., :14], atol=1e-5, rtol=0)


@given(length=st.integers(1, 60), position=st.integers(-200, 300))
def test_reflection_folds_any_position_into_the_clip(length, position):
    found = int(reflect_index(torch.tensor([position]), length))
    reach = max(abs(position), abs(position - length)) + length
    clip = np.arange(length)
    padded = np.pad(clip, reach, mode="reflect") if length > 1 else np.zeros(2 * reach + 1, dtype=int)
    assert found == padded[reach + position]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 26_000), min_size=2, max_size=4), seed=st.integers(0, 9))
def test_batches_of_any_lengths_hold_what_each_clip_has_alone(lengths, seed):
    module = LogMel(BestRQ2Config())
    batch = torch.full((len(lengths), max(lengths)), float("inf"))
    for index, length in enumerate(lengths):
        batch[index, :length] = torch.from_numpy(scene(length, seed + index))
    together, frames = module(batch, torch.tensor(lengths))
    for index, length in enumerate(lengths):
        alone, _ = module(batch[index : index + 1, :length])
        count = int(frames[index])
        torch.testing.assert_close(together[index, :, :count], alone[0, :, :count], atol=1e-5, rtol=0)


def test_autocast_does_not_change_the_spectrogram():
    waveform = scenes(2, 20_000)
    module = LogMel(BestRQ2Config())
    expected, _ = module(waveform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = module(waveform)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_number_of_clips_does_not_change_a_clip():
    waveform = scenes(5, 20_000)
    module = LogMel(BestRQ2Config())
    together, _ = module(waveform)
    for index in range(5):
        alone, _ = module(waveform[index : index + 1])
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=0)


def test_a_waveform_without_samples_is_refused():
    with pytest.raises(ValueError, match="0 samples"):
        LogMel(BestRQ2Config())(torch.zeros(1, 0))


def test_the_spectrogram_adds_nothing_to_a_checkpoint():
    assert LogMel(BestRQ2Config()).state_dict() == {}
