"""Every kind of source is embedded whole: tars, remote tars, HDF5, mixtures, long recordings, files that vanish."""

from __future__ import annotations

import io
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

import bestrq2
from bestrq2.data.transfer import Shard
from bestrq2.errors import BestRQ2Error
from bestrq2.inference.corpus import reading, tasks, work
from bestrq2.inference.corpus.command import embed_corpus
from bestrq2.inference.corpus.parts import PartsFolder
from example_sounds import RATE, scene

pytestmark = pytest.mark.usefixtures("small_blocks")

SAMPLES = [20_000, 31_000, 8_000, 45_000, 16_000]


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, scene(SAMPLES[number], number), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three tars with 3, 0 and 2 recordings."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, members in enumerate(([0, 1, 2], [], [3, 4])):
        names = {f"{member}.wav": encoded(member) for member in members} or {"none.txt": b"no audio"}
        write_tar(folder / f"{number}.tar", names)
    return folder


@pytest.fixture
def embed(model, tmp_path):
    return partial(embed_corpus, str(model), output=tmp_path / "e.parquet", device="cpu")


def check(output: Path, model: Path, names: list[str]) -> None:
    """The result is what the embedder gives for the five recordings one by one."""
    table = pq.read_table(output)
    assert table["path"].to_pylist() == names
    np.testing.assert_allclose(table["seconds"].to_numpy(), np.array(SAMPLES) / RATE)
    embedder = bestrq2.load(model, "cpu")
    for number, vector in enumerate(table["embedding"].to_pylist()):
        expected = embedder.embed(scene(SAMPLES[number], number)).clip[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_members_of_tars(embed, model, tars):
    (tars / "1.tar").unlink()
    output = embed(str(tars))
    check(
        output,
        model,
        [f"{tars}/{tar}.tar/{member}.wav" for tar, members in ((0, "012"), (2, "34")) for member in members],
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_tars_are_embedded_as_they_stream_in(embed, model, tars, workers):
    url = f"file://{tars}/{{0..2}}.tar"
    output = embed(url, num_workers=workers)
    names = [f"file://{tars}/{tar}.tar/{member}.wav" for tar, members in ((0, "012"), (2, "34")) for member in members]
    check(output, model, names)


@pytest.mark.parametrize("stop", range(6))  # after so many parts: three of recordings and three ends
def test_a_stream_goes_on_where_it_was(embed, tars, tmp_path, monkeypatch, stop):
    url, written, opened = f"file://{tars}/{{0..2}}.tar", [], []
    write, start = PartsFolder.write, Shard.__init__

    def interrupted(self, part, made_by):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append((part.lane, part.start, part.stop))
        write(self, part, made_by)

    def opening(self, url, patience):
        opened.append(url)
        start(self, url, patience)

    whole = embed(url, output=tmp_path / "whole.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(url)
    assert written == [(0, 0, 2), (0, 2, 3), (0, 3, 3), (1, 0, 0), (2, 0, 2), (2, 2, 2)][:stop]
    monkeypatch.setattr(Shard, "__init__", opening)
    assert embed(url).read_bytes() == whole.read_bytes()
    finished = sum(first == last for _, first, last in written)
    assert len(opened) == 1 + 3 - finished  # the first one is looked at before; no finished one is fetched again


def test_a_remote_tar_that_breaks_off_or_is_gone_is_listed(embed, rejected, tars, caplog):
    content = (tars / "2.tar").read_bytes()
    (tars / "2.tar").write_bytes(content[: len(content) - 40_000])
    (tars / "1.tar").unlink()
    with caplog.at_level("INFO"):
        output = embed(f"file://{tars}/{{0..2}}.tar")
    reasons = rejected(output)
    assert list(reasons) == [f"file://{tars}/1.tar", f"file://{tars}/2.tar"]
    assert reasons[f"file://{tars}/1.tar"].startswith("could not be fetched")
    assert len(pq.read_table(output)) == 4
    assert caplog.messages[-1].startswith(f"{output}: 4 recordings embedded, 0 rejected, 2 shards damaged; see ")


def test_a_network_that_fails_stops_the_run_and_loses_nothing(embed, model, tars, monkeypatch):
    gone = tars / "2.tar"
    command = f"pipe:cat {tars}/{{0,2}}.tar; test -e {tars}/works"
    monkeypatch.setattr("bestrq2.data.transfer.Patience.__init__.__defaults__", ((), 5.0, True))
    (tars / "works").touch()
    original = reading.decode_span

    def breaking(source, rate, task):
        (tars / "works").unlink(missing_ok=True)
        return original(source, rate, task)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "decode_span", breaking)
        with pytest.raises(BestRQ2Error, match=r"cannot be fetched .*; see to the network and run the same command"):
            embed(command, num_workers=0)
    (tars / "works").touch()
    assert len(pq.read_table(embed(command))) == 5
    assert gone.exists()


def test_rows_of_hdf5(embed, model, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        rows = file.create_dataset("waveform", (5, max(SAMPLES)), np.float32)
        for number, samples in enumerate(SAMPLES):
            rows[number, :samples] = scene(samples, number)
        file.create_dataset("audio_name", data=np.array([f"clip{number}" for number in range(5)], "S"))
        file.attrs["sample_rate"] = RATE
    check(embed(str(tmp_path / "a.h5")), model, [f"{tmp_path}/a.h5/clip{number}" for number in range(5)])


def test_mixtures_hold_each_recording_once(embed, tars, tmp_path):
    soundfile.write(tmp_path / "one.wav", scene(20_000, 9), RATE)
    (tars / "1.tar").unlink()
    (tmp_path / "mix.yaml").write_text("sources: [{data: tars, weight: 9}, {data: one.wav}]")
    paths = pq.read_table(embed(str(tmp_path / "mix.yaml")))["path"].to_pylist()
    assert len(set(paths)) == len(paths) == 6
    assert paths[-1] == str(tmp_path / "one.wav")


@pytest.mark.parametrize("kind", ["file", "stream", "resampled"])
@pytest.mark.parametrize("workers", [0, 2])
def test_long_recordings_go_through_a_file_that_is_gone_afterwards(embed, model, tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr(tasks, "SPAN_SECONDS", 2.0)
    rate = 22_050 if kind == "resampled" else RATE
    long, short = scene(11 * rate, 1), scene(rate, 2)
    for name, waveform in (("a", short), ("b", long), ("c", short)):
        soundfile.write(tmp_path / f"{name}.wav", waveform, rate, subtype="FLOAT")
    (tmp_path / "list.txt").write_text("a.wav\nb.wav\nc.wav\n")
    source = str(tmp_path / "list.txt")
    if kind == "stream":
        write_tar(tmp_path / "l.tar", {f"{name}.wav": (tmp_path / f"{name}.wav").read_bytes() for name in "abc"})
        source = f"file://{tmp_path}/l.tar"
    output = embed(source, num_workers=workers, frames=True)
    table, embedder = pq.read_table(output), bestrq2.load(model, "cpu")
    expected = [embedder.embed(tmp_path / f"{name}.wav") for name in "abc"]
    frames = np.concatenate([one.frames[0] for one in expected])
    atol = 0.02 if kind == "resampled" else 1e-5  # spans are resampled one by one
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), frames, atol=atol)
    np.testing.assert_allclose(table["time"].to_numpy(), np.concatenate([one.timestamps[0] for one in expected]))
    assert not output.with_name("e.parquet.parts").exists()


def test_long_recordings_are_parts_of_their_own(embed, model, recordings, monkeypatch):
    monkeypatch.setattr(work, "BLOCK", 64)
    monkeypatch.setattr(work, "PART_SECONDS", 2.0)
    seen = []
    original = PartsFolder.write
    monkeypatch.setattr(
        PartsFolder, "write", lambda self, part, *rest: seen.append(part.stop) or original(self, part, *rest)
    )
    monkeypatch.setattr("bestrq2.inference.corpus.sharing.BLOCK", 64)
    embed(str(recordings))
    assert seen == [1, 2, 3, 5]  # of 2.5, 6.25, 2.06, and 0.75 and 0.03 s


def test_a_damaged_stretch_of_a_long_recording_rejects_it(embed, rejected, recordings, monkeypatch):
    monkeypatch.setattr(tasks, "SPAN_SECONDS", 2.0)
    waveform = scene(9 * RATE, 1)
    waveform[5 * RATE] = np.nan
    soundfile.write(recordings / "nan.wav", waveform, RATE, subtype="FLOAT")
    output = embed(str(recordings))
    assert rejected(output) == {str(recordings / "nan.wav"): "from 4 s on: holds NaN or infinite samples."}


def test_a_file_deleted_during_the_run_is_listed(embed, rejected, recordings, monkeypatch):
    original = reading.decode_span

    def deleting(source, rate, task):
        span = original(source, rate, task)
        (recordings / "deeper" / "clip3.wav").unlink(missing_ok=True)
        return span

    monkeypatch.setattr(reading, "decode_span", deleting)
    output = embed(str(recordings), num_workers=0)
    ((name, reason),) = rejected(output).items()
    assert name == str(recordings / "deeper" / "clip3.wav")
    assert "does not exist" in reason
    assert len(pq.read_table(output)) == 4


def test_a_recording_of_no_samples_is_listed(embed, rejected, recordings):
    soundfile.write(recordings / "none.wav", np.zeros(0, np.float32), RATE)
    output = embed(str(recordings))
    assert list(rejected(output)) == [str(recordings / "none.wav")]


def test_names_that_are_no_utf8_are_written_out(embed, recordings):
    odd = os.fsencode(recordings) + b"/caf\xe9.wav"
    os.rename(recordings / "clip0.wav", odd)
    paths = pq.read_table(embed(str(recordings)))["path"].to_pylist()
    assert f"{recordings}/caf\\xe9.wav" in paths


def test_one_recording_that_the_model_refuses_does_not_spoil_the_others(
    embed, rejected, model, recordings, monkeypatch
):
    original = bestrq2.Embedder.embed

    def refusing(self, audio, *arguments, **options):
        if any(len(one) == 12_000 for one in audio):
            raise bestrq2.errors.AudioError("is refused.")
        return original(self, audio, *arguments, **options)

    monkeypatch.setattr(bestrq2.Embedder, "embed", refusing)
    output = embed(str(recordings))
    assert rejected(output) == {str(recordings / "deeper" / "clip1.wav"): "is refused."}
    assert len(pq.read_table(output)) == 4
