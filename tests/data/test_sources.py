"""Sources: folders, files, lists and arrays as numbered recordings."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import lag, noise, write

from bestrq2.data import sources
from bestrq2.data.audio import AUDIO_SUFFIXES, array_decoder, read_span
from bestrq2.data.labels import load_labelled
from bestrq2.data.open_source import absolute_spec, local_folder, open_source
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.sources import ArraySource, FileSource, PathList, split_source
from bestrq2.errors import AudioError, DataError


def crop(source, index=0, seed=0, seconds=1.0, rate=16_000):
    return source.read(index, rate, np.random.default_rng(seed), seconds)


@pytest.fixture
def folder(tmp_path):
    """Audio at several depths, among other files."""
    root = tmp_path / "corpus"
    for name in ("b.wav", "A.FLAC", "deep/er/c.ogg", "deep/d.Wav"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            container = {".flac": "FLAC", ".ogg": "OGG"}.get(Path(name).suffix.lower(), "WAV")
            soundfile.write(file, noise(2, 16_000, seed=len(name)), 16_000, format=container)
    (root / "notes.txt").write_text("notes")
    (root / "._b.wav").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.wav").touch()
    return root


def relative(source, root):
    return [Path(source.describe(i)).relative_to(root).as_posix() for i in range(len(source))]


def test_a_folder_is_searched_recursively_and_sorted(folder):
    source = open_source(str(folder))
    assert relative(source, folder) == ["A.FLAC", "b.wav", "deep/d.Wav", "deep/er/c.ogg"]
    assert source.name == str(folder)
    assert all(len(crop(source, i)) == 16_000 for i in range(4))


def test_a_folder_is_listed_without_opening_files(folder, monkeypatch):
    monkeypatch.setattr(sources, "open_audio", lambda path: pytest.fail("opened"))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    assert len(open_source(folder)) == 4


def test_path_lists_behave_as_lists_do():
    names = ["a/ü.wav", "b\udcff.wav", "c.wav"]
    paths = PathList(names)
    assert list(paths) == [Path(name) for name in names]
    assert paths[-1] == Path("c.wav")
    assert Path("c.wav") in paths
    with pytest.raises(IndexError):
        paths[3]
    many = PathList(f"{i:030d}.wav" for i in range(100_000))
    assert len(pickle.dumps(many)) < 50 * 100_000


def test_links_to_folders_are_followed_once(folder, tmp_path):
    (folder / "loop").symlink_to(folder)
    write(tmp_path / "elsewhere.wav", noise(1, 16_000), 16_000)
    (folder / "link.wav").symlink_to(tmp_path / "elsewhere.wav")
    assert relative(open_source(folder), folder) == ["A.FLAC", "b.wav", "deep/d.Wav", "deep/er/c.ogg", "link.wav"]


def test_a_single_file_is_a_source_whatever_its_suffix(folder):
    assert len(open_source(folder / "b.wav")) == 1
    odd = folder / "recording.dat"
    odd.write_bytes((folder / "b.wav").read_bytes())
    assert len(crop(open_source(odd))) == 16_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "b.wav\n\n  deep/er/c.ogg \n{root}/A.FLAC\n"),
        ("list.csv", 'speaker,path\n1,b.wav\n2,deep/er/c.ogg\n3,"{root}/A.FLAC"\n'),
        ("bom.csv", "\ufeffpath\nb.wav\ndeep/er/c.ogg\n{root}/A.FLAC\n"),
        ("list.tsv", "path\tspeaker\nb.wav\t1\ndeep/er/c.ogg\t2\n{root}/A.FLAC\t3\n"),
        ("list.jsonl", '{{"path": "b.wav"}}\n{{"path": "deep/er/c.ogg", "n": 1}}\n\n{{"path": "{root}/A.FLAC"}}\n'),
        (
            "nemo.jsonl",
            '{{"audio_filepath": "b.wav"}}\n{{"audio_filepath": "deep/er/c.ogg"}}\n'
            '{{"audio_filepath": "{root}/A.FLAC"}}\n',
        ),
    ],
)
def test_lists_name_files_relative_to_themselves(folder, name, content):
    (folder / name).write_text(content.format(root=folder), encoding="utf-8")
    source = open_source(folder / name)
    assert relative(source, folder) == ["b.wav", "deep/er/c.ogg", "A.FLAC"]
    assert len(crop(source, 1)) == 16_000


def test_a_list_of_rejected_recordings_names_their_files(tmp_path):
    names = ["=1+1.wav", "-x.wav", "@eaDir/a.wav", "two\nlines.wav", "'=q.wav", "c\udcff.wav", "line\u2028.wav"]
    RejectionLog(tmp_path / "rejected.csv").add([(name, "is silent.") for name in names])
    assert relative(open_source(tmp_path / "rejected.csv"), tmp_path) == names


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", "\n\n", "lists nothing; expected one recording per line"),
        ("header.csv", "path,label\n", "has a header and no rows"),
        ("other.csv", "pth,label\na.wav,x\n", r"has no column 'path'; found 'pth', 'label' \(did you mean 'pth'"),
        ("case.csv", "Path\na.wav\n", "did you mean 'Path'"),
        ("hole.csv", "label,path\nx,a.wav\ny,\n", "line 3: no value for 'path'"),
        ("broken.jsonl", '{"path": "a.wav"}\n{"path": \n', "line 2: is not JSON"),
        ("array.jsonl", '["a.wav"]\n', "line 1: expected an object"),
        ("keys.jsonl", '{"file": "a.wav"}\n', "no column 'path' or 'audio' or 'audio_filepath'; found 'file'"),
        ("text.xyz", "hello", r"is neither audio, nor a tar, nor a list of paths \(\.csv, \.jsonl, \.tsv, \.txt\)"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        open_source(tmp_path / name)


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(
        DataError, match="nowhere does not exist; give a folder of audio or of tars, an audio file, a tar, a list"
    ):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="a URL of tars, or soundworld"):
        open_source("nowhere")
    with pytest.raises(DataError, match="is empty: no files in it or below"):
        open_source(tmp_path)
    (tmp_path / "a.pdf").touch()
    (tmp_path / "b.pdf").touch()
    (tmp_path / "README").touch()
    with pytest.raises(DataError, match=r"holds 3 files and none with an audio suffix \(found: \.pdf, none; expected"):
        open_source(tmp_path)


def test_a_folder_that_cannot_be_listed_is_rejected_like_a_bad_file(folder, monkeypatch, caplog):
    listed = os.scandir
    closed = str(folder / "deep")

    def scandir(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = open_source(folder)
    assert relative(source, folder) == ["A.FLAC", "b.wav", "deep"]
    assert f"{closed} cannot be listed (Permission denied)" in caplog.text
    with pytest.raises(UnreadableAudioError, match="is a folder"):
        crop(source, 2)
    with pytest.raises(DataError, match="deep cannot be listed"):
        open_source(folder / "deep")


def test_what_is_no_regular_file_is_rejected_and_nothing_waits(folder):
    """Opening a pipe for reading waits for a writer; a device may never end."""
    (folder / "itself.wav").symlink_to(folder / "itself.wav")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.wav")
    os.mkfifo(folder / "pipe.tar")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(folder / "socket.wav"))  # absolute paths of tests are too long for sockets
        source = open_source(folder)
        names = relative(source, folder)
        odd = {"itself.wav", "gone.wav", "device.wav", "pipe.wav", "socket.wav"}
        assert set(names) == odd | {"A.FLAC", "b.wav", "deep/d.Wav", "deep/er/c.ogg"}
        for name in odd:
            with pytest.raises(UnreadableAudioError, match=r"is not a regular file|cannot be opened|does not exist"):
                crop(source, names.index(name))
    with pytest.raises(DataError, match="is not a tar but"):
        open_source(folder / "pipe.tar")


def test_files_skipped_by_suffix_are_counted_in_one_line(folder, caplog):
    for name in ("a.xyz", "deep/b.XYZ", "deep/README", "shard.tar.index.parquet", "rejected.csv", "x.\x1b[31m"):
        (folder / name).touch()
    with caplog.at_level("INFO"):
        open_source(folder)
    assert caplog.messages == [f"{folder}: 5 files skipped by suffix: .txt 1, .xyz 2, none 1, other 1"]


def test_everything_that_ffmpeg_or_libsndfile_name_as_audio_is_found():
    suffixes = "weba wmv ts m2ts mpga 3ga eac3 amb bwf dts vob gsm g722 al ul g723"
    assert {f".{suffix}" for suffix in suffixes.split()} < AUDIO_SUFFIXES


def test_playlists_pictures_text_and_data_are_no_audio():
    others = "m3u m3u8 pls ffconcat cue xspf txt srt vtt bin raw dat csv json jpg png gif py mat"
    assert not AUDIO_SUFFIXES & {f".{suffix}" for suffix in others.split()}


def test_suffixes_are_lower_case_with_a_dot():
    assert {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aiff", ".webm", ".mp4"} <= AUDIO_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in AUDIO_SUFFIXES)


@pytest.mark.parametrize("spec", ["soundworld:0", "soundworld:", "soundworld:many", "soundworld:-3", "soundworld:1.5"])
def test_soundworld_needs_a_count(spec):
    with pytest.raises(DataError, match="expected 'soundworld:N' with a positive whole number"):
        open_source(spec)


@pytest.mark.parametrize("name", ["y" * 300, "hub:" + "y" * 300, "a\0b.wav", "soundworld:3/" + "y" * 300])
def test_impossible_names_are_refused_with_one_sentence(name):
    for opening in (lambda name: open_source(absolute_spec(name)), open_source, load_labelled):
        with pytest.raises(DataError):
            opening(name)
    assert local_folder(name) is None


@pytest.mark.parametrize("name", ["y" * 300 + ".wav", "a\0b.wav", "half of a pair \ud800.wav"])
def test_an_impossible_name_in_a_list_costs_its_own_recording_only(folder, name):
    (folder / "list.jsonl").write_text(f'{json.dumps({"path": name})}\n{{"path": "b.wav"}}\n')
    source = open_source(folder / "list.jsonl")
    with pytest.raises(UnreadableAudioError, match=r"\.wav: .*(File name too long|null byte|does not exist)"):
        crop(source, 0)
    assert len(crop(source, 1)) == 16_000
    (folder / "table.jsonl").write_text(json.dumps({"path": name, "label": "a"}))
    with pytest.raises(DataError, match="lists 1 file of 1 that cannot be found"):
        load_labelled(folder / "table.jsonl")


def test_soundworld_is_an_array_source(monkeypatch):
    import bestrq2.soundworld as soundworld

    clips = np.stack([(noise(3, 16_000, seed) * 32767).astype(np.int16) for seed in range(4)])
    monkeypatch.setattr(soundworld, "unlabelled", lambda count, seed=0: clips[:count], raising=False)
    source = open_source("soundworld:3")
    assert len(source) == 3
    assert source.name == "soundworld"
    assert source.describe(2) == "soundworld clip 2"
    np.testing.assert_allclose(crop(source, 2, seconds=10), clips[2] / 32768, atol=1e-7)


def test_arrays_of_any_length_type_and_channels_are_cropped():
    waveforms = [noise(3, 8_000), (noise(0.2, 8_000) * 32767).astype(np.int16), np.stack([noise(2, 8_000)] * 2)]
    source = ArraySource(waveforms, 8_000, name="mine")
    assert [len(crop(source, i)) for i in range(3)] == [16_000, 3200, 16_000]
    whole = read_span(array_decoder(waveforms[0], 8_000), 0, None, 16_000)
    part = crop(source, 0, seed=4)
    start = lag(part, whole, 0, reach=48_000)
    np.testing.assert_allclose(part, whole[start : start + 16_000], atol=1e-5)
    assert source.describe(1) == "mine clip 1"


def test_unusable_arrays_are_named():
    waveforms = [np.zeros(100, np.float32), np.array([0.1, np.nan]), np.zeros((3, 2, 2)), np.arange(5)]
    source = ArraySource(waveforms, 16_000, name="mine")
    for index, reason in enumerate(["is silent", "holds NaN", "is not audio", "no defined full scale"]):
        with pytest.raises(AudioError, match=f"^mine clip {index}: .*{reason}"):
            crop(source, index)


def test_crops_of_files_are_functions_of_the_generator(folder):
    source = open_source(folder)
    np.testing.assert_array_equal(crop(source, 1, seed=3), crop(source, 1, seed=3))
    assert not np.array_equal(crop(source, 1, seed=3), crop(source, 1, seed=4))


def test_bad_files_are_told_from_bad_crops(tmp_path):
    """A file that is bad throughout need not be opened again; one with a bad crop must be."""
    source = FileSource("x", [tmp_path / "gone.wav", write(tmp_path / "silent.wav", np.zeros(1000), 8_000)])
    for index in range(2):
        with pytest.raises(UnreadableAudioError, match=f"^{source.describe(index)}: "):
            crop(source, index)
    half = np.concatenate([noise(5, 8_000), np.full(8_000 * 5, np.nan, np.float32)])
    with pytest.raises(AudioError) as error:
        crop(FileSource("x", [write(tmp_path / "half.float.wav", half, 8_000)]), seed=1, seconds=6)
    assert not isinstance(error.value, UnreadableAudioError)


def test_splits_are_disjoint_complete_and_repeatable():
    source = ArraySource(np.random.default_rng(0).standard_normal((50, 400)), 16_000)
    train, validation = split_source(source, num_validation=4, seed=1)
    names = [[part.describe(i) for i in range(len(part))] for part in (train, validation)]
    assert len(names[1]) == 4
    assert sorted(names[0] + names[1]) == sorted(source.describe(i) for i in range(50))
    again = split_source(source, num_validation=4, seed=1)[1]
    assert [again.describe(i) for i in range(4)] == names[1]
    other = split_source(source, num_validation=4, seed=2)[1]
    assert [other.describe(i) for i in range(4)] != names[1]
    np.testing.assert_array_equal(crop(validation, 2), crop(source, int(validation.indices[2])))


def test_small_sources_keep_most_for_training():
    sizes = {}
    for length in (1, 2, 8, 30, 1000):
        train, validation = split_source(ArraySource(np.ones((length, 4)), 16_000), 64, seed=0)
        sizes[length] = (len(train), validation and len(validation))
    assert sizes == {1: (1, None), 2: (1, 1), 8: (7, 1), 30: (27, 3), 1000: (936, 64)}
    assert split_source(ArraySource(np.ones((9, 4)), 16_000), 0, seed=0)[1] is None
