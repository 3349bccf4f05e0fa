"""Embeddings of arrays and files: the model's own numbers, whatever form and length the audio has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bestrq2
from bestrq2 import Embedder
from bestrq2.convert.loading import random_encoder
from bestrq2.errors import ConfigError
from example_sounds import RATE, scene

WINDOW = 40_000  # 2.5 s: four frames of 0.625 s
HOP = 10_000


@pytest.fixture(scope="module")
def embedder(tiny_encoder) -> Embedder:
    return Embedder(tiny_encoder(max_seconds=2.5), "cpu")


def wav(path: Path, waveform: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, waveform.T, rate, subtype="FLOAT")
    return path


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_embeddings_are_the_models_own_states(embedder):
    clip = scene(WINDOW)
    embeddings = embedder.embed(clip, RATE)
    with torch.no_grad():
        output = embedder.model(torch.from_numpy(clip)[None])
    assert embeddings.frames.shape == (1, 4, 32)
    assert (embeddings.clip.dtype, embeddings.frames.dtype) == (np.float32, np.float32)
    close(embeddings.frames, output.last_hidden_state.numpy())
    close(embeddings.clip, output.pooler_output.numpy())
    assert embeddings.timestamps[0].tolist() == [0.3125, 0.9375, 1.5625, 2.1875]
    assert embeddings.frame_mask.all()
    assert len(embeddings) == 1
    assert embedder.hop_seconds == 0.625


def test_a_list_gives_what_each_clip_gives_alone(embedder):
    clips = [scene(length, index) for index, length in enumerate([WINDOW, 12_000, 100, 93_000, 1, 39_375])]
    together = embedder.embed(clips)
    assert together.frame_mask.sum(axis=1).tolist() == [4, 1, 1, 9, 1, 4]
    assert together.frames.shape == (6, 9, 32)
    for index, clip in enumerate(clips):
        alone = embedder.embed(clip)
        count = alone.frames.shape[1]
        close(together.clip[index], alone.clip[0])
        close(together.frames[index, :count], alone.frames[0])
        assert np.array_equal(together.timestamps[index, :count], alone.timestamps[0])
        assert np.all(together.frames[index, count:] == 0)
        assert np.all(np.isnan(together.timestamps[index, count:]))
        assert not together.frame_mask[index, count:].any()


def test_integers_stereo_tensors_and_numbers_are_taken(embedder):
    clip = scene(30_000)
    expected = embedder.embed(clip).frames
    close(embedder.embed(np.round(clip * 32767.0).astype(np.int16)).frames, expected, 2e-2)
    sixteen = (clip * 32768).astype(np.int16)
    close(embedder.embed(sixteen).frames, embedder.embed(sixteen / np.float32(32768)).frames)
    close(embedder.embed(torch.from_numpy(clip)).frames, expected)
    close(embedder.embed(clip.astype(np.float64)).frames, expected)
    close(embedder.embed(clip.tolist()).frames, expected)
    left, right = scene(30_000, 1), scene(30_000, 2)
    close(embedder.embed(np.stack([left, right])).frames, embedder.embed((left + right) / 2).frames, 1e-4)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(embedder, rate):
    clip = scene(2 * rate)
    expected = soxr.resample(clip, rate, RATE, quality="HQ")
    close(embedder.embed(clip, rate).frames, embedder.embed(expected).frames)
    assert np.abs(embedder.embed(clip, rate).clip - embedder.embed(clip).clip).max() > 0.01


def test_a_file_gives_what_its_samples_give(embedder, tmp_path):
    clip = scene(30_000)
    path = wav(tmp_path / "clip.wav", clip)
    expected = embedder.embed(clip).frames
    for form in (path, str(path)):
        close(embedder.embed(form).frames, expected)
    stereo = wav(tmp_path / "stereo.wav", np.stack([scene(66_150, 1), scene(66_150, 2)]), 44_100)
    samples = soxr.resample((scene(66_150, 1) + scene(66_150, 2)) / 2, 44_100, RATE, quality="HQ")
    mixed = embedder.embed([stereo, path], sampling_rate=8_000)  # files carry their own rate
    close(mixed.frames[0, : int(mixed.frame_mask[0].sum())], embedder.embed(samples).frames[0], 1e-4)
    close(mixed.frames[1, : int(mixed.frame_mask[1].sum())], expected[0])


@pytest.mark.parametrize("phases", [1, 3, 4])
@pytest.mark.parametrize(("rate", "seconds"), [(16_000, 35.0), (44_100, 12.9), (16_000, 10.1), (8_000, 7.5)])
def test_a_long_file_gives_what_its_samples_give(embedder, tmp_path, phases, rate, seconds):
    waveform = scene(round(seconds * rate))
    path = wav(tmp_path / "long.wav", waveform, rate)
    from_file, from_array = embedder.embed(path, phases=phases), embedder.embed(waveform, rate, phases)
    assert from_file.frames.shape == from_array.frames.shape
    assert np.array_equal(from_file.timestamps, from_array.timestamps)
    close(from_file.frames, from_array.frames, 1e-3)


@pytest.mark.parametrize("samples", [WINDOW, 3 * WINDOW, 57_000])
@pytest.mark.parametrize("phases", [2, 4, 16])
def test_phases_interleave_shifted_grids(embedder, samples, phases):
    clip = scene(samples)
    coarse, fine = embedder.embed(clip), embedder.embed(clip, phases=phases)
    close(fine.frames[0, ::phases][: coarse.frames.shape[1]], coarse.frames[0])
    steps = np.diff(fine.timestamps[0])
    assert steps == pytest.approx(np.full(len(steps), 0.625 / phases), abs=1e-9)
    assert fine.timestamps[0, 0] == 0.3125
    frames = coarse.frames.shape[1]
    assert phases * (frames - 1) < fine.frames.shape[1] <= phases * (frames + 1)
    assert fine.timestamps[0, -1] + 0.3125 <= samples / RATE + 0.04  # a patch of 16 frames ends one frame early
    for phase in range(1, phases):
        shifted = embedder.embed(clip[phase * HOP // phases :])
        own = fine.frames[0, phase::phases]
        close(own, shifted.frames[0, : len(own)])
        assert len(own) >= shifted.frames.shape[1] - 1


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 130_000), phases=st.integers(1, 16))
def test_frames_of_any_clip_lie_inside_it_and_are_evenly_spaced(embedder, samples, phases):
    embeddings = embedder.embed(scene(samples), phases=phases)
    if phases == 1:
        expected = max(1, (1 + samples // 625) // 16)
        assert embeddings.timestamps[0] == pytest.approx(0.3125 + 0.625 * np.arange(expected))
    assert np.all(np.diff(embeddings.timestamps[0]) > 0.0385)  # 625 samples at the least
    assert np.isfinite(embeddings.frames).all()
    assert embeddings.frame_mask.all()
    if samples >= HOP:
        assert embeddings.timestamps[0].max() + 0.3125 <= samples / RATE + 0.04


@pytest.mark.parametrize("phases", [0, -1, 17, 1.5, "2", None, True])
def test_impossible_phases_are_refused(embedder, phases):
    with pytest.raises(ConfigError, match=f"phases must be a whole number from 1 to 16, got {phases!r}"):
        embedder.embed(scene(WINDOW), phases=phases)


def test_patches_one_frame_wide_work_for_long_files_too(tiny_encoder, tmp_path):
    narrow = Embedder(tiny_encoder(patch_size=[128, 1], max_seconds=1.0, position_embedding="rope_time"), "cpu")
    waveform = scene(4 * 26 * 625)  # a whole number of windows of 26 frames
    from_file = narrow.embed(wav(tmp_path / "long.wav", waveform))
    assert from_file.frames.shape == (1, 105, 32)  # as many as its spectrogram has
    close(from_file.frames, narrow.embed(waveform).frames)


def test_random_encoders_are_those_of_their_seed_and_leave_others_randomness_alone(tiny_config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = random_encoder(tiny_config(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = random_encoder(tiny_config(), seed=3), random_encoder(tiny_config(), seed=4)
    assert torch.equal(first.patch_embedding.weight, again.patch_embedding.weight)
    assert not torch.equal(first.patch_embedding.weight, other.patch_embedding.weight)


def test_an_embedder_and_embeddings_say_what_they_are():
    embedder = bestrq2.load("best-rq-2-tiny", "cpu")
    assert repr(embedder) == "Embedder('best-rq-2-tiny', cpu, 192 values per frame, 1.6 frames per second)"
    assert repr(embedder.embed(scene(32_000))).startswith("Embeddings(clip [1, 192], frames [1, ")
