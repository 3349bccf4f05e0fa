"""Embedding a corpus: the embedder's numbers in Parquet, bad files listed, nothing lost or doubled by a kill."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import bestrq2
from bestrq2.errors import ConfigError, DataError
from bestrq2.inference.corpus.command import embed_corpus
from bestrq2.inference.corpus.identity import weights_hash
from example_sounds import RATE, scene

LENGTHS = [40_000, 12_000, 100_000, 500, 33_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_encoder) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "model"
    tiny_encoder(max_seconds=2.5).save_pretrained(path)
    return path


@pytest.fixture
def recordings(tmp_path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "deeper").mkdir(parents=True)
    for index, length in enumerate(LENGTHS):
        name = folder / ("deeper" if index % 2 else "") / f"clip{index}.wav"
        soundfile.write(name, scene(length, index), RATE, subtype="FLOAT")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(corpus, "_PART", 2)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wav"))


def rows(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    assert len(set(table["path"].to_pylist())) == len(table)
    return dict(zip(table["path"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32), strict=True))


def rejected(output: Path) -> dict[str, str]:
    with output.with_name(f"{output.name}.rejected.csv").open() as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_the_table_holds_what_the_embedder_gives(model, recordings, tmp_path):
    output = tmp_path / "e.parquet"
    assert embed_corpus(str(model), str(recordings), output, device="cpu") == output
    table = pq.read_table(output)
    assert table.schema.names == ["path", "seconds", "embedding"]
    embedder = bestrq2.load(model, "cpu")
    found = rows(output)
    assert list(found) == [str(path) for path in files(recordings)]
    for path in files(recordings):
        np.testing.assert_allclose(found[str(path)], embedder.embed(path).clip[0], atol=1e-5)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["bestrq2"] == bestrq2.__version__
    assert metadata["weights_sha256"] == weights_hash(embedder)
    assert (metadata["rows"], metadata["phases"], metadata["model"]) == ("clips", "1", "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "recordings"]


def test_one_row_per_frame_with_its_time(model, recordings, tmp_path):
    output = embed_corpus(str(model), str(recordings), tmp_path / "f.parquet", frames=True, phases=2, device="cpu")
    table = pq.read_table(output)
    assert table.schema.names == ["path", "time", "embedding"]
    embedder = bestrq2.load(model, "cpu")
    paths = np.array(table["path"].to_pylist())
    times, vectors = np.array(table["time"].to_pylist()), np.array(table["embedding"].to_pylist())
    total = 0
    for path in files(recordings):
        expected = embedder.embed(path, phases=2)
        mine = paths == str(path)
        assert np.array_equal(times[mine], expected.timestamps[0])
        np.testing.assert_allclose(vectors[mine], expected.frames[0], atol=1e-5)
        total += mine.sum()
    assert total == len(table)


def test_bad_files_are_listed_and_the_others_go_on(model, recordings, tmp_path):
    (recordings / "clip1x.wav").write_bytes(b"this is no audio" * 100)
    (recordings / "empty.wav").touch()
    output = embed_corpus(str(model), str(recordings), tmp_path / "e.parquet", device="cpu")
    reasons = rejected(output)
    assert set(reasons) == {str(recordings / "clip1x.wav"), str(recordings / "empty.wav")}
    assert all(reason and not reason.startswith(str(recordings)) for reason in reasons.values())
    assert set(rows(output)) == {str(path) for path in files(recordings)} - set(reasons)


@pytest.mark.parametrize("interrupted_at", [1, 3, 4])
def test_an_interrupted_run_goes_on_without_gaps_or_doubles(model, recordings, tmp_path, monkeypatch, interrupted_at):
    (recordings / "aaa.wav").write_bytes(b"this is no audio" * 100)
    output, whole = tmp_path / "e.parquet", tmp_path / "whole.parquet"
    embed_corpus(str(model), str(recordings), whole, device="cpu")
    original, calls = bestrq2.Embedder.embed, []

    def counting(self, *arguments):
        calls.append(arguments[0])
        if len(calls) == interrupted_at + 1:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(bestrq2.Embedder, "embed", counting)
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(str(model), str(recordings), output, device="cpu")
    assert not output.exists()
    parts = sorted((tmp_path / "e.parquet.parts").iterdir())
    assert [part.name for part in parts] == [f"part-{index:08d}.parquet" for index in range(interrupted_at // 2)]
    before = len(calls)
    embed_corpus(str(model), str(recordings), output, device="cpu")
    assert len(calls) - before == 6 - 2 * len(parts)  # whole parts are not done again
    assert pq.read_table(output).equals(pq.read_table(whole))
    assert rejected(output) == rejected(whole)
    assert not (tmp_path / "e.parquet.parts").exists()


def test_a_kill_right_after_the_list_of_rejected_files_loses_none(model, recordings, tmp_path, monkeypatch):
    (recordings / "aaa.wav").write_bytes(b"this is no audio" * 100)
    output = tmp_path / "e.parquet"

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus.pq, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_corpus(str(model), str(recordings), output, device="cpu")
    assert list(rejected(output)) == [str(recordings / "aaa.wav")]
    embed_corpus(str(model), str(recordings), output, device="cpu")
    assert list(rejected(output)) == [str(recordings / "aaa.wav")]
    assert len(rows(output)) == 5


def test_parts_of_another_model_or_other_options_are_not_mixed_in(
    model, tiny_encoder, recordings, tmp_path, monkeypatch
):
    output, other = tmp_path / "e.parquet", tmp_path / "other"
    changed = tiny_encoder(max_seconds=2.5)
    with torch.no_grad():
        changed.patch_embedding.bias[0] += 1
    changed.save_pretrained(other)
    original = corpus._Job.join
    monkeypatch.setattr(corpus._Job, "join", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(str(model), str(recordings), output, device="cpu")
    monkeypatch.setattr(corpus._Job, "join", original)
    for source, options in ((other, {}), (model, {"frames": True}), (model, {"phases": 2})):
        with pytest.raises(ConfigError, match=r"e.parquet.parts: holds parts of another model or other options"):
            embed_corpus(str(source), str(recordings), output, device="cpu", **options)
    embed_corpus(str(model), str(recordings), output, device="cpu")
    assert len(rows(output)) == 5


def test_an_output_that_exists_is_not_overwritten(model, recordings, tmp_path):
    output = tmp_path / "e.parquet"
    output.write_text("precious")
    with pytest.raises(ConfigError, match=r"e.parquet: exists already; delete it or name another --output"):
        embed_corpus(str(model), str(recordings), output, device="cpu")
    assert output.read_text() == "precious"


def test_a_corpus_of_broken_files_leaves_the_list_only(model, tmp_path):
    folder, output = tmp_path / "broken", tmp_path / "e.parquet"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.wav").write_bytes(b"this is no audio" * 100)
    for _ in range(2):  # the second time too
        with pytest.raises(DataError, match=r"not one of 3 recordings could be embedded; see .*e.parquet.rejected.csv"):
            embed_corpus(str(model), str(folder), output, device="cpu")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "e.parquet.rejected.csv"]
        assert len(rejected(output)) == 3
    soundfile.write(folder / "0.wav", scene(20_000), RATE)
    embed_corpus(str(model), str(folder), output, device="cpu")
    assert list(rows(output)) == [str(folder / "0.wav")]
    assert len(rejected(output)) == 2  # the repaired file is not listed any more


def test_missing_sources_and_unwritable_places_are_refused(model, recordings, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        embed_corpus(str(model), str(tmp_path / "absent"), tmp_path / "e.parquet", device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        embed_corpus(str(model), str(recordings), tmp_path / "file" / "e.parquet", device="cpu")


def test_generated_clips_can_be_embedded(model, tmp_path):
    output = embed_corpus(str(model), "soundworld:3", tmp_path / "e.parquet", device="cpu")
    assert list(rows(output)) == ["soundworld clip 0", "soundworld clip 1", "soundworld clip 2"]


def test_the_hash_of_weights_is_their_identity(tiny_encoder):
    first, again = (bestrq2.Embedder(tiny_encoder(), "cpu", name) for name in ("a", "b"))
    assert weights_hash(first) == weights_hash(again)
    with torch.no_grad():
        again.model.encoder.norm.bias[3] += 1e-6
    assert weights_hash(first) != weights_hash(again)
    half = bestrq2.Embedder(tiny_encoder().to(torch.bfloat16), "cpu")
    assert len({weights_hash(first), weights_hash(half)}) == 2
