"""Decoding: the right sound, from the right place, at the right level, whatever the file."""

from __future__ import annotations

import re
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from recordings import CODECS, FORMATS, RATES, cut, lag, noise, tone, write, write_with_ffmpeg

from bestrq2.data import audio
from bestrq2.data.audio import (
    as_mono,
    audio_info,
    check_usable,
    open_audio,
    random_crop,
    read_audio,
    read_span,
    resampled,
)
from bestrq2.data.decoders import FFmpegDecoder, UnreadableAudioError
from bestrq2.errors import AudioError

KINDS = sorted({*FORMATS, *CODECS})
# Bare AAC does not say how much the encoder put in front: one frame.
DELAYS = {"aac": 1024 / 16_000}


def peak_hz(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 1 << 18))
    return float(np.argmax(spectrum)) * rate / (1 << 18)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_a_tone_keeps_its_pitch_and_level_through_every_format(tmp_path, kind, rate):
    rate = RATES.get(kind, rate)
    path = write(tmp_path / f"tone.{kind}", np.stack([tone(3, rate), tone(3, rate, peak=0.3)]), rate)
    waveform = read_audio(path, 16_000)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert abs(len(waveform) - 48_000) <= 3 * 1024 * 16_000 / rate
    middle = waveform[8_000:40_000]
    # LAME as FFmpeg calls it turns the level down to 95 %.
    assert peak_hz(middle, 16_000) == pytest.approx(440, abs=0.5)
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.4, rel=0.06 if kind == "lame.mp3" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_comes_from_where_it_was_asked_for(tmp_path, kind):
    rate = RATES.get(kind, 16_000)
    path = write(tmp_path / f"noise.{kind}", noise(20, rate), rate)
    whole = resampled(noise(20, rate), rate, 16_000)
    delay = round(DELAYS.get(kind, 0.0) * 16_000)
    for start in (0.1 if delay else 0.0, 0.3, 7.123, 17.9):
        part = read_audio(path, 16_000, start_seconds=start, seconds=2.0)
        assert len(part) == 32_000
        # 1 ms: the time stamps of Matroska and WebM.
        assert abs(lag(part, whole, round(start * 16_000)) + delay) <= 16, start


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "m4a", "lame.mp3"])
@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (8_000, 16_000), (16_000, 16_000), (22_051, 16_000)])
def test_a_part_equals_that_part_of_the_whole(tmp_path, kind, rate, wanted):
    rate = {22_051: 22_050}.get(rate, rate) if kind in ("mp3", "lame.mp3", "m4a") else rate
    path = write(tmp_path / f"noise.{kind}", noise(12, rate), rate)
    whole = read_audio(path, wanted)
    for start in (0.0, 3.21, 9.5):
        part = read_audio(path, wanted, start_seconds=start, seconds=1.5)
        first = round(start * wanted)
        np.testing.assert_allclose(part, whole[first : first + len(part)], atol=2e-5)


def test_stereo_is_averaged_and_integers_are_scaled(tmp_path):
    left, right = noise(1, 16_000, 1), noise(1, 16_000, 2)
    for kind, tolerance in {"wav": 4e-5, "s24.wav": 2e-7, "u8.wav": 1e-2, "float.wav": 1e-7}.items():
        path = write(tmp_path / f"a.{kind}", np.stack([left, right]), 16_000)
        np.testing.assert_allclose(read_audio(path), (left + right) / 2, atol=tolerance)


def test_header_says_rate_channels_and_length(tmp_path):
    path = write(tmp_path / "a.m4a", np.stack([noise(2, 44_100)] * 2), 44_100)
    info = audio_info(path)
    assert (info.sampling_rate, info.channels, info.frames, info.seconds) == (44_100, 2, 88_200, 2.0)
    assert audio_info(write(tmp_path / "a.aac", noise(2, 16_000), 16_000)).frames is None


def test_short_files_come_whole_and_a_part_ends_with_the_file(tmp_path):
    path = write(tmp_path / "short.wav", noise(0.2, 8_000), 8_000)
    assert len(read_audio(path, 16_000)) == 3200
    assert len(read_audio(path, 16_000, start_seconds=0.15, seconds=10)) == 800
    with pytest.raises(AudioError, match=r"short\.wav: nothing at 3 s, the file is 0\.20 s long"):
        read_audio(path, 16_000, start_seconds=3)


@pytest.mark.parametrize("kind", ["flac", "ogg"])
def test_of_a_long_file_libsndfile_decodes_only_the_part(tmp_path, monkeypatch, kind):
    rate = 8_000
    path = tmp_path / f"long.{kind}"
    second = noise(10, rate)
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for _ in range(20):
            file.write(second)
    decoded = 0
    original = soundfile.SoundFile.read

    def counted(self, frames=-1, *args, **kwargs):
        nonlocal decoded
        block = original(self, frames, *args, **kwargs)
        decoded += len(block)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    part = read_audio(path, 16_000, start_seconds=153.0, seconds=4)
    assert len(part) == 64_000
    assert decoded < 5 * rate
    assert abs(lag(part, resampled(second, rate, 16_000), 3 * 16_000)) <= 1


@pytest.mark.parametrize("kind", ["m4a", "webm", "mp3", "lame.mp3"])
def test_of_a_long_file_ffmpeg_decodes_only_the_part(tmp_path, monkeypatch, kind):
    rate = RATES.get(kind, 8_000)
    path = write(tmp_path / f"long.{kind}", noise(60, rate), rate)
    decoded = 0
    original = FFmpegDecoder._mono

    def counted(self, frame):
        nonlocal decoded
        decoded += frame.samples
        return original(self, frame)

    monkeypatch.setattr(FFmpegDecoder, "_mono", counted)
    assert len(read_audio(path, 16_000, start_seconds=40, seconds=2)) == 32_000
    assert decoded < 9 * rate  # WebM can only be entered every five seconds


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("m4a", "mp4")])
def test_a_file_that_ends_early_is_used_as_far_as_it_goes(tmp_path, kind):
    rate = RATES.get(kind, 16_000)
    whole = write(tmp_path / f"a.{kind}", noise(4, rate), rate)
    path, expected = cut(whole), read_audio(whole)
    found = read_audio(path)
    assert 1.4 < len(found) / 16_000 < 2.6
    np.testing.assert_allclose(found[:-2000], expected[: len(found) - 2000], atol=2e-5)
    with open_audio(path) as decoder:
        assert len(random_crop(decoder, np.random.default_rng(1), 16_000, 1.0)) == 16_000
    assert abs(lag(read_audio(path, start_seconds=0.7, seconds=0.5), found, 11_200)) <= 16
    with open_audio(path) as decoder:
        assert not len(read_span(decoder, 48_000, 8_000, 16_000))
        assert abs(decoder.measure() - len(found) * rate / 16_000) < 0.3 * rate  # a packet


def test_an_mp4_file_without_its_index_is_not_audio(tmp_path):
    with pytest.raises(UnreadableAudioError, match="is not audio"):
        read_audio(cut(write(tmp_path / "a.m4a", noise(4, 16_000), 16_000)))


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
        audio_info(path)


def test_a_wav_written_into_a_pipe_is_whole(tmp_path):
    path = write(tmp_path / "a.wav", noise(1, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    for promised in (0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF):
        content[40:44] = promised.to_bytes(4, "little")
        path.write_bytes(content)
        assert len(read_audio(path)) == 16_000


def test_an_mp3_without_length_header_is_measured(tmp_path):
    loud_late = noise(20, 16_000)
    loud_late[:160_000] *= 1e-3
    path = tmp_path / "vbr.mp3"
    soundfile.write(path, loud_late, 16_000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    second_frame = content.index(content[:2], 100)
    path.write_bytes(content[second_frame:])
    assert audio_info(path).frames is None
    assert len(read_audio(path)) == pytest.approx(320_000, abs=3000)
    with open_audio(path) as decoder:
        assert decoder.measure() == pytest.approx(320_000, abs=3000)


def test_what_is_not_audio_is_named(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio\n" * 100)
    (tmp_path / "playlist.m4a").write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    for name, reason in {
        "empty.wav": "the file is empty (0 bytes).",
        "text.wav": "is not audio that libsndfile or FFmpeg can read.",
        "playlist.m4a": "is not audio that libsndfile or FFmpeg can read.",
        "none.wav": "holds no samples.",
        "missing.wav": "the file does not exist.",
        "": "is a folder, expected an audio file.",
    }.items():
        with pytest.raises(AudioError) as error:
            read_audio(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {reason}"


def test_a_video_without_sound_is_rejected(tmp_path):
    path = tmp_path / "silent-film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="holds no audio track"):
        read_audio(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_the_sound_of_a_video_is_read(tmp_path, suffix):
    path = tmp_path / f"film{suffix}"
    waveform = noise(6, 44_100)
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("libmp3lame", rate=44_100)
        audio.layout = "mono"
        for second in range(6):
            for _ in range(10):
                image = np.random.default_rng(second).integers(0, 255, (64, 64, 3), np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            piece = waveform[None, second * 44_100 : (second + 1) * 44_100]
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, second * 44_100, Fraction(1, 44_100)
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    assert audio_info(path).seconds == pytest.approx(6, abs=0.1)
    part = read_audio(path, 16_000, start_seconds=3.3, seconds=1.5)
    # AVI does not say how much the encoder put in front: two MP3 frames at most.
    assert abs(lag(part, resampled(waveform, 44_100, 16_000), round(3.3 * 16_000))) <= (900 if suffix == ".avi" else 16)


def test_a_live_stream_without_length_is_measured_and_cropped(tmp_path):
    path = write_with_ffmpeg(tmp_path / "live.webm", noise(30, 48_000), 48_000, "libopus", {"live": "1"})
    whole = resampled(noise(30, 48_000), 48_000, 16_000)
    assert audio_info(path).frames is None
    with open_audio(path) as decoder:
        assert decoder.measure() == pytest.approx(30 * 48_000, abs=0.05 * 48_000)
        crop = random_crop(decoder, np.random.default_rng(3), 16_000, 2.0)
    assert len(crop) == 32_000
    assert abs(lag(read_audio(path, 16_000, 21.5, 2.0), whole, round(21.5 * 16_000))) <= 16


def test_nan_is_rejected_where_it_is(tmp_path):
    waveform = noise(4, 16_000)
    waveform[20_000] = np.nan
    path = write(tmp_path / "nan.float.wav", waveform, 16_000)
    with pytest.raises(AudioError, match=r"nan\.float\.wav: holds NaN or infinite samples\."):
        read_audio(path)
    assert len(read_audio(path, start_seconds=2)) == 32_000


def test_a_damaged_middle_is_noticed(tmp_path):
    path = write(tmp_path / "a.flac", noise(4, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"damaged at about|truncated"):
        read_audio(path)


def test_names_that_look_like_addresses_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_with_ffmpeg(tmp_path / "x.m4a", noise(1, 16_000), 16_000, "aac").rename("http:a b%20#?.m4a")
    assert len(read_audio("http:a b%20#?.m4a")) == pytest.approx(16_000, abs=1100)


def test_random_crops_cover_the_file_and_depend_on_the_generator_only(tmp_path):
    path = write(tmp_path / "a.flac", noise(20, 8_000), 8_000)
    whole = read_audio(path, 16_000)
    starts = []
    for seed in range(60):
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
    from_rate=st.sampled_from([1, 7, 8_000, 11_025, 16_000, 44_100, 48_000, 192_000]),
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
    mono = as_mono(waveform, from_rate, to_rate)
    assert mono.dtype == np.float32
    assert len(mono) == pytest.approx(waveform.shape[1] * to_rate / from_rate, abs=1)
    assert np.abs(mono).max() <= 2.0
    if from_rate == to_rate:
        scale = {"uint8": 128, "int16": 2**15, "int32": 2**31}.get(np.dtype(dtype).name, 1)
        centred = waveform.astype(np.float64) - (128 if dtype == np.uint8 else 0)
        np.testing.assert_allclose(mono, centred.mean(0) / scale, atol=1e-6)


def test_arrays_that_are_not_audio_are_refused():
    good = noise(1, 16_000)
    for waveform, rates, reason in [
        (good, (0, 16_000), "sampling rate of 0 Hz is impossible"),
        (good, (16_000, -5), "sampling rate of -5 Hz"),
        (good, (float("nan"), 16_000), "sampling rate of nan Hz"),
        (good[:0], (16_000, 16_000), r"empty \(shape \[0\]\)"),
        (good[:, None], (16_000, 16_000), "more channels than samples"),
        (good[None, None], (16_000, 16_000), r"shape \[1, 1, 16000\] is not audio"),
        (np.float32(0.5), (16_000, 16_000), "is not audio"),
        (np.arange(10), (16_000, 16_000), "int64 have no defined full scale"),
        (np.array(["a", "b"]), (16_000, 16_000), "no defined full scale"),
        (good * np.nan, (16_000, 16_000), "NaN"),
    ]:
        with pytest.raises(AudioError, match=reason):
            as_mono(waveform, *rates)


def test_spans_tile_the_whole(tmp_path):
    path = write(tmp_path / "a.wav", noise(3, 44_100), 44_100)
    whole = read_audio(path, 16_000)
    with open_audio(path) as decoder:
        tiles = [read_span(decoder, start, 7_000, 16_000) for start in range(0, 48_000, 7_000)]
    np.testing.assert_allclose(np.concatenate(tiles), whole, atol=1e-5)
