"""One time axis per file: a part equals that part of the whole, and the whole is all that can be decoded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import CASES, lag, noise, tone, write, write_with_ffmpeg

from bestrq2.data.audio import AudioBytes, open_audio, read_audio
from bestrq2.errors import AudioError

CASE_FILES = json.loads((CASES / "audio" / "expected.json").read_text()) if CASES.is_dir() else []


def assert_parts_equal_the_whole(path: Path, whole: np.ndarray, parts: int, longest: int) -> None:
    """Parts at random places, from a new decoder or one that was used before, then all of it in blocks."""
    rng = random.Random(0)
    with open_audio(path) as used:
        for number in range(parts):
            start, count = rng.randrange(len(whole)), rng.randrange(1, longest)
            if number % 2:
                part = used.read(start, count)
            else:
                with open_audio(path) as fresh:
                    part = fresh.read(start, count)
            np.testing.assert_array_equal(part, whole[start : start + count], err_msg=f"{start} {count}")
    with open_audio(path) as decoder:
        blocks = [decoder.read(start, longest) for start in range(0, len(whole) + 2 * longest, longest)]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


@pytest.mark.skipif(not CASE_FILES, reason=f"no files in {CASES}; name their folder in BESTRQ2_CASES")
@pytest.mark.parametrize("case", CASE_FILES, ids=lambda case: case["file"])
def test_odd_files_give_the_samples_that_the_ffmpeg_program_gives(case):
    path = CASES / "audio" / case["file"]
    with open_audio(path) as decoder:
        assert decoder.rate == case["sampling_rate"]
        assert decoder.measure() == pytest.approx(case["samples"], abs=1152)
        whole = decoder.read(0, None)
        assert decoder.frames == len(whole)
        # Of joined Ogg files the FFmpeg program decodes 128 samples too many.
        assert len(whole) == pytest.approx(case["samples"], abs=128)
    levels = [np.sqrt(np.mean(np.square(eighth, dtype=np.float64))) for eighth in np.array_split(whole, 8)]
    np.testing.assert_allclose(levels, case["rms_of_eighths"], atol=3e-3)
    assert_parts_equal_the_whole(path, whole, parts=10, longest=50_000)


@pytest.mark.parametrize(
    "name", ["a.m4a", "a.webm", "a.opus", "a.ogg", "a.lame.mp3", "a.aac", "flac.mkv", "mp3.mkv", "ac3.mp4"]
)
def test_parts_of_a_file_of_several_blocks_equal_the_whole(tmp_path, name):
    rate = 48_000 if name.endswith(("webm", "opus", "ac3.mp4")) else 22_050
    # Loud noise, so that the AAC encoder replaces bands by a seed for noise of the decoder's own.
    content = 5 * noise(43, rate, highest_hz=9000.0)
    codec = {"flac.mkv": "flac", "mp3.mkv": "libmp3lame", "ac3.mp4": "ac3"}.get(name)
    path = write_with_ffmpeg(tmp_path / name, content, rate, codec) if codec else write(tmp_path / name, content, rate)
    with open_audio(path) as decoder:
        length = decoder.measure()
        whole = decoder.read(0, None)
    assert len(whole) == pytest.approx(len(content), abs=2400)
    assert length == pytest.approx(len(whole), abs=1152)
    delay = lag(whole[10_000:60_000], content, 10_000)
    assert lag(whole[-60_000:-10_000], content, len(whole) - 60_000) == delay
    assert_parts_equal_the_whole(path, whole, parts=6, longest=120_000)


def test_the_packets_of_ogg_vorbis_tell_its_length(tmp_path):
    bursts = np.arange(20 * 22_050) // 2_000 % 3 == 0  # so that packets are long and short
    path = write(tmp_path / "a.ogg", noise(20, 22_050) * bursts, 22_050)
    with open_audio(path) as decoder:
        assert decoder.frames == len(bursts)


@pytest.mark.parametrize(("seconds", "rate"), [(0.2, 8_000), (1.0, 16_000)])
def test_ogg_vorbis_of_a_single_page_has_the_length_of_what_is_decoded(tmp_path, seconds, rate):
    path = write(tmp_path / "short.ogg", noise(seconds, rate), rate)
    with open_audio(path) as decoder:
        assert decoder.measure() == len(decoder.read(0, None)) == pytest.approx(seconds * rate, abs=256)


def test_joined_mp3_files_are_read_to_the_end(tmp_path):
    first, second = noise(3, 16_000, seed=1), noise(21, 16_000, seed=2)
    parts = [write(tmp_path / f"{n}.mp3", x, 16_000).read_bytes() for n, x in enumerate((first, second))]
    path = tmp_path / "joined.mp3"
    for tag in (b"", b"ID3\x04\0\0\0\0\x02\x00" + bytes(256), bytes(5000), b"junk " * 300):
        path.write_bytes(parts[0] + tag + parts[1])
        with open_audio(path) as decoder:
            assert decoder.measure() == pytest.approx(24 * 16_000, abs=4000)
        whole = read_audio(path)
        assert len(whole) == pytest.approx(24 * 16_000, abs=4000)
        start = lag(whole[-16_000:], second, 20 * 16_000)
        assert abs(start) < 3000
        assert_parts_equal_the_whole(path, whole, parts=4, longest=30_000)


def test_junk_in_an_mp3_file_is_skipped_and_told(tmp_path):
    content = write(tmp_path / "a.lame.mp3", noise(6, 16_000), 16_000).read_bytes()
    path = tmp_path / "junk.mp3"
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"junk" * 200 + content[middle:])
    with open_audio(path) as decoder:
        found = len(decoder.read(0, None)) / 16_000
        announced, seconds = decoder.shortfall()
    assert found == pytest.approx(6, abs=0.2)
    assert seconds == pytest.approx(found, abs=1e-3)
    assert 0 < announced - seconds < 0.3


@pytest.mark.parametrize(
    ("kind", "rates"), [("ogg", (16_000, 16_000)), ("ogg", (16_000, 24_000)), ("opus", (48_000,) * 2)]
)
def test_chained_ogg_streams_are_read_to_the_end(tmp_path, kind, rates):
    hz = (300.0, 900.0)
    links = [
        write(tmp_path / f"{n}.{kind}", tone(3, r, h), r).read_bytes()
        for n, (r, h) in enumerate(zip(rates, hz, strict=True))
    ]
    path = tmp_path / f"chained.{kind}"
    path.write_bytes(b"".join(links))
    with open_audio(path) as decoder:
        rate = decoder.rate
        assert rate == rates[0]
        assert decoder.measure() == pytest.approx(6 * rate, abs=600)
    for start, expected in ((1.0, 300), (4.5, 900)):
        part = read_audio(path, rate, start, 1.0)
        assert np.argmax(np.abs(np.fft.rfft(part))) == expected
    assert_parts_equal_the_whole(path, read_audio(path, rate), parts=4, longest=20_000)


def test_a_flac_file_longer_than_its_header_says_is_read_to_the_end(tmp_path):
    path = write(tmp_path / "a.flac", noise(6, 16_000), 16_000)
    whole = read_audio(path)
    content = bytearray(path.read_bytes())
    for total in (40_000, 0):
        content[21:26] = bytes([content[21] & 0xF0]) + total.to_bytes(4, "big")
        path.write_bytes(content)
        np.testing.assert_array_equal(read_audio(path), whole)
        np.testing.assert_array_equal(read_audio(path, 16_000, 4.0, 1.0), whole[64_000:80_000])


def test_bytes_that_look_like_the_beginning_of_a_flac_frame_are_not_taken_for_one(tmp_path):
    path = write(tmp_path / "a.flac", noise(2, 16_000), 16_000)
    whole = read_audio(path)
    path.write_bytes(path.read_bytes() + b"\xff\xf8\x0c\x02" + bytes(16))  # a block size of code 0 is reserved
    np.testing.assert_array_equal(read_audio(path), whole)


@pytest.mark.parametrize("kind", ["wav", "aiff", "flac", "m4a"])
def test_a_file_shorter_than_announced_tells(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", noise(4, 16_000), 16_000)
    with open_audio(path) as decoder:
        decoder.read(0, None)
        assert decoder.shortfall() is None
    content = path.read_bytes()
    if kind == "m4a":  # FFmpeg puts the index last
        content = write_with_ffmpeg(path, noise(4, 16_000), 16_000, "aac", {"movflags": "faststart"}).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with open_audio(path) as decoder:
        found = len(decoder.read(0, None)) / 16_000
        assert decoder.shortfall() == (pytest.approx(4, abs=0.1), found)
    assert 1.5 < found < 2.5


@pytest.mark.parametrize(
    ("name", "rate", "codec", "format"),
    [
        ("a.al", 8_000, "pcm_alaw", "alaw"),
        ("a.ul", 8_000, "pcm_mulaw", "mulaw"),
        ("a.g722", 16_000, "g722", "g722"),
        ("a.wav", 16_000, "pcm_s64le", "wav"),
    ],
)
def test_speech_without_a_header_and_64_bit_pcm_are_read(tmp_path, name, rate, codec, format):
    content = noise(2, rate)
    path = write_with_ffmpeg(tmp_path / name, content, rate, codec, format=format)
    found = read_audio(path, rate)
    assert len(found) == pytest.approx(len(content), abs=64)
    assert abs(lag(found[4000:8000], content, 4000)) < 32
    assert np.std(found) == pytest.approx(np.std(content), rel=0.05)


def test_gsm_and_mp3_in_wav_and_a_tag_in_front_of_riff_are_read(tmp_path):
    content = noise(30, 8_000)
    soundfile.write(tmp_path / "gsm.wav", content, 8_000, format="WAV", subtype="GSM610")
    whole = read_audio(tmp_path / "gsm.wav", 8_000)
    assert abs(lag(whole[-8_000:], content, 29 * 8_000)) < 400
    assert_parts_equal_the_whole(tmp_path / "gsm.wav", whole, parts=4, longest=20_000)
    wav = write(tmp_path / "a.wav", content, 8_000).read_bytes()
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + wav
    (tmp_path / "tag.wav").write_bytes(tagged)
    for place in (tmp_path / "tag.wav", AudioBytes("tag.wav", tagged)):
        np.testing.assert_array_equal(read_audio(place, 8_000), read_audio(tmp_path / "a.wav", 8_000))


def test_the_headers_of_voc_blocks_are_not_taken_for_samples(tmp_path):
    content = noise(2, 16_000)
    path = write_with_ffmpeg(tmp_path / "a.voc", content, 16_000, "pcm_s16le")
    np.testing.assert_allclose(read_audio(path, 16_000), content, atol=1e-4)


@pytest.mark.parametrize("scale", [12_000.0, 1e30, float("inf"), float("nan")])
def test_float_samples_far_outside_full_scale_are_refused_by_name(tmp_path, scale):
    soundfile.write(tmp_path / "a.wav", (scale * noise(1, 16_000)).astype(np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: holds (samples of .* far outside|NaN or infinite)"):
        read_audio(tmp_path / "a.wav", 8_000)
    soundfile.write(tmp_path / "b.wav", 10 * noise(1, 16_000), 16_000, subtype="FLOAT")
    assert 1 < np.abs(read_audio(tmp_path / "b.wav", 8_000)).max() < 16


@pytest.mark.parametrize("rate", [1, 99])
def test_a_rate_below_100_hz_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", noise(1, 16_000), rate)
    with pytest.raises(AudioError, match=f"rate of {rate} Hz is impossible"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile a.wav\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.wav\n#EXT-X-ENDLIST\n"],
)
@pytest.mark.parametrize("name", ["list.ffconcat", "list.m3u8", "list.wav", "list.mp3"])
def test_a_playlist_is_refused_whatever_its_name(tmp_path, name, text):
    write(tmp_path / "a.wav", noise(1, 16_000), 16_000)
    (tmp_path / name).write_text(text)
    with pytest.raises(AudioError, match="is not audio"):
        read_audio(tmp_path / name)
