"""Decoders: the right samples from the right place at the right level, on disk and in memory, whatever the format."""

from __future__ import annotations

import mmap
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from recordings import CODECS, FORMATS, RATES, cut, lag, noise, tone, write, write_with_ffmpeg

from bestrq2.data import ffmpeg
from bestrq2.data.audio import open_audio, random_crop, read_audio, read_span, resampled
from bestrq2.data.decoders import open_decoder
from bestrq2.data.places import AudioBytes, UnreadableAudioError
from bestrq2.errors import AudioError

KINDS = sorted({*FORMATS, *CODECS})
# Bare AAC does not state how much the encoder put in front: one frame.
DELAYS = {"aac": 1024 / 16_000}


def peak_hz(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 1 << 18))
    return float(np.argmax(spectrum)) * rate / (1 << 18)


def outcome(audio) -> np.ndarray | str:
    """The waveform, or the error without the name."""
    try:
        return read_audio(audio, 16_000)
    except AudioError as error:
        return str(error).removeprefix(f"{audio}: ")


@pytest.mark.parametrize(
    ("kind", "rate"), [*((kind, RATES.get(kind, 44_100)) for kind in KINDS), ("wav", 8_000), ("m4a", 8_000)]
)
def test_a_tone_keeps_its_pitch_and_level_through_every_format(tmp_path, kind, rate):
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
    path = write(tmp_path / f"noise.{kind}", noise(12, rate), rate)
    whole = resampled(noise(12, rate), rate, 16_000)
    delay = round(DELAYS.get(kind, 0.0) * 16_000)
    for start in (0.1 if delay else 0.0, 0.3, 5.123, 9.9):
        part = read_audio(path, 16_000, start_seconds=start, seconds=2.0)
        assert len(part) == 32_000
        # 1 ms: the time stamps of Matroska and WebM.
        assert abs(lag(part, whole, round(start * 16_000)) + delay) <= 16, start


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        *((kind, 44_100) for kind in ("wav", "flac", "mp3", "ogg", "m4a", "lame.mp3")),
        *((kind, rate) for kind in ("wav", "lame.mp3") for rate in (8_000, 16_000)),
        *(("wav", 22_051), ("m4a", 22_050)),
    ],
)
def test_a_part_equals_that_part_of_the_whole(tmp_path, kind, rate):
    path = write(tmp_path / f"noise.{kind}", noise(12, rate), rate)
    wanted = 16_000
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


def test_rate_and_length_are_known_after_opening(tmp_path):
    path = write(tmp_path / "a.m4a", np.stack([noise(2, 44_100)] * 2), 44_100)
    with open_audio(path) as decoder:
        assert decoder.rate == 44_100
        assert 88_200 <= decoder.measure() < 88_200 + 1024


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
    original = ffmpeg._mono

    def counted(frame):
        nonlocal decoded
        decoded += frame.samples
        return original(frame)

    monkeypatch.setattr(ffmpeg, "_mono", counted)
    assert len(read_audio(path, 16_000, start_seconds=40.5, seconds=2)) == 32_000
    assert decoded < 4 * rate  # the file is decoded in blocks of 20 s


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
    assert len(read_audio(path)) == pytest.approx(320_000, abs=3000)
    with open_audio(path) as decoder:
        assert decoder.measure() == pytest.approx(320_000, abs=3000)


def test_what_is_not_audio_is_named(tmp_path, capfd):
    (tmp_path / "empty.wav").touch()
    for suffix in ("wav", "mp3"):
        (tmp_path / f"text.{suffix}").write_text("not audio\n" * 100)
    (tmp_path / "playlist.m4a").write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    for name, reason in {
        "empty.wav": "the file is empty (0 bytes).",
        "text.wav": "is not audio that libsndfile or FFmpeg can read.",
        "text.mp3": "is not audio that libsndfile or FFmpeg can read.",
        "playlist.m4a": "is not audio that libsndfile or FFmpeg can read.",
        "none.wav": "holds no samples.",
        "missing.wav": "the file does not exist.",
        "": "is a folder, expected an audio file.",
    }.items():
        with pytest.raises(AudioError) as error:
            read_audio(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {reason}"
    assert capfd.readouterr() == ("", "")


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
    with open_audio(path) as decoder:
        assert decoder.frames / decoder.rate == pytest.approx(6, abs=0.1)
    part = read_audio(path, 16_000, start_seconds=3.3, seconds=1.5)
    # AVI does not say how much the encoder put in front: two MP3 frames at most.
    assert abs(lag(part, resampled(waveform, 44_100, 16_000), round(3.3 * 16_000))) <= (900 if suffix == ".avi" else 16)


def test_a_live_stream_without_length_is_measured_and_cropped(tmp_path):
    path = write_with_ffmpeg(tmp_path / "live.webm", noise(30, 48_000), 48_000, "libopus", {"live": "1"})
    whole = resampled(noise(30, 48_000), 48_000, 16_000)
    with open_audio(path) as decoder:
        assert decoder.measure() == pytest.approx(30 * 48_000, abs=0.05 * 48_000)
        crop = random_crop(decoder, np.random.default_rng(3), 16_000, 2.0)
    assert len(crop) == 32_000
    assert abs(lag(read_audio(path, 16_000, 21.5, 2.0), whole, round(21.5 * 16_000))) <= 16


def test_a_damaged_middle_is_noticed(tmp_path):
    path = write(tmp_path / "a.flac", noise(4, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"damaged between 0\.0 and 4\.0 s"):
        read_audio(path)


def test_names_that_look_like_addresses_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_with_ffmpeg(tmp_path / "x.m4a", noise(1, 16_000), 16_000, "aac").rename("http:a b%20#?.m4a")
    assert len(read_audio("http:a b%20#?.m4a")) == pytest.approx(16_000, abs=1100)


@pytest.mark.parametrize("kind", KINDS)
def test_files_in_memory_are_read_as_those_on_disk(tmp_path, kind):
    rate = RATES.get(kind, 22_050)
    path = write(tmp_path / f"noise.{kind}", np.stack([noise(3, rate), noise(3, rate, 1)]), rate)
    for file in (path, cut(path)):
        audio = AudioBytes(f"x.tar/noise.{kind}", file.read_bytes())
        np.testing.assert_array_equal(outcome(audio), outcome(file))
    audio = AudioBytes(f"x.tar/noise.{kind}", path.read_bytes())
    part = read_audio(path, 16_000, start_seconds=1.2, seconds=0.5)
    np.testing.assert_array_equal(read_audio(audio, 16_000, 1.2, 0.5), part)
    with open_audio(path) as on_disk, open_audio(audio) as decoder:
        assert (decoder.rate, decoder.measure()) == (rate, on_disk.measure())


@pytest.mark.parametrize("content", [b"", b"no audio at all", b"RIFF", b"ID3" + bytes(100), b"\xff\xfb" * 60])
def test_bytes_that_are_not_audio_are_named(content):
    with pytest.raises(UnreadableAudioError, match=r"^x\.tar/a\.wav: "):
        open_decoder(AudioBytes("x.tar/a.wav", content))


def test_a_playlist_in_disguise_opens_no_file(tmp_path):
    secret = write(tmp_path / "secret.aac", noise(2, 16_000), 16_000)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile:{secret}\n#EXT-X-ENDLIST\n"
    for name in ("x.tar/a.m3u8", "x.tar/a.wav"):
        with pytest.raises(UnreadableAudioError, match=f"^{name}: "):
            open_decoder(AudioBytes(name, playlist.encode()))


@pytest.mark.parametrize("kind", ["flac", "wav", "m4a"])
def test_a_part_of_a_mapped_file_is_read_in_place(tmp_path, kind):
    path = write(tmp_path / f"noise.{kind}", noise(20, 16_000), 16_000)
    content = path.read_bytes()
    (tmp_path / "big").write_bytes(bytes(512) + content + bytes(512))
    with (tmp_path / "big").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    audio = AudioBytes("big", memoryview(mapped)[512 : 512 + len(content)])
    expected = read_audio(path, 16_000, 14.0, 1.0)
    np.testing.assert_array_equal(read_audio(audio, 16_000, 14.0, 1.0), expected)


@pytest.mark.parametrize("name", ["a.mp3", "b.m4a", "c.opus", "d.aac"])
def test_a_part_of_a_long_file_is_sought_and_equals_that_of_the_whole(tmp_path, monkeypatch, name):
    rate = 48_000 if name.endswith("opus") else 16_000
    path, read = write(tmp_path / name, noise(100, rate), rate), []
    packets = ffmpeg._packets
    with open_audio(path) as decoder:
        whole = decoder.read(0, None)
    monkeypatch.setattr(ffmpeg, "_packets", lambda container: (read.append(one) or one for one in packets(container)))
    with open_audio(path) as decoder:
        np.testing.assert_array_equal(decoder.read(90 * rate, rate), whole[90 * rate : 91 * rate])
    seconds = {"a.mp3": 576 / 16_000, "b.m4a": 1024 / 16_000, "c.opus": 0.02, "d.aac": 1024 / 16_000}[name]
    assert 10 < len(read) * seconds < 20  # the block from 80 s on, and a second or more before it
