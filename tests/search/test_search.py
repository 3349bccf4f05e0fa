"""Search by a sound: recordings ranked by similarity, and the stretch of each that is like the sound."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import soundfile

import bestrq2
from bestrq2 import EmbeddingTable, cli
from bestrq2.data.audio import read_audio
from bestrq2.errors import AudioError, ConfigError
from bestrq2.search.places import best_place, window_similarities
from example_sounds import RATE, scene


@pytest.fixture(scope="session")
def embedder(model) -> bestrq2.Embedder:
    return bestrq2.load(model, "cpu")


def test_windows_stay_in_their_recordings_and_equal_brute_force():
    random = np.random.default_rng(0)
    lengths = [1, 7, 3, 4, 30, 2]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    frames, query = random.standard_normal((starts[-1], 5)).astype(np.float32), np.eye(5, dtype=np.float32)[2]
    similarities = window_similarities(frames, starts, 4, query)
    for start, length in zip(starts[:-1], lengths, strict=True):
        own, width = slice(start, start + length), min(4, length)
        means = [frames[own][first : first + width].mean(axis=0) for first in range(length - width + 1)]
        expected = np.array([mean[2] / np.linalg.norm(mean) for mean in means])
        np.testing.assert_allclose(similarities[own][: len(expected)], expected, atol=1e-6)
        assert (similarities[own][len(expected) :] == -np.inf).all()
        place = best_place(similarities[own], 0.1 * np.arange(length) + 0.05, 0.1, 4)
        first = expected.argmax()
        assert place == pytest.approx((0.1 * first, 0.1 * (first + width), expected[first]), abs=1e-6)


@pytest.mark.parametrize("name", ["clips.parquet", "frames.parquet"])
def test_a_recording_finds_itself_and_a_part_of_it_finds_its_place(embedder, corpus, name):
    table = EmbeddingTable(corpus / name)
    assert len(table) == 10
    assert table.folders == ["a"] * 5 + ["b"] * 5
    durations = [soundfile.info(path).duration for path in table.paths]
    np.testing.assert_allclose(table.seconds, durations, atol=0.5)
    whole = table.search(embedder, table.paths[7], count=3)
    assert whole[0].row == 7
    assert whole[0].place.start == pytest.approx(0, abs=0.1)
    assert whole[0].place.stop == pytest.approx(table.seconds[7], abs=0.5)
    part = table.read(9, RATE, start=3.0, seconds=1.5)
    assert np.array_equal(part, read_audio(table.paths[9], RATE)[3 * RATE : 3 * RATE + len(part)])
    hits = table.search(embedder, part, count=10)
    assert sorted(hit.row for hit in hits) == list(range(10))
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    place = next(hit.place for hit in hits if hit.row == 9)
    assert place.start == pytest.approx(3, abs=0.5)
    assert place.stop == pytest.approx(4.5, abs=0.5)
    assert all(hit.place is None for hit in table.search(embedder, part, places=False))


def test_a_table_of_frames_holds_the_means_of_its_recordings(embedder, corpus, monkeypatch):
    """However the recordings are spread over the blocks in which the file is read."""
    monkeypatch.setattr("bestrq2.search.table._BATCH_ROWS", 7)
    frames, clips = EmbeddingTable(corpus / "frames.parquet"), EmbeddingTable(corpus / "clips.parquet")
    assert frames.paths == clips.paths
    vector = clips.embed(embedder, scene(20_000, 4)).vector
    for found, expected in zip(frames.nearest(vector), clips.nearest(vector), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_another_model_and_bad_sounds_are_refused(tiny_encoder, corpus, embedder, tmp_path):
    table = EmbeddingTable(corpus / "clips.parquet")
    other = bestrq2.Embedder(tiny_encoder(max_seconds=2.5, num_hidden_layers=1), "cpu", name="other")
    with pytest.raises(ConfigError, match=r"was made with another model \(model\) than other"):
        table.search(other, scene(20_000))
    with pytest.raises(AudioError, match="NaN"):
        table.search(embedder, np.full(20_000, np.nan, np.float32))
    with pytest.raises(AudioError, match=r"absent\.wav: the file does not exist"):
        table.search(embedder, tmp_path / "absent.wav")


def test_members_of_tars_are_read_and_deleted_recordings_have_no_place(model, embedder, corpus, tmp_path):
    files = sorted((corpus / "sounds").rglob("*.wav"))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for file in files[:4]:
            tar.add(file, file.name)
    copies = tmp_path / "copies"
    copies.mkdir()
    for file in files:
        (copies / file.name).write_bytes(file.read_bytes())
    embed = {"device": "cpu", "num_workers": 0}
    table = EmbeddingTable(bestrq2.embed(model, str(tmp_path / "c.tar"), tmp_path / "tar.parquet", **embed))
    assert np.array_equal(table.read(1, RATE), read_audio(files[1], RATE))
    table = EmbeddingTable(bestrq2.embed(model, str(copies), tmp_path / "files.parquet", **embed))
    (copies / files[-1].name).unlink()
    hits = table.search(embedder, scene(8_000, 3), count=10)
    assert [hit.path for hit in hits if hit.place is None] == [str(copies / files[-1].name)]
    row = next(hit.row for hit in hits if hit.place is None)
    with pytest.raises(AudioError, match="is missing by now"):
        table.read(row, RATE)
    for file in copies.iterdir():
        file.unlink()
    with pytest.raises(AudioError, match=r"0.wav: is missing by now, and .*copies cannot be opened"):
        EmbeddingTable(table.path).read(0, RATE)


def test_the_command_prints_recordings_with_their_places(model, corpus, capsys):
    sound = str(corpus / "sounds" / "a" / "4.wav")
    words = ["search", str(model), str(corpus / "clips.parquet"), sound]
    assert cli.run([*words, "--top", "3", "--device", "cpu"]) == 0
    header, first, *others = capsys.readouterr().out.splitlines()
    assert header.split() == ["similarity", "from", "(s)", "to", "(s)", "recording"]
    assert first.split() == ["1.000", "0.00", "3.12", sound]
    assert len(others) == 2
    assert cli.run([*words, "--no-places"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["1.000", "-", "-", sound]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, "demo", "was made with another model"),
        (2, "absent.parquet", "absent.parquet: is not there"),
        (3, "absent.wav", "absent.wav: the file does not exist"),
        (5, "0", "top is 0; it must be at least 1"),
    ],
    ids=["model", "embeddings", "sound", "top"],
)
def test_the_command_refuses_wrong_input_with_exit_code_2(
    model, corpus, capsys, tmp_path, monkeypatch, place, value, message
):
    monkeypatch.chdir(tmp_path)  # a folder "demo", as `make demo` leaves it, would be taken for the model
    words = ["search", str(model), str(corpus / "clips.parquet"), str(corpus / "sounds/a/4.wav"), "--top", "3"]
    words[place] = value
    assert cli.run(words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("bestrq2 search: ")
    assert message in errors[-1]
