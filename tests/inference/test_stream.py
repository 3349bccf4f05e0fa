"""Streams: frames of audio in chunks equal those of the whole, come when they are final, and need constant memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest
import torch

import bestrq2
from bestrq2 import Embedder
from bestrq2.errors import AudioError, ConfigError
from example_sounds import RATE, scene


@pytest.fixture(scope="module")
def embedder(tiny_encoder) -> Embedder:
    """Windows of 1 s and 10 frames of 0.1 s."""
    return Embedder(
        tiny_encoder(max_seconds=1.0, hop_length=200, patch_size=[16, 8], n_fft=1024, win_length=1024), "cpu"
    )


def cut(audio: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (audio[..., start : start + size] for start in range(0, audio.shape[-1], size))


def check_equal(embedder: Embedder, audio: np.ndarray, size: int, rate: float = RATE, **options: Any) -> None:
    whole = embedder.embed(audio, rate, **options)
    frames, moments = map(np.concatenate, zip(*embedder.stream(cut(audio, size), rate, **options), strict=True))
    np.testing.assert_allclose(frames, whole.frames[0], atol=1e-5)
    np.testing.assert_array_equal(moments, whole.timestamps[0])


@pytest.mark.parametrize("rate", [RATE, 44_100, 8_000])
@pytest.mark.parametrize("size", [1, 7, 160, 1_000, 16_000, 1_000_000])
def test_frames_of_chunks_of_any_size_are_those_of_the_whole(embedder, size, rate):
    check_equal(embedder, scene(min(5_000 * size, round(3.33 * rate))), size, rate)


@pytest.mark.parametrize("samples", [1, 7, 1_399, 9_000, 16_000, 17_399, 17_400, 17_401, 25_600])
def test_streams_of_any_length_end_like_the_whole(embedder, samples):
    check_equal(embedder, scene(samples), 500)


@pytest.mark.parametrize(
    "options", [{"phases": 3}, {"phases": 8, "overlap": 0.3}, {"overlap": 0, "normalize": True, "layers": "0+-1"},
                {"frequency": "concat", "phases": 2}],
)  # fmt: skip
@pytest.mark.parametrize("samples", [1_000, 24_000, 50_001])
def test_options_are_those_of_embed(embedder, options, samples):
    check_equal(embedder, scene(samples), 333, **options)


@pytest.mark.parametrize("recipe", ["best-rq-3-tiny", "best-rq-conformer-tiny", "best-rq-vit-tiny"])
def test_models_of_every_kind_stream_with_windows_of_any_length(recipe):
    embedder = bestrq2.load(recipe, "cpu")
    embedder.config.max_seconds = 2.5
    check_equal(embedder, scene(100_000), 3_000)
    assert embedder.latency_seconds < 3


def test_chunks_may_have_channels_any_type_and_no_samples(embedder):
    left, right = (np.round(32767 * scene(30_000, seed)).astype(np.int16) for seed in (0, 1))
    both = np.stack([left, right])
    expected = embedder.embed(both).frames[0]
    floats = torch.from_numpy(both / np.float32(32768))
    # The last chunk has fewer samples than channels.
    chunks = [both[:, :0], both[:, :9_000], floats[:, 9_000:20_000], np.zeros(0), both[:, 20_000:-1], both[:, -1:]]
    frames = np.concatenate([frames for frames, _ in embedder.stream(chunks)])
    np.testing.assert_allclose(frames, expected, atol=1e-5)


def test_one_array_may_be_filled_again_for_every_chunk(embedder):
    clip, buffer = scene(40_000), np.empty(1_000, np.float32)

    def refilled() -> Iterator[np.ndarray]:
        for chunk in cut(clip, 1_000):
            buffer[:] = chunk
            yield buffer

    frames = np.concatenate([frames for frames, _ in embedder.stream(refilled())])
    np.testing.assert_allclose(frames, embedder.embed(clip).frames[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"overlap": 0}, {"phases": 4}])
def test_a_frame_comes_with_the_sample_that_makes_it_final(embedder, options):
    clip, arrived = scene(80_000), 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal arrived
        for chunk in cut(clip, 100):
            arrived += len(chunk)
            yield chunk

    assert embedder.latency_seconds == pytest.approx(1.05 - 200 / RATE)
    for frames, moments in embedder.stream(chunks(), **options):
        if arrived < len(clip):
            assert len(frames) == 1
            assert arrived / RATE - moments[0] == pytest.approx(embedder.latency_seconds, abs=1e-9)
    assert moments[-1] > 4.9


def test_no_frame_is_final_a_sample_earlier(embedder):
    clip = scene(60_000)
    first = embedder.embed(clip).frames[0, 0]
    np.testing.assert_allclose(embedder.embed(clip[:17_400]).frames[0, 0], first, atol=1e-5)
    assert np.abs(embedder.embed(clip[:17_399]).frames[0, 0] - first).max() > 1e-3


def test_memory_does_not_grow_with_the_length_of_a_stream(embedder):
    """Of 30 s, which have 1.9 MB at the model's rate and 5.3 MB at their own, a few windows of 64 kB are held."""
    second = list(cut(scene(44_100), 1_000))
    tracemalloc.start()
    try:
        for _ in embedder.stream(chain.from_iterable(repeat(second, 30)), 44_100):
            assert tracemalloc.get_traced_memory()[0] < 600_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "there is no audio to embed: the stream holds no samples"),
        ([np.zeros(0)], "there is no audio to embed: the stream holds no samples"),
        ([scene(500), np.full(3, np.nan)], "chunks[1]: holds NaN or infinite samples."),
        ([scene(500), 1_000 * scene(500)], "far outside [-1, 1]"),
        ([np.stack([scene(500)] * 2).T], "chunks[0]: A waveform of shape [500, 2] has more channels than samples"),
        ([scene(500), np.stack([scene(500)] * 2)], "chunks[1]: has another number of channels (2)"),
        ([scene(500), b"1234"], "chunks[1]: a bytes is not audio"),
        ([scene(500), scene(500).reshape(1, 2, 250)], "chunks[1]: A waveform of shape [1, 2, 250] is not audio"),
        (scene(5), "chunks[0]: a float32 is not audio"),
    ],
)
def test_what_is_no_audio_is_refused_by_its_place(embedder, chunks, message):
    with pytest.raises(AudioError) as error:
        list(embedder.stream(chunks))
    assert message in str(error.value)


def test_arguments_are_checked_before_any_audio_is_read(embedder):
    for options in ({"sampling_rate": 0}, {"phases": 99}, {"overlap": 0.9}, {"layers": 7}):
        with pytest.raises(ConfigError):
            embedder.stream(iter([]), **options)


def test_an_error_of_the_source_is_its_own(embedder):
    def failing() -> Iterator[np.ndarray]:
        yield scene(500)
        raise TimeoutError("the socket is silent")

    with pytest.raises(TimeoutError, match="the socket is silent"):
        list(embedder.stream(failing(), 44_100))
