"""Audio: spans that tile the whole, random crops, arrays, and errors that name the recording."""

from __future__ import annotations

import re

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from recordings import lag, noise, write

from bestrq2.data import audio
from bestrq2.data.audio import array_decoder, check_usable, open_audio, random_crop, read_audio, read_span
from bestrq2.data.places import UnreadableAudioError
from bestrq2.errors import AudioError


def test_short_files_come_whole_and_a_part_ends_with_the_file(tmp_path):
    path = write(tmp_path / "short.wav", noise(0.2, 8_000), 8_000)
    assert len(read_audio(path, 16_000)) == 3200
    assert len(read_audio(path, 16_000, start_seconds=0.15, seconds=10)) == 800
    with pytest.raises(AudioError, match=r"short\.wav: nothing at 3 s, the file is 0\.20 s long"):
        read_audio(path, 16_000, start_seconds=3)


@pytest.mark.parametrize(
    "error", [MemoryError(), ValueError("array is too big"), RuntimeError("soxr"), OSError(5, "x")]
)
def test_whatever_is_raised_on_a_recording_becomes_its_audio_error(tmp_path, monkeypatch, error):
    path = write(tmp_path / "a.wav", noise(1, 8_000), 8_000)

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(soxr, "resample", failing)
    with pytest.raises(AudioError, match=rf"^{re.escape(str(path))}: cannot be (used|read) \(") as raised:
        read_audio(path, 16_000)
    assert raised.value.__cause__ is error
    monkeypatch.setattr(audio, "open_decoder", failing)
    with pytest.raises(AudioError, match=r"a\.wav: cannot be "):
        read_audio(path)


def test_nan_is_rejected_where_it_is(tmp_path):
    waveform = noise(4, 16_000)
    waveform[20_000] = np.nan
    path = write(tmp_path / "nan.float.wav", waveform, 16_000)
    with pytest.raises(AudioError, match=r"nan\.float\.wav: holds NaN or infinite samples\."):
        read_audio(path)
    assert len(read_audio(path, start_seconds=2)) == 32_000


def test_random_crops_cover_the_file_and_depend_on_the_generator_only(tmp_path):
    path = write(tmp_path / "a.flac", noise(20, 8_000), 8_000)
    whole = read_audio(path, 16_000)
    starts = []
    for seed in range(30):
        with open_audio(path) as decoder:
            crop = random_crop(decoder, np.random.default_rng(seed), 16_000, 5.0)
        assert len(crop) == 80_000
        starts.append(lag(crop, whole, 0, reach=len(whole)))
        np.testing.assert_allclose(crop, whole[starts[-1] : starts[-1] + 80_000], atol=1e-4)
    assert 0 <= min(starts) < 30_000
    assert 210_000 < max(starts) <= 240_000
    assert np.mean(starts) == pytest.approx(120_000, abs=30_000)


def test_silent_crops_are_drawn_again(tmp_path):
    waveform = np.zeros(16_000 * 40, np.float32)
    waveform[: 16_000 * 12] = noise(12, 16_000)
    path = write(tmp_path / "a.wav", waveform, 16_000)
    errors = []
    for seed in range(40):
        with open_audio(path) as decoder:
            try:
                assert np.abs(random_crop(decoder, np.random.default_rng(seed), 16_000, 2.0)).max() > 1e-3
            except AudioError as error:
                errors.append(error)
    assert all("is silent" in str(error) and not isinstance(error, UnreadableAudioError) for error in errors)
    # Sound is within reach of 12 s of 38: all five draws miss it with probability (26 / 38) ** 5 = 15 %.
    assert 1 <= len(errors) <= 13


def test_an_overstated_length_is_corrected_while_cropping(tmp_path):
    path = write(tmp_path / "a.webm", noise(6, 48_000), 48_000)
    with open_audio(path) as decoder:
        decoder.frames = 48_000 * 60
        crop = random_crop(decoder, np.random.default_rng(1), 16_000, 2.0)
        assert len(crop) == 32_000
        assert decoder.measure() == pytest.approx(48_000 * 6, abs=480)


def test_usable_means_something_to_hear():
    check_usable(1e-3 * noise(1, 16_000))
    for waveform, reason in [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros(100, np.float32), "silent"),
        (np.full(100, 0.3, np.float32), "silent"),
        (np.array([0.1, np.nan], np.float32), "NaN"),
        (np.array([0.1, -np.inf], np.float32), "NaN or infinite"),
    ]:
        with pytest.raises(AudioError, match=reason):
            check_usable(waveform)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(2, 3000),
    channels=st.integers(1, 2),
    from_rate=st.sampled_from([100, 1_001, 8_000, 11_025, 16_000, 44_100, 48_000, 192_000]),
    to_rate=st.sampled_from([8_000, 16_000, 24_000]),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]),
    data=st.data(),
)
def test_any_array_becomes_mono_at_the_wanted_rate(samples, channels, from_rate, to_rate, dtype, data):
    elements = {"min_value": -1.0, "max_value": 1.0} if np.dtype(dtype).kind == "f" else None
    samples = min(samples, 20 * from_rate)
    waveform = data.draw(hnp.arrays(dtype, (channels, max(samples, channels)), elements=elements))
    if waveform.shape[1] * to_rate / from_rate < 1:
        return
    mono = read_span(array_decoder(waveform, from_rate), 0, None, to_rate)
    assert mono.dtype == np.float32
    assert len(mono) == pytest.approx(waveform.shape[1] * to_rate / from_rate, abs=1)
    assert np.abs(mono).max() <= 2.0
    if from_rate == to_rate:
        scale = {"uint8": 128, "int16": 2**15, "int32": 2**31}.get(np.dtype(dtype).name, 1)
        centred = waveform.astype(np.float64) - (128 if dtype == np.uint8 else 0)
        np.testing.assert_allclose(mono, centred.mean(0) / scale, atol=1e-6)


def test_arrays_that_are_not_audio_are_refused():
    good = noise(1, 16_000)
    for waveform, rate, reason in [
        (good, 0, "sampling rate of 0 Hz is impossible, expected 100 to 10000000 Hz"),
        (good, 99, "sampling rate of 99 Hz"),
        (good, -5, "sampling rate of -5 Hz"),
        (good, float("nan"), "sampling rate of nan Hz"),
        (good[:0], 16_000, r"empty \(shape \[0\]\)"),
        (good[:, None], 16_000, "more channels than samples"),
        (good[None, None], 16_000, r"shape \[1, 1, 16000\] is not audio"),
        (np.float32(0.5), 16_000, "is not audio"),
        (np.arange(10), 16_000, "int64 have no defined full scale"),
        (np.array(["a", "b"]), 16_000, "no defined full scale"),
        (good * np.nan, 16_000, "NaN"),
    ]:
        with pytest.raises(AudioError, match=reason):
            read_span(array_decoder(waveform, rate), 0, None, 16_000)


def test_spans_tile_the_whole(tmp_path):
    path = write(tmp_path / "a.wav", noise(3, 44_100), 44_100)
    whole = read_audio(path, 16_000)
    with open_audio(path) as decoder:
        tiles = [read_span(decoder, start, 7_000, 16_000) for start in range(0, 48_000, 7_000)]
    np.testing.assert_allclose(np.concatenate(tiles), whole, atol=1e-5)
