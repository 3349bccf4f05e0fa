"""Embedding a corpus: the embedder's numbers in Parquet, bad files listed, nothing lost or doubled by a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import bestrq2
from bestrq2.errors import ConfigError, DataError
from bestrq2.inference.corpus import parts, sharing, work
from bestrq2.inference.corpus.command import embed_corpus
from bestrq2.inference.corpus.parts import PartsFolder
from bestrq2.inference.embedder import weights_hash
from example_sounds import RATE, scene

pytestmark = pytest.mark.usefixtures("small_blocks")


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wav"))


def rows(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    assert len(set(table["path"].to_pylist())) == len(table)
    return dict(zip(table["path"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32), strict=True))


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


def test_bad_files_are_listed_and_the_others_go_on(model, recordings, rejected, tmp_path):
    (recordings / "clip1x.wav").write_bytes(b"this is no audio" * 100)
    (recordings / "empty.wav").touch()
    output = embed_corpus(str(model), str(recordings), tmp_path / "e.parquet", device="cpu")
    reasons = rejected(output)
    assert set(reasons) == {str(recordings / "clip1x.wav"), str(recordings / "empty.wav")}
    assert all(reason and not reason.startswith(str(recordings)) for reason in reasons.values())
    assert set(rows(output)) == {str(path) for path in files(recordings)} - set(reasons)


def test_parts_of_another_model_or_other_options_are_not_mixed_in(
    model, tiny_encoder, recordings, tmp_path, monkeypatch
):
    output, other = tmp_path / "e.parquet", tmp_path / "other"
    changed = tiny_encoder(max_seconds=2.5)
    with torch.no_grad():
        changed.patch_embedding.bias[0] += 1
    changed.save_pretrained(other)
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed_corpus(str(model), str(recordings), output, device="cpu")
    cases = [
        ((other, recordings, {}), "model, weights_sha256"),
        ((model, recordings, {"frames": True}), "rows"),
        ((model, recordings, {"phases": 2}), "phases"),
        ((model, recordings / "deeper", {}), "source, source_names_blake2b"),
    ]
    for (source, corpus, options), different in cases:
        with pytest.raises(ConfigError, match=rf"e.parquet.parts: holds parts of another .*\(different: {different}\)"):
            embed_corpus(str(source), str(corpus), output, device="cpu", **options)
    embed_corpus(str(model), str(recordings), output, device="cpu")
    assert len(rows(output)) == 5


def test_a_finished_output_is_left_as_it_is(model, recordings, tmp_path, caplog):
    output = embed_corpus(str(model), str(recordings), tmp_path / "e.parquet", device="cpu")
    written = output.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        embed_corpus(str(model), str(recordings), output, device="cpu")
    assert caplog.messages[-1] == f"{output}: is complete already"
    assert output.stat().st_mtime_ns == written
    soundfile.write(recordings / "new.wav", scene(20_000), RATE)
    with pytest.raises(ConfigError, match="exists already"):
        embed_corpus(str(model), str(recordings), output, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "recordings"]


def test_any_number_of_workers_gives_the_same_bytes(model, recordings, tmp_path):
    outputs = [
        embed_corpus(str(model), str(recordings), tmp_path / f"{count}.parquet", device="cpu", num_workers=count)
        for count in (0, 1, 3)
    ]
    assert len({output.read_bytes() for output in outputs}) == 1


def test_row_groups_are_full_whatever_the_parts(model, recordings, tmp_path, monkeypatch):
    whole = embed_corpus(str(model), str(recordings), tmp_path / "w.parquet", frames=True, device="cpu")
    monkeypatch.setattr(parts, "_GROUP_BYTES", 4 * 4 * 32)
    cut = embed_corpus(str(model), str(recordings), tmp_path / "c.parquet", frames=True, device="cpu")
    groups = pq.ParquetFile(cut).metadata
    sizes = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {4}
    assert pq.read_table(cut).equals(pq.read_table(whole))


def test_recordings_of_like_lengths_go_through_the_model_together(model, tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(3)
    lengths = rng.integers(3_000, 40_000, size=40)
    for number, length in enumerate(lengths):
        soundfile.write(folder / f"{number:02d}.wav", scene(length, number), RATE, subtype="FLOAT")
    for module in (sharing, work):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(work, "CALL_SECONDS", 10.0)
    calls = []
    original = bestrq2.Embedder.embed

    def counting(self, audio, *arguments, **options):
        calls.append([len(one) for one in audio])
        return original(self, audio, *arguments, **options)

    monkeypatch.setattr(bestrq2.Embedder, "embed", counting)
    output = embed_corpus(str(model), str(folder), tmp_path / "e.parquet", device="cpu")
    batches = calls[1:]  # the first one finds out how wide an embedding is
    assert sorted(lengths) == [length for batch in batches for length in batch]
    assert all(len(batch) * max(batch) <= 10.0 * RATE for batch in batches)
    assert len(batches) < 10
    assert pq.read_table(output)["path"].to_pylist() == [str(path) for path in files(folder)]
    np.testing.assert_allclose(pq.read_table(output)["seconds"].to_numpy(), lengths / RATE)


def test_an_output_that_exists_is_not_overwritten(model, recordings, tmp_path):
    output = tmp_path / "e.parquet"
    output.write_text("precious")
    with pytest.raises(ConfigError, match=r"e.parquet: exists already; delete it or name another --output"):
        embed_corpus(str(model), str(recordings), output, device="cpu")
    assert output.read_text() == "precious"


def test_a_corpus_of_broken_files_leaves_the_list_only(model, rejected, tmp_path):
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
    with pytest.raises(ConfigError, match=r"/proc/e.parquet.parts.*: cannot be made .*; name another --output"):
        embed_corpus(str(model), str(recordings), Path("/proc/e.parquet"), device="cpu")


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
