"""What containers promise: headers as various writers leave them."""

from __future__ import annotations

import struct

import pytest
from recordings import noise, write, write_with_ffmpeg

from bestrq2.data.completeness import MP3_SLACK, SLACK_BYTES, declared_bytes, is_mpeg_audio


@pytest.mark.parametrize("kind", ["m4a", "webm", "mkv", "opus", "ogg", "caf"])
def test_a_whole_file_promises_its_size_and_no_more(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", noise(2, 48_000), 48_000)
    assert path.stat().st_size - SLACK_BYTES - 1 <= declared_bytes(path) <= path.stat().st_size


@pytest.mark.parametrize("kind", ["mp3", "lame.mp3"])
def test_an_mp3_header_counts_from_behind_the_id3_tag(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", noise(2, 44_100), 44_100)
    content = path.read_bytes()
    start = content.index(b"\xff\xfb")
    bare = content[start:]
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 72]) + bytes(200)
    path.write_bytes(tag + bare)
    assert declared_bytes(path) == pytest.approx(len(tag) + (1 - MP3_SLACK) * len(bare), abs=300)
    assert is_mpeg_audio(path)


def test_a_vbri_header_is_read(tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(b"\xff\xfb\x90\x00" + bytes(32) + b"VBRI" + bytes(6) + struct.pack(">I", 10_000) + bytes(60))
    assert declared_bytes(path) == 9900


def test_boxes_and_chunks_may_reach_to_the_end_or_be_followed_by_something_else(tmp_path):
    path = tmp_path / "a"
    head = struct.pack(">I4s8s", 16, b"ftyp", b"M4A ")
    for rest, promised in [
        (struct.pack(">I4sQ", 1, b"mdat", 5000), 16 + 5000),
        (struct.pack(">I4s", 0, b"mdat") + bytes(99), 16),
        (struct.pack(">I4s", 20, b"free") + bytes(12) + b"\x00\x01\x02\x03\xff\x00junk!", 16 + 20),
    ]:
        path.write_bytes(head + rest)
        assert declared_bytes(path) == promised - SLACK_BYTES
    path.write_bytes(b"caff\x00\x01\x00\x00" + struct.pack(">4sq", b"data", -1) + bytes(100))
    assert declared_bytes(path) == 8


def test_what_promises_nothing_is_left_alone(tmp_path):
    for number, content in enumerate(
        [b"", b"R", b"RIFF\x00\x00\x00\x00WAVE", b"\x1aE\xdf\xa3", b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" * 3]
    ):
        path = tmp_path / str(number)
        path.write_bytes(content)
        assert declared_bytes(path) is None
    live = write_with_ffmpeg(tmp_path / "live.webm", noise(1, 48_000), 48_000, "libopus", {"live": "1"})
    assert declared_bytes(live) is None


def test_bare_aac_is_not_taken_for_mp3(tmp_path):
    assert not is_mpeg_audio(write(tmp_path / "a.aac", noise(1, 16_000), 16_000))
    assert not is_mpeg_audio(write(tmp_path / "a.wav", noise(1, 16_000), 16_000))
