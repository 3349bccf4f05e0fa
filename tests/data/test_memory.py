"""Audio files in memory are read as those on disk are."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from recordings import CODECS, FORMATS, RATES, cut, noise, write

from bestrq2.data.audio import open_audio, read_audio
from bestrq2.data.decoders import AudioBytes, UnreadableAudioError, open_decoder
from bestrq2.errors import AudioError

KINDS = sorted({*FORMATS, *CODECS})


def in_memory(path, name="shard.tar/clip.wav"):
    return AudioBytes(name, path.read_bytes())


def outcome(audio):
    """The waveform, or what is said of it without its name."""
    try:
        return read_audio(audio, 16_000)
    except AudioError as error:
        return str(error).removeprefix(f"{audio}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_samples_from_memory_as_from_disk(tmp_path, kind):
    rate = RATES.get(kind, 22_050)
    path = write(tmp_path / f"noise.{kind}", np.stack([noise(2, rate), noise(2, rate, 1)]), rate)
    audio = in_memory(path, f"x.tar/noise.{kind}")
    np.testing.assert_array_equal(read_audio(audio, 16_000), read_audio(path, 16_000))
    part = read_audio(path, 16_000, start_seconds=1.2, seconds=0.5)
    np.testing.assert_array_equal(read_audio(audio, 16_000, 1.2, 0.5), part)
    with open_audio(path) as on_disk, open_audio(audio) as decoder:
        assert (decoder.rate, decoder.channels, decoder.measure()) == (rate, 2, on_disk.measure())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_ends_early_is_read_in_memory_as_on_disk(tmp_path, kind):
    rate = RATES.get(kind, 22_050)
    path = cut(write(tmp_path / f"noise.{kind}", noise(4, rate), rate))
    found, expected = outcome(in_memory(path, f"x.tar/noise.{kind}")), outcome(path)
    if isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("content", [b"", b"no audio at all", b"RIFF", b"ID3" + bytes(100), b"\xff\xfb" * 60])
def test_what_is_no_audio_is_named(content):
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
    path = write(tmp_path / f"noise.{kind}", noise(60, 16_000), 16_000)
    content = path.read_bytes()
    (tmp_path / "big").write_bytes(bytes(512) + content + bytes(512))
    with (tmp_path / "big").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    audio = AudioBytes("big", memoryview(mapped)[512 : 512 + len(content)])
    expected = read_audio(path, 16_000, 40.0, 1.0)
    np.testing.assert_array_equal(read_audio(audio, 16_000, 40.0, 1.0), expected)
