"""Tars as a source: the same crops as from files, few open files, clips of every kind."""

from __future__ import annotations

import os
import pickle
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from recordings import noise, write, write_with_ffmpeg
from shard_crops import RATE, batches, crop, described, fields
from tars import clip, encoded, pack, shard

from bestrq2.data.audio import read_span
from bestrq2.data.loader import AllRejectedError, RowDataset, training_rows
from bestrq2.data.open_source import open_source
from bestrq2.data.order import RowKey
from bestrq2.data.shards import files
from bestrq2.data.shards.files import TarFiles
from bestrq2.data.shards.shard_source import open_shards
from bestrq2.data.waveforms import to_float32

pytestmark = pytest.mark.usefixtures("own_cache")


def test_folder_flac_shards_and_pcm_shards_give_the_same_batches(corpora):
    wanted = batches(corpora["folder"])
    for name in ("flac", "wav"):
        for batch, other in zip(wanted, batches(corpora[name]), strict=True):
            assert torch.equal(batch.to("cpu").input_values, other.to("cpu").input_values)
            assert torch.equal(batch.lengths, other.lengths)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.9999, 3.0, 10.0])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_crops_are_the_same_whatever_holds_the_clip(corpora, rate, seconds):
    for index in (0, 3, 7):
        wanted = crop(corpora["folder"], index, index, seconds, rate)
        for name in ("flac", "wav"):
            np.testing.assert_array_equal(to_float32(crop(corpora[name], index, index, seconds, rate)), wanted)


def test_pcm_at_the_wanted_rate_comes_as_int16_of_the_crop_alone(corpora, monkeypatch):
    sizes = []
    original = TarFiles.read
    monkeypatch.setattr(
        TarFiles, "read", lambda tars, tar, start, size: sizes.append(size) or original(tars, tar, start, size)
    )
    found = crop(corpora["wav"], 0)
    assert found.dtype == np.int16
    assert found.shape == (RATE,)
    assert sizes == [2 * RATE]
    assert crop(corpora["wav"], 0, rate=8_000).dtype == np.float32


def test_decoders_of_pcm_read_float32(corpora):
    with corpora["wav"].opened(0) as decoder:
        samples = read_span(decoder, 5_000, 1_000, RATE)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, noise(3, RATE, 0)[5_000:6_000], atol=2 / 32768)


def test_workers_and_pickles_give_the_same_batches(corpora):
    source = corpora["wav"]
    again = pickle.loads(pickle.dumps(source))
    wanted = batches(source)
    for other in (batches(again), batches(source, 1), batches(source, 2)):
        for first, second in zip(wanted, other, strict=True):
            assert torch.equal(first.input_values, second.input_values)


def six_tars(root):
    root.mkdir()
    return open_shards([shard(root / f"{n}.tar", [n, n + 10], seconds=0.5) for n in range(6)], "x")


def test_few_tars_are_open_at_once_in_all_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OPEN", files.OpenFiles(3))
    sources = [six_tars(tmp_path / name) for name in "ab"]
    crops = [crop(source, index) for index in range(12) for source in sources]
    assert len(files.OPEN.files) == 3
    for place, found in enumerate(crops):
        index = place // 2
        np.testing.assert_allclose(found / 32768, noise(0.5, RATE, index // 2 + index % 2 * 10), atol=1 / 32768)


def test_a_quarter_of_the_files_a_process_may_open_is_for_tars(monkeypatch):
    for limit, wanted in ((1024, 256), (40, 10), (2, 1), (1 << 20, 512), (resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(files.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert files.most_open() == wanted


@contextmanager
def no_more_files():
    """A process that has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Above every number in use: a number that a tar frees must be one that may be given again.
    limit = max(int(number) for number in os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    taken = []
    try:
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for handle in taken:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["x.tar", "a.flac", "b.mp3", "c.m4a"])
def test_too_many_open_files_are_no_fault_of_the_recording(tmp_path, name):
    if name == "x.tar":
        shard(tmp_path / name, [0])
    else:
        write(tmp_path / name, noise(2, RATE), RATE)
    source = open_source(tmp_path / name)
    rows = training_rows(source, fields(), 0)
    data, key = RowDataset(source, rows, fields(), 0), RowKey(0, 0, 0, 0)
    data[key]
    files.OPEN.files.clear()
    files.OPEN_CACHED.files.clear()
    with no_more_files(), pytest.raises(AllRejectedError, match=r"cannot be opened \(Too many open files\)"):
        data[key]
    assert data[key].lengths.tolist() == [RATE]


def test_a_tar_that_cannot_be_opened_for_too_many_files_takes_the_place_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OPEN", files.OpenFiles(5))
    source = six_tars(tmp_path / "a")
    for index in range(0, 8, 2):
        crop(source, index)
    with no_more_files():
        assert len(crop(source, 10)) == RATE // 2
    assert files.OPEN.most == 2


def test_clips_of_every_kind_and_rate_lie_in_one_tar(tmp_path):
    stereo = np.stack([noise(2, 44_100, 1), noise(2, 44_100, 2)])
    m4a = write_with_ffmpeg(tmp_path / "e.m4a", noise(2, 44_100, 5), 44_100, "aac")
    members = [
        ("a.wav", encoded(stereo, 44_100)),
        ("b.wav", encoded(noise(2, 8_000), 8_000, subtype="PCM_24")),
        ("c.wav", encoded(noise(2, RATE), RATE, subtype="FLOAT")),
        ("d.wav", encoded(noise(2, 22_050, 4), 22_050)),
        ("e.m4a", m4a.read_bytes()),
        ("f.mp3", encoded(noise(2, RATE, 6), RATE, "MP3", "MPEG_LAYER_III")),
        ("g.ogg", encoded(noise(2, RATE, 7), RATE, "OGG", "VORBIS")),
    ]
    (tmp_path / "files").mkdir()
    for name, content in members:
        (tmp_path / "files" / name).write_bytes(content)
    source, apart = open_source(pack(tmp_path / "x.tar", members)), open_source(tmp_path / "files")
    assert described(source, tmp_path) == [f"x.tar/{name}" for name, _ in members]
    assert source.index.sampling_rate.tolist() == [0, 0, 0, 22_050, 0, 0, 0]
    for index in range(len(members)):
        wanted = crop(apart, index, seed=index)
        assert len(wanted) == RATE
        np.testing.assert_allclose(to_float32(crop(source, index, seed=index)), wanted, atol=1e-6)


def test_metadata_is_the_json_member(tmp_path):
    members = [("a.wav", clip()), ("a.json", b'{"label": "\xc3\xbc", "n": [1]}'), ("b.wav", clip())]
    members += [("c.wav", clip()), ("c.json", b'{"half'), ("d.json", b"[1, 2]"), ("d.wav", clip())]
    source = open_source(pack(tmp_path / "x.tar", members))
    assert [source.metadata(i) for i in range(4)] == [{"label": "ü", "n": [1]}, {}, {}, {}]
