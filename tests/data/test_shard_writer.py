"""Shards are written whole or not at all, and the same clips give the same bytes."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time

import numpy as np
import pytest
import soundfile
from recordings import noise
from tars import clip

from bestrq2.data.shards.index import build_index, index_path, load_index, read_index
from bestrq2.data.shards.shard_source import open_shards
from bestrq2.data.shards.writer import ShardWriter
from bestrq2.errors import DataError

EXTRA = {"source": "here", "rate": "16000"}


def write(path, count=3, key="clip{}"):
    writer = ShardWriter(path)
    for number in range(count):
        kind = "flac" if number == 1 else "wav"
        writer.add(key.format(number), clip(seed=number, kind=kind.upper()), kind, {"number": number, "ü": "é\udcff"})
    return writer


@pytest.mark.parametrize("key", ["clip{}", "deep/er/clip{}", "long" * 40 + "/" + "ü" * 60 + "{}", "dotted.{}.x"])
def test_tarfile_and_the_index_agree_on_what_was_written(tmp_path, key):
    writer = write(tmp_path / "x.tar", key=key)
    size = writer.size
    index = writer.close(EXTRA)
    with tarfile.open(tmp_path / "x.tar") as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}
    assert list(found)[:2] == [key.format(0) + ".wav", key.format(0) + ".json"]
    assert size <= (tmp_path / "x.tar").stat().st_size < size + 20_480
    for number, kind in enumerate(("wav", "flac", "wav")):
        assert json.loads(found[f"{key.format(number)}.json"].decode("utf-8", "surrogatepass"))["number"] == number
        samples, rate = soundfile.read(io.BytesIO(found[f"{key.format(number)}.{kind}"]))
        assert rate == 16_000
        np.testing.assert_allclose(samples, noise(2, 16_000, number), atol=1 / 32768)
    assert index.checksum() == build_index(tmp_path / "x.tar").checksum()
    stored = load_index(tmp_path / "x.tar")
    assert (stored.checksum(), stored.stamp, stored.extra) == (index.checksum(), index.stamp, EXTRA)
    source = open_shards([tmp_path / "x.tar"], "x")
    assert source.metadata(2) == {"number": 2, "ü": "é\udcff"}


def test_webdataset_reads_what_was_written(tmp_path):
    import webdataset

    write(tmp_path / "x.tar").close({})
    samples = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["clip0", "clip1", "clip2"]
    assert samples[1]["flac"] == clip(seed=1, kind="FLAC")
    assert json.loads(samples[2]["json"].decode("utf-8", "surrogatepass"))["number"] == 2


def test_the_same_clips_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.tar").close(EXTRA)
    assert (tmp_path / "a" / "x.tar").read_bytes() == (tmp_path / "b" / "x.tar").read_bytes()


def test_samples_begin_at_even_bytes_and_in_one_piece(tmp_path):
    index = write(tmp_path / "x.tar").close({})
    assert index.pcm_offset.tolist()[0] == index.audio_offset[0] + 44
    assert not (index.audio_offset % 512).any()
    assert index.frames.tolist() == [32_000, 0, 32_000]


def test_nothing_has_the_final_name_before_it_is_whole(tmp_path):
    writer = write(tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()
    assert not index_path(tmp_path / "x.tar").exists()
    writer.close({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.index.parquet"]
    writer = write(tmp_path / "y.tar")
    writer.abandon()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.index.parquet"]


def test_a_failure_at_the_end_leaves_the_shard_that_was_there(tmp_path, monkeypatch):
    write(tmp_path / "x.tar").close({})
    before = (tmp_path / "x.tar").read_bytes()
    writer = write(tmp_path / "x.tar", count=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bestrq2.data.shards.writer.write_index", full)
    with pytest.raises(OSError, match="No space left"):
        writer.close({})
    assert (tmp_path / "x.tar").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.index.parquet"]


def test_a_killed_writer_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    child = os.fork()
    if child == 0:
        write(tmp_path / "x.tar")._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".x.tar.*.tmp"))) == 1
    assert not (tmp_path / "x.tar").exists()
    write(tmp_path / "x.tar").close({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.index.parquet"]


def test_an_index_without_its_tar_is_replaced_by_the_next_writer(tmp_path):
    write(tmp_path / "x.tar").close({"run": "killed between index and tar"})
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DataError, match="does not exist"):
        load_index(tmp_path / "x.tar")
    write(tmp_path / "x.tar", count=2).close({"run": "second"})
    assert len(load_index(tmp_path / "x.tar")) == 2
    assert read_index(index_path(tmp_path / "x.tar")).extra == {"run": "second"}


def test_metadata_that_is_no_json_leaves_the_shard_as_it_was(tmp_path):
    writer = write(tmp_path / "x.tar")
    size = writer.size
    with pytest.raises(TypeError):
        writer.add("new", clip(), "wav", {"when": time})
    assert writer.size == size
    assert len(writer.close({})) == 3
