"""Embedding and prediction of a corpus: the model's own numbers, in order, with every bad file listed."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import bestrq2
from bestrq2 import cli
from bestrq2.data.audio import read_audio, read_span
from bestrq2.data.parts import PartsFolder
from bestrq2.data.shards import files as shards_files
from bestrq2.data.shards import remote
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.inference import corpus
from bestrq2.inference.classifier import load_classifier
from bestrq2.inference.embedder import weights_hash
from example_sounds import RATE, scene

pytestmark = pytest.mark.usefixtures("small_blocks")


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wav"))


def rows(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    assert len(set(table["path"].to_pylist())) == len(table)
    return dict(zip(table["path"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32), strict=True))


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_what_the_embedder_gives(embed, model, recordings, tmp_path):
    output = embed(str(recordings), tmp_path / "e.parquet")
    table = pq.read_table(output)
    assert table.schema.names == ["path", "seconds", "embedding"]
    embedder = bestrq2.load(model, "cpu")
    found = rows(output)
    assert list(found) == [str(path) for path in files(recordings)]
    for path in files(recordings):
        np.testing.assert_allclose(found[str(path)], embedder.embed(path).clip[0], atol=1e-5)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["bestrq2"] == bestrq2.__version__
    assert metadata["weights_sha256"] == weights_hash(embedder.model)
    assert (metadata["rows"], metadata["phases"], metadata["model"]) == ("clips", "1", "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "recordings"]


def test_recordings_that_end_early_are_used_and_listed(embed, predict, recordings, tmp_path, monkeypatch):
    """One of them is read in several spans, of which the last tells."""
    monkeypatch.setattr("bestrq2.data.spans.SPAN_SECONDS", 2.5)
    for name in ("clip0.wav", "clip2.wav"):
        path = recordings / name
        path.write_bytes(path.read_bytes()[: -4 * RATE])
    for run in (embed, predict):
        output = run(str(recordings), tmp_path / "out.csv")
        assert len(csv_rows(output)) == 5
        listed = csv_rows(tmp_path / "out.csv.shorter.csv")
        assert [(Path(row["path"]).name, row["announced"], row["found"]) for row in listed] == [
            ("clip0.wav", "2.500", "1.500"),
            ("clip2.wav", "6.250", "5.250"),
        ]
        assert not (tmp_path / "out.csv.rejected.csv").exists()
        output.unlink()


def test_frames_are_rows_with_their_time_and_row_groups_are_full(embed, model, recordings, tmp_path, monkeypatch):
    output = embed(str(recordings), tmp_path / "f.parquet", frames=True, phases=2)
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
    monkeypatch.setattr(corpus, "_GROUP_BYTES", 4 * 4 * (32 + 4))
    groups = pq.ParquetFile(embed(str(recordings), tmp_path / "g.parquet", frames=True, phases=2))
    sizes = [groups.metadata.row_group(number).num_rows for number in range(groups.metadata.num_row_groups)]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {4}
    assert groups.read().equals(table)


@pytest.mark.parametrize("multi_label", [False, True])
def test_predictions_are_means_over_windows_as_csv_and_as_parquet(classifiers, recordings, tmp_path, multi_label):
    (recordings / "bad.wav").write_bytes(b"this is no audio" * 100)
    outputs = [
        bestrq2.predict(classifiers(multi_label), str(recordings), tmp_path / name, num_workers=0, device="cpu")
        for name in ("p.csv", "p.parquet")
    ]
    table = csv_rows(outputs[0])
    assert [list(row) for row in table[:1]] == [["path", "label", "p(a)", "p(b)", "p(c)"]]
    classifier = load_classifier(classifiers(multi_label), "cpu")
    assert [row["path"] for row in table] == [str(path) for path in files(recordings) if path.name != "bad.wav"]
    for row in table:
        samples = read_audio(row["path"], RATE)
        windows = [samples[start : start + 40_000] for start in range(0, len(samples), 40_000)]
        with torch.no_grad():
            logits = torch.cat([classifier.model(torch.from_numpy(one)[None]).logits for one in windows])
        each = logits.sigmoid() if multi_label else logits.softmax(1)
        expected = np.average(each.numpy(), axis=0, weights=[len(one) for one in windows])
        found = np.array([float(row[f"p({name})"]) for name in "abc"])
        np.testing.assert_allclose(found, expected, atol=2e-6)
        chosen = found >= 0.5 if multi_label else found == found.max()
        assert row["label"] == ";".join(name for name, one in zip("abc", chosen, strict=True) if one)
    parquet = pq.read_table(outputs[1])
    assert parquet["label"].to_pylist() == [row["label"] for row in table]
    assert [f"{value:.6g}" for value in parquet["p(b)"].to_pylist()] == [row["p(b)"] for row in table]
    assert len(csv_rows(tmp_path / "p.csv.rejected.csv")) == 1


def test_a_missing_device_of_a_classifier_is_a_config_error(classifiers):
    with pytest.raises(ConfigError, match="device 'cuda:99'"):
        load_classifier(classifiers(False), "cuda:99")


def test_embeddings_as_csv_restore_every_bit(embed, recordings, tmp_path, caplog):
    table = pq.read_table(embed(str(recordings), tmp_path / "e.parquet"))
    output = embed(str(recordings), tmp_path / "e.csv")
    found = csv_rows(output)
    assert [row["path"] for row in found] == table["path"].to_pylist()
    vectors = np.array([[row[f"embedding_{place}"] for place in range(32)] for row in found], np.float32)
    assert np.array_equal(vectors, np.array(table["embedding"].to_pylist(), np.float32))
    with caplog.at_level("INFO"):
        embed(str(recordings), output)
    assert caplog.messages[-1] == f"{output}: is complete already"
    with pytest.raises(ConfigError, match="exists already"):
        embed(str(recordings), output, pooling="attention")


def test_the_readout_decides_the_width_and_is_in_the_metadata(embed, recordings, tmp_path):
    options = {"layers": "1+output", "frequency": "concat", "pooling": "mean+std"}
    output = embed(str(recordings), tmp_path / "e.parquet", **options)
    assert pq.read_schema(output).field("embedding").type.list_size == 2 * 2 * 8 * 32
    metadata = pq.read_schema(output).metadata
    assert {name: metadata[name.encode()].decode() for name in options} == options
    frames = pq.read_schema(embed(str(recordings), tmp_path / "f.parquet", frames=True, **options))
    assert frames.field("embedding").type.list_size == 2 * 8 * 32
    plain = pq.read_schema(embed(str(recordings), tmp_path / "p.parquet")).metadata
    assert (plain[b"layers"], plain[b"frequency"], plain[b"pooling"]) == (b"output", b"mean", b"mean")


@pytest.mark.parametrize("name", ["e.json", "embeddings", "e.parquet.gz"])
def test_other_suffixes_are_refused_before_any_work(name, tmp_path):
    for run in (bestrq2.embed, bestrq2.predict):
        with pytest.raises(ConfigError, match=r"the suffix must be \.parquet or \.csv"):
            run("absent model", "absent data", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_bad_files_are_listed_and_the_others_go_on(embed, predict, recordings, rejected, tmp_path):
    (recordings / "clip1x.wav").write_bytes(b"this is no audio" * 100)
    (recordings / "empty.wav").touch()
    soundfile.write(recordings / "none.wav", np.zeros(0, np.float32), RATE)
    bad = {str(recordings / name) for name in ("clip1x.wav", "empty.wav", "none.wav")}
    for output in (embed(str(recordings), tmp_path / "e.parquet"), predict(str(recordings), tmp_path / "p.parquet")):
        reasons = rejected(output)
        assert set(reasons) == bad
        assert all(reason and not reason.startswith(str(recordings)) for reason in reasons.values())
        paths = pq.read_table(output)["path"].to_pylist()
        assert paths == [str(path) for path in files(recordings) if str(path) not in bad]


def test_a_file_deleted_during_the_run_is_listed(embed, rejected, recordings, tmp_path, monkeypatch):
    original = read_span

    def deleting(*arguments):
        (recordings / "deeper" / "clip3.wav").unlink(missing_ok=True)
        return original(*arguments)

    monkeypatch.setattr("bestrq2.data.spans.read_span", deleting)
    output = embed(str(recordings), tmp_path / "e.parquet")
    ((name, reason),) = rejected(output).items()
    assert name == str(recordings / "deeper" / "clip3.wav")
    assert "does not exist" in reason
    assert len(pq.read_table(output)) == 4


def test_a_recording_that_the_model_refuses_does_not_spoil_the_others(
    embed, rejected, recordings, tmp_path, monkeypatch
):
    original = bestrq2.Embedder.embed

    def refusing(self, audio, **options):
        if any(one.name.endswith("clip1.wav") for one in audio):
            raise AudioError("is refused.")
        return original(self, audio, **options)

    monkeypatch.setattr(bestrq2.Embedder, "embed", refusing)
    soundfile.write(recordings / "loud.wav", 1000 * scene(20_000), RATE, subtype="FLOAT")
    output = embed(str(recordings), tmp_path / "e.parquet")
    reasons = rejected(output)
    assert reasons.pop(str(recordings / "deeper" / "clip1.wav")) == "is refused."
    assert reasons.pop(str(recordings / "loud.wav")).startswith("holds samples of ")
    assert not reasons
    assert len(pq.read_table(output)) == 4


def test_parts_of_another_model_or_other_options_are_not_mixed_in(
    embed, model, tiny_encoder, recordings, tmp_path, monkeypatch
):
    output, other = tmp_path / "e.parquet", tmp_path / "other"
    changed = tiny_encoder(max_seconds=2.5)
    with torch.no_grad():
        changed.patch_embedding.bias[0] += 1
    changed.save_pretrained(other)
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "join_once", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(str(recordings), output)
    cases = [
        ((other, recordings, {}), "model, weights_sha256"),
        ((model, recordings, {"frames": True}), "rows"),
        ((model, recordings, {"phases": 2}), "phases"),
        ((model, recordings / "deeper", {}), "source, source_names_blake2b"),
    ]
    for (source, data, options), different in cases:
        with pytest.raises(ConfigError, match=rf"e.parquet.parts: holds parts of another .*\(different: {different}\)"):
            bestrq2.embed(source, str(data), output, device="cpu", num_workers=0, **options)
    embed(str(recordings), output)
    assert len(rows(output)) == 5


def test_a_finished_output_is_left_as_it_is(embed, recordings, tmp_path, caplog):
    output = embed(str(recordings), tmp_path / "e.parquet")
    written = output.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        embed(str(recordings), output)
    assert caplog.messages[-1] == f"{output}: is complete already"
    assert output.stat().st_mtime_ns == written
    soundfile.write(recordings / "new.wav", scene(20_000), RATE)
    with pytest.raises(ConfigError, match=r"e.parquet: exists already; delete it or name another --output"):
        embed(str(recordings), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "recordings"]
    (tmp_path / "p.csv").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        embed(str(recordings), tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text() == "precious"


def test_any_number_of_workers_gives_the_same_bytes(embed, recordings, tmp_path):
    outputs = [embed(str(recordings), tmp_path / f"{count}.parquet", num_workers=count) for count in (0, 3)]
    assert len({output.read_bytes() for output in outputs}) == 1


def test_recordings_of_similar_length_go_through_the_model_together(embed, tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    lengths = np.random.default_rng(3).integers(3_000, 40_000, size=40)
    for number, length in enumerate(lengths):
        soundfile.write(folder / f"{number:02d}.wav", scene(length, number), RATE, subtype="FLOAT")
    monkeypatch.setattr("bestrq2.data.parts.BLOCK", 64)
    monkeypatch.setattr(corpus, "_CALL_SECONDS", 10.0)
    batches: list[list[int]] = []
    original = bestrq2.Embedder.embed

    def counting(self, audio, **options):
        batches.append([int(Path(one.name).stem) for one in audio])
        return original(self, audio, **options)

    monkeypatch.setattr(bestrq2.Embedder, "embed", counting)
    output = embed(str(folder), tmp_path / "e.parquet")
    assert sorted(number for batch in batches for number in batch) == list(range(40))
    assert all(len(batch) * max(lengths[batch]) <= 10.0 * RATE for batch in batches)
    assert len(batches) < 10
    assert pq.read_table(output)["path"].to_pylist() == [str(path) for path in files(folder)]
    np.testing.assert_allclose(pq.read_table(output)["seconds"].to_numpy(), lengths / RATE)


def test_a_corpus_of_broken_files_leaves_the_list_only(embed, rejected, tmp_path):
    folder, output = tmp_path / "broken", tmp_path / "e.parquet"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.wav").write_bytes(b"this is no audio" * 100)
    for _ in range(2):  # the second time too
        with pytest.raises(
            DataError, match=r"not one of 3 recordings could be embedded; the first, .*0.wav, is not audio"
        ):
            embed(str(folder), output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "e.parquet.rejected.csv"]
        assert len(rejected(output)) == 3
    soundfile.write(folder / "0.wav", scene(20_000), RATE)
    embed(str(folder), output)
    assert list(rows(output)) == [str(folder / "0.wav")]
    assert len(rejected(output)) == 2  # the repaired file is not listed any more


def test_missing_sources_wrong_settings_and_unwritable_places_are_refused(embed, predict, model, recordings, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        embed(str(tmp_path / "absent"), tmp_path / "e.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        embed(str(recordings), tmp_path / "file" / "e.parquet")
    with pytest.raises(ConfigError, match=r"/proc/e.parquet.parts.*: cannot be created .*; name another --output"):
        embed(str(recordings), Path("/proc/e.parquet"))
    with pytest.raises(ConfigError, match="phases must be a whole number"):
        embed(str(recordings), tmp_path / "e.parquet", phases=0)
    with pytest.raises(ConfigError, match="num_workers is -1; it must be 0 or more"):
        embed(str(recordings), tmp_path / "e.parquet", num_workers=-1)
    with pytest.raises(ConfigError, match=r"threshold is 1\.5; it must be between 0 and 1"):
        predict(str(recordings), tmp_path / "p.csv", threshold=1.5)
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        predict(str(recordings), tmp_path / "p.csv", batch_size=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "recordings"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rate", [RATE, 22_050])
def test_long_recordings_are_read_in_spans(embed, predict, model, tmp_path, monkeypatch, rate, workers):
    monkeypatch.setattr("bestrq2.data.spans.SPAN_SECONDS", 2.0)
    for name, waveform in (("a", scene(rate, 2)), ("b", scene(11 * rate, 1)), ("c", scene(rate, 3))):
        soundfile.write(tmp_path / f"{name}.wav", waveform, rate, subtype="FLOAT")
    (tmp_path / "list.txt").write_text("a.wav\nb.wav\nc.wav\n")
    output = embed(str(tmp_path / "list.txt"), tmp_path / "e.parquet", num_workers=workers, frames=True)
    table, embedder = pq.read_table(output), bestrq2.load(model, "cpu")
    expected = [embedder.embed(tmp_path / f"{name}.wav") for name in "abc"]
    frames = np.concatenate([one.frames[0] for one in expected])
    atol = 0.02 if rate != RATE else 1e-5  # spans are resampled one by one
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), frames, atol=atol)
    np.testing.assert_allclose(table["time"].to_numpy(), np.concatenate([one.timestamps[0] for one in expected]))
    clips = pq.read_table(embed(str(tmp_path / "list.txt"), tmp_path / "c.parquet", num_workers=workers))
    np.testing.assert_allclose(clips["seconds"].to_numpy(), [1, 11, 1])
    whole = pq.read_table(predict(str(tmp_path / "list.txt"), tmp_path / "p.parquet", num_workers=workers))
    monkeypatch.setattr("bestrq2.data.spans.SPAN_SECONDS", 300.0)
    at_once = pq.read_table(predict(str(tmp_path / "list.txt"), tmp_path / "q.parquet"))
    np.testing.assert_allclose(whole["p(a)"].to_numpy(), at_once["p(a)"].to_numpy(), atol=atol)


def test_a_damaged_span_of_a_long_recording_rejects_it_alone(embed, rejected, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr("bestrq2.data.spans.SPAN_SECONDS", 2.0)
    waveform = scene(9 * RATE, 1)
    waveform[5 * RATE] = np.nan
    soundfile.write(recordings / "clip3.wav", waveform, RATE, subtype="FLOAT")
    output = embed(str(recordings), tmp_path / "e.parquet")
    assert rejected(output) == {str(recordings / "clip3.wav"): "from 4 s on: holds NaN or infinite samples."}
    assert len(rows(output)) == 5


def test_long_recordings_are_parts_of_their_own(embed, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr("bestrq2.data.parts.BLOCK", 64)
    monkeypatch.setattr("bestrq2.data.parts.PART_SECONDS", 2.5)
    monkeypatch.setattr("bestrq2.data.spans.SPAN_SECONDS", 5.0)
    seen: list[int] = []
    original = PartsFolder.write
    monkeypatch.setattr(
        PartsFolder, "write", lambda self, part, *rest: seen.append(part.stop[0]) or original(self, part, *rest)
    )
    embed(str(recordings), tmp_path / "e.parquet")
    assert seen == [1, 2, 4, 5]  # of 2.5, 6.25, 2.06 + 0.75, and 0.03 s: a part ends after 2.5 s


def test_paths_are_those_of_the_source_and_odd_names_are_written_out(embed, predict, recordings, tmp_path, monkeypatch):
    os.rename(recordings / "clip0.wav", os.fsencode(recordings) + b"/caf\xe9.wav")
    (recordings / "bad\n.wav").touch()
    monkeypatch.chdir(recordings)
    outputs = embed(".", tmp_path / "e.parquet"), predict("../recordings", tmp_path / "p.parquet")
    paths = [pq.read_table(output)["path"].to_pylist() for output in outputs]
    assert paths[0] == paths[1]
    assert f"{recordings}/caf\\xe9.wav" in paths[0]
    clips = pq.read_table(embed("soundworld:3", tmp_path / "s.parquet"))
    assert clips["path"].to_pylist() == ["soundworld clip 0", "soundworld clip 1", "soundworld clip 2"]


def test_mixtures_hold_each_recording_once(embed, recordings, tmp_path):
    soundfile.write(tmp_path / "one.wav", scene(20_000, 9), RATE)
    (tmp_path / "mix.yaml").write_text("sources: [{data: recordings, weight: 9}, {data: one.wav}]")
    paths = pq.read_table(embed(str(tmp_path / "mix.yaml"), tmp_path / "e.parquet"))["path"].to_pylist()
    assert len(set(paths)) == len(paths) == 6
    assert paths[-1] == str(tmp_path / "one.wav")


def test_the_hash_of_weights_is_their_identity(tiny_encoder):
    first, again = (bestrq2.Embedder(tiny_encoder(), "cpu", name) for name in ("a", "b"))
    assert weights_hash(first.model) == weights_hash(again.model)
    with torch.no_grad():
        again.model.encoder.norm.bias[3] += 1e-6
    assert weights_hash(first.model) != weights_hash(again.model)
    half = bestrq2.Embedder(tiny_encoder().to(torch.bfloat16), "cpu")
    assert len({weights_hash(first.model), weights_hash(half.model)}) == 2


def test_the_command_prints_the_output_and_counts(model, recordings, tmp_path, capsys, caplog):
    output = tmp_path / "e.parquet"
    with caplog.at_level("INFO"):
        assert cli.run(["embed", str(model), str(recordings), "--output", str(output), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert caplog.messages[-1] == f"{output}: 5 recordings embedded, 0 rejected"


def test_remote_tars_are_embedded_and_an_unreachable_one_stops_the_run(embed, recordings, tmp_path, monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(shards_files.OPEN_CACHED, "files", type(shards_files.OPEN_CACHED.files)())
    for number, names in enumerate((["clip0", "clip2"], ["clip4"])):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                tar.add(recordings / f"{name}.wav", f"{name}.wav")
        memory.pipe(f"/corpus/{number}.tar", buffer.getvalue())
    url = "memory://corpus/{0,1}.tar"
    local = rows(embed(str(recordings), tmp_path / "l.parquet"))
    found = rows(embed(url, tmp_path / "r.parquet"))
    assert list(found) == [f"memory://corpus/{name}.wav" for name in ("0.tar/clip0", "0.tar/clip2", "1.tar/clip4")]
    for name, vector in found.items():
        np.testing.assert_allclose(vector, local[str(recordings / name.rpartition("/")[2])], atol=1e-5)
    content = memory.cat("/corpus/1.tar")
    for cached in (tmp_path / "cache").rglob("*.tar"):
        cached.unlink()
    shards_files.OPEN_CACHED.files.clear()
    memory.rm("/corpus/1.tar")
    with pytest.raises(DataError, match=r"corpus/1.tar cannot be fetched"):
        embed(url, tmp_path / "s.parquet")
    assert PartsFolder(tmp_path / "s.parquet.parts").finished() == {(0, 0): (2, 0)}
    memory.pipe("/corpus/1.tar", content)
    assert embed(url, tmp_path / "s.parquet").read_bytes() == (tmp_path / "r.parquet").read_bytes()
