"""What an index finds in a tar: members, samples, and whatever is wrong."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import noise
from tars import clip, names, pack, shard

from bestrq2.data.audio import AUDIO_SUFFIXES
from bestrq2.data.shards import index as indexing
from bestrq2.data.shards.index import build_index, has_plain_name, load_index
from bestrq2.data.shards.members import BadShardError
from bestrq2.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


WAV, FLAC = clip(0.1), clip(0.1, kind="FLAC")


def problems(index):
    return {index.member(i): index.problems[index.problem[i]] for i in range(len(index)) if index.problem[i]}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_where_tarfile_finds_them(tmp_path, format):
    long = "l" * 60 + "/" + "n" * 90 if format == tarfile.USTAR_FORMAT else "l" * 150 + "/" + "n" * 120
    members = [
        ("a.wav", WAV),
        ("a.json", b"{}"),
        (f"{long}.flac", FLAC),
        (f"{long}.json", b'{"x": 1}'),
        ("b.txt", b"-"),
    ]
    tar = pack(tmp_path / "x.tar", members, format)
    index = build_index(tar)
    assert names(index) == ["a.wav", f"{long}.flac"]
    with tarfile.open(tar) as opened:
        places = {info.name: (info.offset_data, info.size) for info in opened}
    for i, name in enumerate(names(index)):
        assert (index.audio_offset[i], index.audio_length[i]) == places[name]
        assert (index.json_offset[i], index.json_length[i]) == places[name.rpartition(".")[0] + ".json"]
    assert index.sampling_rate.tolist() == [16_000, 0]
    assert index.frames.tolist() == [1600, 0]
    assert index.pcm_offset.tolist() == [index.audio_offset[0] + 44, 0]


def test_samples_of_plain_pcm_lie_where_the_index_says(tmp_path):
    tar = shard(tmp_path / "x.tar", [3, 4])
    index = build_index(tar)
    content = tar.read_bytes()
    for row, seed in enumerate((3, 4)):
        samples = np.frombuffer(content, "<i2", index.frames[row], index.pcm_offset[row])
        np.testing.assert_allclose(samples / 32768, noise(2, 16_000, seed), atol=1 / 32768)


def test_json_belongs_to_the_key_or_to_the_key_up_to_its_first_dot(tmp_path):
    members = [("a/1.x.wav", WAV), ("a/1.json", b"general"), ("b.y.wav", WAV), ("b.json", b"?"), ("b.y.json", b"own")]
    tar = pack(tmp_path / "x.tar", members)
    index, content = build_index(tar), tar.read_bytes()
    found = [
        content[start : start + length] for start, length in zip(index.json_offset, index.json_length, strict=True)
    ]
    assert found == [b"general", b"own"]


def test_hidden_members_and_folders_are_no_clips(tmp_path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as opened:
        folder = tarfile.TarInfo("folder.wav")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
        for name in ("./in/a.WAV", "in/._a.wav", ".wav", "wav", "in.wav/readme"):
            info = tarfile.TarInfo(name)
            info.size = len(WAV)
            opened.addfile(info, io.BytesIO(WAV))
    assert names(build_index(tar)) == ["in/a.WAV"]


def test_second_clips_of_a_key_and_names_that_lead_out_are_kept_apart(tmp_path):
    bad = ["../up.wav", "/etc/abs.wav", "in/../../up.wav", "C:\\x.wav", "..\\up.wav", "new\nline.wav"]
    members = [("a.wav", WAV), *((name, WAV) for name in bad), ("a.wav", FLAC), ("a.flac", FLAC), ("b.wav", WAV)]
    index = build_index(pack(tmp_path / "x.tar", members))
    assert len(index) == 10
    found = problems(index)
    assert found["a.flac"] == indexing.SECOND
    assert [index.problems[code] for code in index.problem] == [
        "",
        *[indexing.BAD_NAME] * len(bad),
        *[indexing.SECOND] * 2,
        "",
    ]
    for row in range(1, 7):
        assert index.member(row) == f"member at byte {index.audio_offset[row]}"


def test_links_and_sparse_members_are_no_audio_that_can_be_read_in_place(tmp_path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as opened:
        info = tarfile.TarInfo("a.wav")
        info.size = len(WAV)
        opened.addfile(info, io.BytesIO(WAV))
        for kind, name in ((tarfile.LNKTYPE, "hard.wav"), (tarfile.SYMTYPE, "soft.wav")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
        sparse = tarfile.TarInfo("holes.wav")
        sparse.size, sparse.pax_headers = (
            512,
            {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,9"},
        )
        sparse.pax_headers |= {"GNU.sparse.size": "5000"}
        opened.addfile(sparse, io.BytesIO(bytes(512)))
    found = problems(build_index(tar))
    assert found == {
        "hard.wav": "is a link; pack the file itself",
        "soft.wav": "is a link; pack the file itself",
        "holes.wav": "is stored as a sparse file; pack it without holes",
    }


@pytest.mark.parametrize(
    "name",
    ["a", "a/b", "ü", "a b", "a..b", "...", "a/..b"],
)
def test_plain_names_are_let_through(name):
    assert has_plain_name(name)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "..", "a/..", "a/../b", "\\\\host\\a", "C:\\a", "c:/a", "a\x00", "\x7f"]
)
def test_names_that_lead_elsewhere_are_not(name):
    assert not has_plain_name(name)


def header(name="a.wav", size=b"00000000100\0"):
    """A tar header whose size field holds these bytes, with a correct checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the tar is empty (0 bytes)"),
        (b"text" * 500, "is not a tar; give tars as"),
        (b"x" * 100, "is not a tar"),
        (bytes(10240), "the tar holds no members; expected .wav"),
        (b"\x1f\x8b\x08" + bytes(range(256)) * 4, "is compressed by gzip; unpack it"),
        (header() + bytes(512 + 1024), "the tar is empty? no: whole"),
        (header(size=b"77777777777\0") + bytes(2048), "is truncated: its member 'a.wav' reaches to byte 8,589,935,103"),
        (header(size=b"\xff" * 12) + bytes(2048), "is damaged at byte 0|is not a tar"),
        (header(size=b"\x80" + b"\xff" * 11) + bytes(2048), "is truncated: its member 'a.wav' reaches to byte"),
        (header(size=b"-0000000100\0") + bytes(2048), "is damaged at byte 0|is not a tar"),
        (header(size=b"hello world\0") + bytes(2048), "is not a tar"),
        (header() + bytes(512) + b"junk" * 128 + bytes(1024), "is damaged at byte 1,024: no header there"),
        (header() + bytes(512), "is truncated: after 1 member it ends at byte 1,024 without an end mark"),
        (header() + bytes(512) + header()[:300], "is truncated: after 1 member it ends at byte 1,324"),
        (header() + bytes(512 + 1024) + header() + bytes(1536), "goes on behind the end mark at byte 1,024"),
        (header("x" * 90) + bytes(512 + 1024), "the tar holds 1 member and none with an audio suffix"),
    ],
)
def test_what_is_wrong_with_a_tar_is_named(tmp_path, content, reason):
    tar = tmp_path / "x.tar"
    tar.write_bytes(content)
    if "whole" in reason:
        assert names(build_index(tar)) == ["a.wav"]
        return
    with pytest.raises(BadShardError) as error:
        build_index(tar)
    assert str(error.value).startswith(f"{tar}: ")
    assert any(part in str(error.value) for part in reason.split("|"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (b"", "truncated: after 3 members it ends at byte 3,072 without an end mark"),
        (header("d.wav")[:300], "truncated: after 3 members it ends at byte 3,372 without an end mark"),
        (header("d.wav", size=b"00000010000\0") + bytes(512), "truncated: its member 'd.wav' reaches to byte 7,680"),
        (b"junk" * 128 + bytes(1024), "damaged at byte 3,072: no header there"),
    ],
)
def test_of_a_tar_that_breaks_off_the_clips_before_are_indexed_and_one_entry_names_the_damage(tmp_path, rest, reason):
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"".join(header(name) + bytes(512) for name in ("a.wav", "b.wav", "c.json")) + rest)
    for _ in range(2):
        index = load_index(tar)
        assert names(index)[:2] == ["a.wav", "b.wav"]
        assert index.problem.tolist() == [0, 0, 1]
        assert index.damages().tolist() == [2]
        assert reason in index.problems[1]
        assert index.problems[1].endswith("; copy or download it again; only its 2 clips before that can be used")
    with pytest.raises(BadShardError, match=reason):
        build_index(tar)


def test_a_header_that_claims_gigabytes_is_not_read_into_memory(tmp_path):
    block = bytearray(header("././@LongLink", size=b"77777777777\0"))
    block[156:157] = b"L"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x.tar").write_bytes(header() + bytes(512) + bytes(block) + bytes(4096))
    with pytest.raises(BadShardError, match="damaged at byte 1,024"):
        build_index(tmp_path / "x.tar")


def test_missing_and_unreadable_tars_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar: the shard does not exist; check the list or pattern"):
        build_index(tmp_path / "gone.tar")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError, match=r"folder\.tar: "):
        build_index(tmp_path / "folder.tar")


KEYS = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n"), min_size=1, max_size=130)


KINDS = st.sampled_from([("wav", WAV), ("flac", FLAC), ("json", b'{"a": 1}'), ("txt", b"text"), ("MP3", b"?")])


MEMBERS = st.lists(
    st.tuples(st.lists(KEYS, min_size=1, max_size=3), KINDS, st.integers(0, 700)), min_size=1, max_size=6
)


FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=MEMBERS,
    format=FORMATS,
    cuts=st.lists(st.floats(0, 1), max_size=4),
    flip=st.tuples(st.floats(0, 0.99), st.integers(1, 255)),
)
def test_any_tar_is_indexed_as_tarfile_lists_it_and_no_damage_ends_in_anything_but_a_sentence(
    tmp_path, members, format, cuts, flip
):
    packed = [
        (f"{'/'.join(parts)}.{suffix}", content[:length] or content) for parts, (suffix, content), length in members
    ]
    tar = pack(tmp_path / "x.tar", packed, format)
    with tarfile.open(tar) as opened:
        listed = [(i.name.removeprefix("./"), i.offset_data, i.size) for i in opened]
    wanted = [
        (offset, size)
        for name, offset, size in listed
        if f".{name.rpartition('.')[2].lower()}" in AUDIO_SUFFIXES
        and (base := name.rpartition(".")[0].rpartition("/")[2])
        and (base[0] != "." or base.startswith(".."))
    ]
    try:
        index = build_index(tar)
        assert list(zip(index.audio_offset.tolist(), index.audio_length.tolist(), strict=True)) == wanted
        assert all(
            index.member(i) in dict.fromkeys(n for n, _, _ in listed) for i in range(len(index)) if not index.problem[i]
        )
    except BadShardError:
        assert not wanted
    content = tar.read_bytes()
    for share in cuts:
        tar.write_bytes(content[: int(share * len(content))])
        try:
            shorter = build_index(tar)
            assert len(shorter) == len(wanted)  # the cut is in the zeros at the end
        except BadShardError:
            pass
    damaged = bytearray(content)
    damaged[int(flip[0] * len(content))] ^= flip[1]
    tar.write_bytes(damaged)
    try:
        index = build_index(tar)
        assert ((index.audio_offset + index.audio_length) <= len(content)).all()
    except BadShardError:
        pass
