"""Lengths of recordings: measured once, kept in a table, and known where an index tells them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from recordings import noise, write
from tars import shard

from bestrq2.data import lengths
from bestrq2.data.lengths import recording_lengths
from bestrq2.data.loader import training_rows
from bestrq2.data.open_source import open_source
from bestrq2.data.rows import Segment
from bestrq2.data.shards.shard_source import ShardSource
from bestrq2.data.sources import ArraySource, RemoteShard, SubsetSource
from bestrq2.model.configuration_bestrq2 import BestRQ2Config

RATE = 16_000


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Names of the files that were measured; the table is in a folder of its own."""
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))
    names, measure = [], lengths._measure

    def counted(source, index):
        names.append(source.describe(index).rpartition("/")[2])
        return measure(source, index)

    monkeypatch.setattr(lengths, "_measure", counted)
    return names


def test_files_are_measured_once_and_again_when_they_change(tmp_path, opened):
    root = tmp_path / "corpus"
    root.mkdir()
    write(root / "a.wav", noise(0.5, RATE), RATE)
    write(root / "b.flac", noise(0.25, 44_100), 44_100)
    (root / "c.mp3").write_text("no audio " * 99)
    found = recording_lengths(open_source(root), RATE)
    assert found.samples.tolist() == [8000, 4000, 0]
    assert found.problems == {2: "is not audio that libsndfile or FFmpeg can read."}
    assert opened == ["a.wav", "b.flac", "c.mp3"]
    again = recording_lengths(SubsetSource(open_source(root), np.array([1, 2]), str(root)), 8000)
    assert again.samples.tolist() == [2000, 0]
    assert again.problems == {1: found.problems[2]}
    write(root / "a.wav", noise(0.75, RATE), RATE)
    write(root / "d.wav", noise(1, RATE), RATE)
    os.utime(root / "b.flac", ns=(0, 0))
    assert recording_lengths(open_source(root), RATE).samples.tolist() == [12_000, 4000, 0, 16_000]
    assert opened[3:] == ["a.wav", "b.flac", "d.wav"]
    assert recording_lengths(open_source(root), RATE).samples.tolist() == [12_000, 4000, 0, 16_000]
    assert len(opened) == 6


def test_a_damaged_table_and_a_cache_that_cannot_be_written_are_survived(tmp_path, opened, monkeypatch, caplog):
    path = write(tmp_path / "a.wav", noise(0.5, RATE), RATE)
    for _ in range(2):
        assert recording_lengths(open_source(path), RATE).samples.tolist() == [8000]
        (table,) = (tmp_path / "cache").rglob("lengths.parquet")
        table.write_text("damaged")
    assert len(opened) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "file"))
    assert recording_lengths(open_source(path), RATE).samples.tolist() == [8000]
    assert "cannot be written" in caplog.text


def test_worker_processes_measure_many_files(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lengths, "_FEW", 5)
    for number in range(9):
        write(tmp_path / f"{number}.wav", noise(0.1 + number / 20, RATE), RATE)
    for _ in range(2):
        found = recording_lengths(open_source(tmp_path), RATE)
        assert found.samples.tolist() == [1600 + 800 * number for number in range(9)]


def test_lengths_in_memory_and_in_an_index_need_no_reading(tmp_path, opened):
    clips = np.ones((3, 8000), np.float32)
    assert recording_lengths(ArraySource(clips, 8000), RATE).samples.tolist() == [16_000] * 3
    ragged = ArraySource([np.ones((2, 100)), np.ones(7)], RATE)
    assert recording_lengths(ragged, RATE).samples.tolist() == [100, 7]
    shard(tmp_path / "a.tar", range(3), 0.5)
    assert recording_lengths(open_source(tmp_path / "a.tar"), RATE).samples.tolist() == [8000] * 3
    assert opened == []


def test_clips_of_tars_are_measured_once_unless_they_are_remote(tmp_path, opened, monkeypatch):
    tar = shard(tmp_path / "a.tar", range(3), 0.5, "FLAC")
    for _ in range(2):
        assert recording_lengths(open_source(tar), RATE).samples.tolist() == [8000] * 3
    assert opened == ["0000.flac", "0001.flac", "0002.flac"]
    monkeypatch.setattr(ShardSource, "is_remote", lambda source: True)
    monkeypatch.setattr(ShardSource, "remote_shard", lambda source, index: RemoteShard("https://host/a.tar", 1))
    assert recording_lengths(open_source(tar), RATE) is None
    rows = training_rows(open_source(tar), BestRQ2Config(max_seconds=1.25), 0)
    crops = [rows.segments(0, row) for row in range(len(rows))]
    assert sorted(crops) == [[Segment(index, None, 20_000)] for index in range(3)]
