"""Tars that are damaged, cut, replaced or gone, before and while they are read."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from recordings import noise
from shard_crops import RATE, batches, clips, crop, described, fields, rejections
from tars import clip, encoded, pack, shard

from bestrq2.data.audio import open_audio
from bestrq2.data.loader import fixed_crops
from bestrq2.data.open_source import open_source
from bestrq2.data.places import UnreadableAudioError
from bestrq2.data.shards import files, shard_source
from bestrq2.data.shards.index import load_index
from bestrq2.data.shards.shard_source import open_shards
from bestrq2.errors import AudioError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")


BAD = {
    "text.wav": (b"not audio", "is not audio that libsndfile or FFmpeg can read."),
    "empty.wav": (b"", "the file is empty (0 bytes)."),
    "silent.wav": (encoded(np.zeros(RATE, np.float32), RATE), "is silent: no sample exceeds 0.0001 of full scale."),
    "none.wav": (encoded(np.zeros(0, np.float32), RATE), "holds no samples."),
    "cut.flac": (clip(kind="FLAC")[:4], "is not audio that libsndfile or FFmpeg can read."),
    "../out.wav": (clip(), "its name in the tar is not a plain one"),
    "good.flac": (clip(kind="FLAC"), "an earlier clip in the tar has the same key"),
}


def test_bad_clips_are_rejected_by_name(tmp_path, caplog):
    members = [("good.wav", clip()), *((name, content) for name, (content, _) in BAD.items())]
    tar = pack(tmp_path / "x.tar", members)
    with caplog.at_level(logging.WARNING):
        source = open_source(tar)
    assert len(caplog.messages) == 1
    assert "2 of 8 clips left out; first: " in caplog.messages[0]
    rejected = dict(rejections(source))
    assert len(rejected) == len(BAD)
    for name, (_, reason) in BAD.items():
        shown = next(path for path in rejected if path.startswith(f"{tar}/") and (name in path or "member" in path))
        if not name.startswith(".."):
            shown = f"{tar}/{name}"
        assert reason.removesuffix(".") in rejected[shown]
        assert "x.tar" not in rejected[shown]
    assert not any(".." in path for path in rejected)


def test_a_silent_crop_is_no_bad_clip_and_is_named(tmp_path):
    quiet = np.concatenate([noise(1, RATE), np.zeros(60 * RATE, np.float32)])
    source = open_source(pack(tmp_path / "x.tar", [("a.wav", encoded(quiet, RATE))]))
    with pytest.raises(AudioError, match=r"x\.tar/a\.wav: is silent") as error:
        crop(source, seed=1)
    assert not isinstance(error.value, UnreadableAudioError)


def test_descriptions_too_long_to_be_one_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_source, "_MOST_JSON", 100)
    members = [("0.wav", clip()), ("0.json", b'{"a": 1}'), ("1.wav", clip()), ("1.json", b"[" * 101)]
    source = open_source(pack(tmp_path / "x.tar", members))
    assert [source.metadata(index) for index in range(2)] == [{"a": 1}, {}]


def test_equal_keys_in_different_tars_are_different_clips(tmp_path):
    source = open_shards([shard(tmp_path / f"{name}.tar", [1, 2]) for name in "ab"], "x")
    assert described(source, tmp_path) == ["a.tar/0001.wav", "a.tar/0002.wav", "b.tar/0001.wav", "b.tar/0002.wav"]
    assert all(len(crop(source, i)) == RATE for i in range(4))


def cut_tar(tar, share=0.5):
    tar.write_bytes(tar.read_bytes()[: int(share * tar.stat().st_size)])
    return tar


def test_a_bad_tar_among_good_ones_is_one_rejected_clip(tmp_path, caplog):
    tars = [shard(tmp_path / f"{n}.tar", [2 * n, 2 * n + 1]) for n in range(4)]
    cut_tar(tars[1], 0.2)
    tars[2].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert caplog.messages[0].startswith(
        f"{tmp_path}: 2 of 4 tars left out, whole or in part; first: {tars[1]}: the tar is truncated"
    )
    assert described(source, tmp_path) == [
        *("0.tar/0000.wav", "0.tar/0001.wav", "1.tar", "2.tar", "3.tar/0006.wav", "3.tar/0007.wav")
    ]
    rejected = set(rejections(source))
    assert {path for path, _ in rejected} == {str(tars[1]), str(tars[2])}
    assert dict(rejected)[str(tars[2])] == "the tar is empty (0 bytes); copy or download it again."
    assert source.metadata(2) == {}


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_of_a_truncated_tar_the_whole_clips_are_used_and_the_damage_is_one_rejected_entry(tmp_path, caplog, kind):
    tar = cut_tar(shard(tmp_path / "x.tar", range(10), kind=kind), 0.55)
    assert len(fixed_crops(open_source(tar.as_uri()), 64, fields(), seed=0)) == 5
    for _ in range(2):
        caplog.clear()
        source = open_source(tar)
        assert described(source, tmp_path) == [*(f"x.tar/{n:04d}.{kind.lower()}" for n in range(5)), "x.tar"]
        (warning,) = caplog.messages
        assert f"1 of 1 tar left out, whole or in part; first: {tar}: the tar is truncated: its member" in warning
        rejected = set(rejections(source))
        ((path, reason),) = rejected
        assert path == str(tar)
        assert f"the file ends at {tar.stat().st_size:,}; copy or download it again; only its 5 clips" in reason
        assert source.metadata(5) == {}
        assert source.metadata(4) == {"seed": 4}


def test_if_all_tars_are_bad_one_sentence_says_so(tmp_path):
    tars = [cut_tar(shard(tmp_path / f"{n}.tar", [n])) for n in range(3)]
    with pytest.raises(
        DataError, match=r"0\.tar: the tar is truncated: .* \(and none of the other 2 tars can be used"
    ) as e:
        open_source(tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match=r"1\.tar: the tar is truncated: its member '0001.wav' reaches to byte"):
        open_source(tars[1])


def test_a_tar_cut_short_while_in_use_is_a_rejected_clip_and_no_crash(tmp_path):
    tar = shard(tmp_path / "x.tar", range(4))
    source = open_source(tar)
    assert len(crop(source, 3)) == RATE
    os.truncate(tar, 4096)
    for index in (3, 0):
        with pytest.raises(
            UnreadableAudioError, match=r"x\.tar/000\d\.wav: its tar changed since it was indexed; start again"
        ):
            crop(source, index)
    with pytest.raises(UnreadableAudioError, match="changed since"):
        source.metadata(0)


def test_a_tar_that_was_only_touched_while_in_use_is_read_on(tmp_path, monkeypatch):
    tar = shard(tmp_path / "x.tar", range(4))
    source = open_source(tar)
    before = [crop(source, index) for index in range(4)]
    scans = []
    monkeypatch.setattr(files, "load_index", lambda path: scans.append(path) or load_index(path))
    for time in (1_000, 4_000_000_000):
        os.utime(tar, (0, time))
        for index in range(4):
            files.OPEN.files.clear()
            np.testing.assert_array_equal(crop(source, index), before[index])
    assert len(scans) == 2


@pytest.mark.parametrize("kind", ["WAV", "AU"])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_tar_with_another_content_of_the_same_size_is_found_out_with_one_look(tmp_path, monkeypatch, kind, is_open):
    """Samples of another recording would pass for those of this one without notice."""
    tar = shard(tmp_path / "x.tar", range(4), kind=kind)
    source = open_source(tar)
    size = tar.stat().st_size
    if is_open:
        assert len(crop(source, 0)) == RATE
    shard(tar, range(5, 9), kind=kind)
    os.utime(tar, (0, 1_000))
    assert tar.stat().st_size == size
    scans = []
    monkeypatch.setattr(files, "load_index", lambda path: scans.append(path) or load_index(path))
    for index in range(4):
        with pytest.raises(UnreadableAudioError, match="changed since"):
            crop(source, index)
    assert len(scans) == 1


def batch_of_a_vanishing_tar(tar):
    (batch,) = batches(open_source(tar), steps=1, rows=4)
    os.truncate(tar, 0)
    found = clips(batch, fields())
    assert len(found) == 4
    assert all(samples.std() > 0.05 for _, samples, _ in found)


def test_a_tar_that_vanishes_after_a_batch_ends_no_process(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=batch_of_a_vanishing_tar, args=(shard(tmp_path / "x.tar", range(2)),)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def cut_and_read(tar, is_labelled):
    source = open_source(tar)
    with open_audio(source.member(1)) if is_labelled else source.opened(1) as decoder:
        os.truncate(tar, 4096)
        decoder.read(100_000, RATE)


def read_of_a_vanishing_tar(tar, is_labelled):
    with pytest.raises(AudioError, match=r"x\.tar/0001\.\w+: its tar changed since"):
        cut_and_read(tar, is_labelled)


@pytest.mark.parametrize(("kind", "is_labelled"), [("WAV", False), ("FLAC", False), ("FLAC", True)])
def test_a_tar_that_vanishes_while_a_decoder_is_open_ends_no_process(tmp_path, kind, is_labelled):
    """Labelled clips are read as files in memory, not through the source."""
    process = multiprocessing.get_context("fork").Process(
        target=read_of_a_vanishing_tar, args=(shard(tmp_path / "x.tar", range(3), seconds=10, kind=kind), is_labelled)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_validation_crops_of_pcm_shards_are_float32_and_those_of_the_same_files(corpora):
    found, wanted = (fixed_crops(corpora[name], 6, fields(), seed=3) for name in ("wav", "folder"))
    assert len(found) == len(wanted) == 6
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def test_a_tar_replaced_while_in_use_is_read_as_it_was_or_rejected(tmp_path):
    tar = shard(tmp_path / "x.tar", range(4))
    source = open_source(tar)
    before = crop(source, 2)
    shard(tmp_path / "new.tar", range(10, 16)).replace(tar)
    np.testing.assert_array_equal(crop(source, 2), before)
    files.OPEN.files.clear()
    with pytest.raises(UnreadableAudioError, match="changed since"):
        crop(source, 2)
    tar.unlink()
    with pytest.raises(UnreadableAudioError, match=r"x\.tar/0002\.wav: its tar cannot be opened \(No such file"):
        crop(pickle.loads(pickle.dumps(source)), 2)
    assert len(open_source(shard(tar, range(10, 16)))) == 6
