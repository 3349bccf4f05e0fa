"""The index beside a tar: kept, trusted, made anew, and small."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tarfile

import pytest
from tars import clip, names, pack, shard

from bestrq2.data.shards import index as indexing
from bestrq2.data.shards.index import (
    IndexRows,
    ShardIndex,
    Stamp,
    build_index,
    index_path,
    joined,
    load_index,
    read_index,
    write_index,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_an_index_comes_back_as_it_was_written(tmp_path):
    members = [
        ("a.wav", clip(0.1)),
        ("b\udcff.flac", clip(0.1, kind="FLAC")),
        ("a.wav", clip(0.1)),
        ("ü/c.mp3", b"x"),
        ("ü/c.json", b"{}"),
    ]
    index = build_index(pack(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    write_index(index, tmp_path / "i.parquet")
    again = read_index(tmp_path / "i.parquet")
    assert again.checksum() == index.checksum()
    assert again.stamp == index.stamp
    assert names(again) == ["a.wav", "b\udcff.flac", "a.wav", "ü/c.mp3"]
    both = joined([index, again])
    assert names(both) == names(index) * 2
    assert both.problem.tolist() == index.problem.tolist() * 2


def test_an_index_is_a_table_that_other_tools_read(tmp_path):
    import pyarrow.parquet as pq

    load_index(shard(tmp_path / "x.tar", range(3)))
    table = pq.read_table(tmp_path / "x.tar.index.parquet")
    assert table["key"].to_pylist() == [b"0000", b"0001", b"0002"]
    assert table["sampling_rate"].to_pylist() == [16_000] * 3
    assert table["suffix"].to_pylist() == [b"wav"] * 3
    assert table.schema.metadata[b"tar_bytes"] == str((tmp_path / "x.tar").stat().st_size).encode()


def count_builds(monkeypatch):
    built = []
    original = indexing.scan
    monkeypatch.setattr(indexing, "scan", lambda tar: built.append(tar) or original(tar))
    return built


def test_a_tar_is_indexed_once(tmp_path, monkeypatch):
    built = count_builds(monkeypatch)
    tar = shard(tmp_path / "x.tar", range(3))
    first, second = load_index(tar), load_index(tar)
    assert first.checksum() == second.checksum()
    assert len(built) == 1


@pytest.mark.parametrize("shift", [-10_000, 10_000, 4_000_000_000])
def test_another_time_of_change_alone_is_no_change(tmp_path, monkeypatch, caplog, shift):
    """Times only need to be equal: after a copy, or with a clock gone back or ahead, contents are compared."""
    tar = shard(tmp_path / "x.tar", range(3))
    index = load_index(tar)
    write_index(ShardIndex(index.table, index.stamp, {"made": "here"}), index_path(tar))
    os.utime(tar, (0, tar.stat().st_mtime + shift))
    built = count_builds(monkeypatch)
    assert load_index(tar).extra == {"made": "here"}
    assert load_index(tar).extra == {"made": "here"}
    assert len(built) == 1
    assert not caplog.records


def test_a_changed_tar_is_indexed_anew_and_said_so(tmp_path, caplog):
    tar = shard(tmp_path / "x.tar", range(3))
    load_index(tar)
    shard(tar, range(4, 8))
    with caplog.at_level(logging.WARNING):
        assert names(load_index(tar)) == [f"{seed:04d}.wav" for seed in range(4, 8)]
    assert caplog.messages == [f"{tar} changed since it was indexed: indexed anew"]
    # the same size and other names
    size, time = tar.stat().st_size, tar.stat().st_mtime_ns
    shard(tar, range(5, 9))
    assert tar.stat().st_size == size
    os.utime(tar, ns=(time + 1, time + 1))
    assert names(load_index(tar))[0] == "0005.wav"


@pytest.mark.parametrize("damage", ["text", "half", "other table", "offsets"])
def test_a_damaged_index_is_replaced(tmp_path, damage):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tar = shard(tmp_path / "x.tar", range(3))
    index = load_index(tar)
    place = index_path(tar)
    if damage == "text":
        place.write_text("no table")
    elif damage == "half":
        place.write_bytes(place.read_bytes()[:-100])
    elif damage == "other table":
        pq.write_table(pa.table({"key": [1]}), place)
    else:
        offsets = pa.array([512, 1 << 50, 512])
        table = index.table.set_column(index.table.schema.get_field_index("audio_offset"), "audio_offset", offsets)
        write_index(ShardIndex(table, index.stamp), place)
    assert load_index(tar).checksum() == build_index(tar).checksum() == read_index(place).checksum()


def test_where_the_folder_cannot_be_written_the_cache_keeps_the_index_or_else_the_memory(tmp_path, monkeypatch):
    tar = shard(tmp_path / "x.tar", range(3))
    (tmp_path / "x.tar.index.parquet").mkdir()
    built = count_builds(monkeypatch)
    load_index(tar)
    load_index(tar)
    assert len(built) == 1
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "file"))
    assert len(load_index(tar)) == 3


def as_nobody(tar, queue):
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        queue.put(len(load_index(tar)))
    except BaseException as error:
        queue.put(repr(error))


def test_in_a_cache_folder_of_somebody_else_the_memory_keeps_the_index(tmp_path):
    tar = shard(tmp_path / "x.tar", range(3))
    (tmp_path / "cache").mkdir(mode=0)
    for folder in (tmp_path, *(parent for parent in tmp_path.parents if "pytest-of-" in str(parent))):
        folder.chmod(0o755)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=as_nobody, args=(tar, queue))
    tmp_path.chmod(0o555)
    process.start()
    found = queue.get(timeout=60)
    process.join()
    tmp_path.chmod(0o755)
    assert found == 3


def test_a_cache_folder_that_no_system_can_have_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / ("x" * 300)))
    assert len(load_index(shard(tmp_path / "x.tar", range(3)))) == 3


def load(tar, queue):
    queue.put(load_index(tar).checksum())


def test_two_processes_may_index_at_once(tmp_path):
    tar = shard(tmp_path / "x.tar", range(20), seconds=0.1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=load, args=(tar, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found == {read_index(index_path(tar)).checksum()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.index.parquet"]


def test_a_million_clips_take_their_columns_only(tmp_path):
    rows = IndexRows()
    for number in range(50_000):
        rows.add(f"{number:012d}", "wav", (1024 * number, 1000), (1024 * number + 600, 10))
    index = rows.index(Stamp(1 << 40, 0))
    write_index(index, tmp_path / "i.parquet")
    assert (tmp_path / "i.parquet").stat().st_size < 40 * 50_000
    again = read_index(tmp_path / "i.parquet")
    assert again.table.nbytes <= 90 * 50_000
    assert again.member(49_999) == "000000049999.wav"
