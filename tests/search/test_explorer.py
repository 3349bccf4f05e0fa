"""What the page of `bestrq2 explore` shows, without gradio."""

from __future__ import annotations

import base64
import csv
import io
import re
import sys

import numpy as np
import pytest
import soundfile

import bestrq2
from bestrq2 import cli
from bestrq2.errors import ConfigError
from bestrq2.search.explorer import Explorer
from bestrq2.search.table import EmbeddingTable


@pytest.fixture
def explorer(write_table, tmp_path) -> Explorer:
    """Thirty vectors in two folders, of which 3 and 4 are equal; half of them have labels."""
    vectors = np.random.default_rng(0).standard_normal((30, 8))
    vectors[4] = vectors[3]
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\n" + "".join(f"/corpus/{'ab'[row % 2]}/{row}.wav,bird\n" for row in range(15)))
    return Explorer(EmbeddingTable(write_table(vectors), labels), load=pytest.fail)


def rows_of(html: str) -> list[int]:
    return [int(row) for row in re.findall(r'data-play="(\d+)"', html)]


def test_the_map_fills_its_box_and_groups_are_ordered_by_size(explorer):
    shown = explorer.map("Label")
    points = np.frombuffer(base64.b64decode(shown["points"]), "<u2").reshape(-1, 2)
    assert points.min(axis=0).tolist() == [0, 0]
    assert points.max(axis=0).tolist() == [65535, 65535]
    groups = np.frombuffer(base64.b64decode(shown["groups"]), "<u2")
    names = np.array(shown["names"])[groups].tolist()
    assert names == ["bird"] * 15 + ["none"] * 15
    assert list(explorer.colourings) == ["Label", "Folder", "Cluster"]
    sizes = np.bincount(explorer.groups("Cluster")[1])
    assert sizes.tolist() == sorted(sizes, reverse=True)


def test_a_selection_on_the_map_becomes_rows_a_list_and_labels(explorer):
    bits = np.packbits(np.isin(np.arange(30), [0, 9, 29]), bitorder="little")
    rows = explorer.selected(base64.b64encode(bits).decode())
    assert rows.tolist() == [0, 9, 29]
    html = explorer.selection(rows)
    assert rows_of(html) == [0, 9, 29]
    assert "3 recordings, 00:03" in html
    assert explorer.labelled(rows, " frog ", "Label") == {0: "frog", 9: "frog", 29: "frog"}
    assert explorer.labelled(rows, "", "Folder") == {0: "a", 9: "b", 29: "b"}
    with pytest.raises(ConfigError, match="1 recording of the selection have no label"):
        explorer.labelled(rows, "", "Label")


def test_lists_name_near_duplicates_neighbours_and_outliers(explorer):
    duplicates = explorer.near_duplicates(0.999)
    assert rows_of(duplicates) == [3, 4]
    assert 'data-rows="4"' in duplicates
    assert rows_of(explorer.like(3))[0] == 4
    assert rows_of(explorer.outliers()) == explorer.table.outliers(30)[0].tolist()
    with pytest.raises(ConfigError, match="there is no row 30"):
        explorer.like(30)


def test_all_copies_are_selected_also_of_groups_that_are_not_listed(write_table):
    vectors = np.repeat(np.random.default_rng(0).standard_normal((80, 16)), 2, axis=0)
    duplicates = Explorer(EmbeddingTable(write_table(vectors)), load=pytest.fail).near_duplicates(0.999)
    assert len(rows_of(duplicates)) == 100
    assert "160 recordings in 80 groups" in duplicates
    copies = re.findall(r'data-rows="([\d ]+)"', duplicates)[0].split()
    assert sorted(map(int, copies)) == list(range(1, 160, 2))


def test_names_of_recordings_cannot_write_into_the_page(write_table):
    names = [f'/corpus/<script>/"{row}"><img>.wav' for row in range(3)]
    explorer = Explorer(EmbeddingTable(write_table(np.eye(3), names)), load=pytest.fail)
    html = explorer.selection(np.arange(3))
    assert "<script" not in html
    assert "<img" not in html
    assert "&quot;0&quot;&gt;&lt;img&gt;.wav" in html


def test_a_sound_is_found_with_its_place_and_played_from_there(corpus, model):
    embedder = bestrq2.load(model, "cpu")
    explorer = Explorer(EmbeddingTable(corpus / "clips.parquet"), load=lambda: embedder)
    sound = corpus / "sounds" / "a" / "0.wav"
    shown = re.findall(r'data-play="(\d+)" data-start="([\d.]+)"', explorer.nearest(str(sound)))
    hits = explorer.table.search(embedder, sound, count=10)
    assert [int(row) for row, _ in shown] == [hit.row for hit in hits]
    np.testing.assert_allclose([float(start) for _, start in shown], [hit.place.start for hit in hits], rtol=1e-4)
    late = max(hits, key=lambda hit: hit.place.start)
    samples, rate = soundfile.read(io.BytesIO(explorer.sound(late.row, late.place.start)))
    assert len(samples) / rate == pytest.approx(late.seconds - late.place.start, abs=0.01)


def test_exported_labels_are_those_of_a_table_that_probe_reads(corpus, tmp_path):
    from bestrq2.data.labels import load_labelled

    explorer = Explorer(EmbeddingTable(corpus / "clips.parquet"), load=pytest.fail)
    held = explorer.labelled(np.arange(10), "", "Folder")
    output = explorer.table.write_selection(tmp_path / "out.csv", list(held), list(held.values()))
    assert {row["label"] for row in csv.DictReader(output.open())} == {"a", "b"}
    (task,) = load_labelled(output)
    assert task.classes == ("a", "b")
    assert len(task.train) + len(task.test) == 10


def test_without_gradio_the_command_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.run(["explore", "e.parquet"]) == 2
    assert capsys.readouterr().err == "bestrq2 explore: explore needs gradio: pip install 'bestrq2[explore]'\n"
