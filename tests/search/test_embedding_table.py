"""An embedded corpus: neighbours, pairs and outliers equal brute force, and bad tables are refused by name."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bestrq2 import EmbeddingTable
from bestrq2.data.labels import load_labelled
from bestrq2.errors import ConfigError, DataError
from bestrq2.search import layout, neighbours


@pytest.fixture
def vectors() -> np.ndarray:
    """200 vectors that share a large part, as embeddings do, with rows 7 and 150 nearly equal."""
    random = np.random.default_rng(0)
    made = random.standard_normal((200, 12)).astype(np.float32) + 5
    made[150] = made[7] * 1.0001
    return made


@pytest.fixture
def table(write_table, vectors, monkeypatch) -> EmbeddingTable:
    monkeypatch.setattr(neighbours, "_BLOCK_VALUES", 200 * 17)  # blocks that do not divide the rows
    return EmbeddingTable(write_table(vectors))


def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    mean = vectors.astype(np.float64).mean(axis=0)
    centred, around = vectors - mean, query - mean
    return (centred @ around.T) / np.linalg.norm(centred, axis=1)[:, None] / np.linalg.norm(around, axis=1)


def test_nearest_rows_are_those_of_brute_force(table, vectors):
    query = np.random.default_rng(1).standard_normal(12) + 5
    expected = cosines(vectors, query[None])[:, 0]
    for count in (1, 10, 200, 300):
        rows, similarities = table.nearest(query, count)
        assert rows.tolist() == np.argsort(-expected, kind="stable")[:count].tolist()
        np.testing.assert_allclose(similarities, expected[rows], atol=1e-5)
    rows, similarities = table.nearest(7, 3)
    assert rows[0] == 150
    assert 7 not in rows
    assert similarities[0] == pytest.approx(1, abs=1e-4)


def test_near_duplicates_and_outliers_are_those_of_brute_force(table, vectors):
    everything = cosines(vectors, vectors)
    first, second = np.nonzero(np.triu(everything > 0.6, 1))
    order = np.argsort(-everything[first, second])
    pairs, similarities = table.near_duplicates(0.6)
    assert len(pairs) > 20
    assert pairs.tolist() == np.column_stack([first, second])[order].tolist()
    np.testing.assert_allclose(similarities, everything[first, second][order], atol=1e-5)
    assert table.near_duplicates(0.6, most=5)[0].tolist() == pairs[:5].tolist()
    np.fill_diagonal(everything, -np.inf)
    means = np.sort(everything, axis=1)[:, -4:].mean(axis=1)
    rows, lowest = table.outliers(200, neighbours=4)
    assert sorted(rows) == list(range(200))
    np.testing.assert_allclose(lowest, means[rows], atol=1e-5)
    assert (np.diff(lowest) >= 0).all()


def test_clusters_and_coordinates_keep_groups_together(write_table, monkeypatch):
    """Three groups of different size; most rows go between those of the sample."""
    monkeypatch.setattr(layout, "MOST_FOR_TSNE", 60)
    monkeypatch.setattr(layout, "MOST_FOR_CLUSTERS", 60)
    random = np.random.default_rng(0)
    group = random.permutation(np.repeat([0, 1, 2], [90, 60, 30]))
    made = 8 * np.eye(3, 70)[group] + 0.3 * random.standard_normal((180, 70))
    table = EmbeddingTable(write_table(made))
    assert table.clusters(3).tolist() == group.tolist()
    places, method = table.coordinates()
    assert places.shape == (180, 2)
    assert "t-SNE" in method
    assert "of 60 recordings" in method
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (group[distances.argmin(axis=1)] == group).mean() == 1
    with pytest.raises(ConfigError, match="at least one cluster"):
        table.clusters(0)


def test_a_single_recording_is_found(write_table):
    table = EmbeddingTable(write_table(np.ones((1, 3))))
    rows, similarities = table.nearest(np.array([1.0, 1.0, 0.0]))
    assert (rows.tolist(), similarities[0]) == ([0], pytest.approx((2 / 3) ** 0.5))
    assert table.nearest(0)[0].tolist() == []
    assert len(table.near_duplicates()[0]) == 0
    assert table.outliers()[0].tolist() == [0]
    assert table.coordinates()[0].shape == (1, 2)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (np.ones(11), "must be a vector of 12 finite values"),
        (np.full(12, np.nan), "must be a vector of 12 finite values"),
        (200, "has no row 200; rows are numbered from 0 to 199"),
    ],
    ids=["width", "nan", "row"],
)
def test_impossible_queries_are_refused(table, query, message):
    with pytest.raises(ConfigError, match=message):
        table.nearest(query)


def test_bad_tables_are_refused_by_name(write_table, vectors, tmp_path):
    def problem(path) -> str:
        with pytest.raises(DataError) as error:
            EmbeddingTable(path).nearest(0)
        assert str(error.value).startswith(f"{path}: ")
        return str(error.value)

    assert "is not there" in problem(tmp_path / "absent.parquet")
    (tmp_path / "e.csv").write_text("path,embedding_0\na.wav,1\n")
    assert "is not a Parquet file; write it by `bestrq2 embed" in problem(tmp_path / "e.csv")
    assert "do not say what" in problem(write_table(vectors, facts={"weights_sha256": None}))
    assert "do not say what" in problem(write_table(vectors, facts={"rows": "predictions"}))
    vectors[130, 3] = np.nan
    assert "row 130 holds NaN or infinite values" in problem(write_table(vectors))
    vectors[130, 3] = 0
    output = write_table(vectors)
    whole = pq.read_table(output)
    lists = whole["embedding"].to_pylist()
    lists[70] = None
    column = pa.array(lists, whole.schema.field("embedding").type)
    pq.write_table(whole.set_column(2, whole.schema.field("embedding"), column), output)
    assert "no embedding of 12 values" in problem(output)
    content = write_table(vectors).read_bytes()
    output.write_bytes(content[:200] + bytes(2000) + content[2200:])
    assert "is damaged" in problem(output)


def test_labels_come_from_the_file_a_list_or_the_embedded_list(write_table, vectors, tmp_path):
    files = [tmp_path / f"{name}.wav" for name in ("a", "b", "c")]
    for file in files:
        file.touch()
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\na.wav,dog\nc.wav,cat\n")
    output = write_table(vectors[:3], [str(file) for file in files], {"source": str(listed)})
    assert EmbeddingTable(output).labels == ["dog", "", "cat"]
    assert EmbeddingTable(output, listed).labels == ["dog", "", "cat"]
    other = tmp_path / "other.csv"
    other.write_text("path,label\nx.wav,dog\n")
    with pytest.raises(DataError, match="labels no recording"):
        _ = EmbeddingTable(output, other).labels
    whole = pq.read_table(output)
    pq.write_table(whole.append_column("label", pa.array(["x", None, "z"])), output)
    assert EmbeddingTable(output).labels == ["x", "", "z"]


def test_a_selection_is_a_labelled_task(write_table, vectors, tmp_path):
    files = [tmp_path / folder / f"{number}.wav" for number in range(12) for folder in ("cats", "dogs=1")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    table = EmbeddingTable(write_table(vectors[:24], [str(file) for file in files]))
    assert table.folders == ["cats", "dogs=1"] * 12
    (task,) = load_labelled(table.write_selection(tmp_path / "s.csv", [*range(20), 3, 5]))
    assert task.classes == ("cats", "dogs=1")
    assert len(task.train) + len(task.test) == 20
    table.write_selection(tmp_path / "s.csv", [4, 2], "-loud")
    assert (tmp_path / "s.csv").read_text() == f"path,label\n{files[4]},'-loud\n{files[2]},'-loud\n"
    table.write_selection(tmp_path / "s.csv", [0, 1], ["a;b", "a"])
    assert (tmp_path / "s.csv").read_text().splitlines()[0] == "path,labels"
    files[2].unlink()
    for rows, labels, message in (
        ([], None, "there are no recordings to write"),
        ([0, 1], ["a", ""], "has no label"),
        ([2], "a", "is no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            table.write_selection(tmp_path / "t.csv", rows, labels)
    assert not (tmp_path / "t.csv").exists()


def test_an_index_gives_the_same_rows_and_is_made_anew_for_another_file(write_table, vectors, monkeypatch):
    pytest.importorskip("lancedb")
    query = np.random.default_rng(1).standard_normal(12) + 5
    output = write_table(vectors)
    exact = [EmbeddingTable(output).nearest(one, 5) for one in (query, 7)]
    monkeypatch.setattr("bestrq2.search.table.MOST_RECORDINGS", 100)
    for _ in range(2):  # made, and found again
        for one, (rows, similarities) in zip((query, 7), exact, strict=True):
            found, cosines = EmbeddingTable(output).nearest(one, 5)
            assert found.tolist() == rows.tolist()
            np.testing.assert_allclose(cosines, similarities, atol=1e-5)
    with pytest.raises(ConfigError, match="holds 200 recordings; pairs, outliers, clusters and maps take up to 100"):
        EmbeddingTable(output).outliers()
    write_table(vectors[::-1])
    assert EmbeddingTable(output).nearest(49, 1)[0].tolist() == [192]


def test_more_recordings_than_memory_holds_name_the_extra(write_table, vectors, monkeypatch):
    monkeypatch.setattr("bestrq2.search.table.MOST_RECORDINGS", 100)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ConfigError, match=r"e\.parquet: holds 200 recordings, .*pip install 'bestrq2\[lancedb\]'"):
        EmbeddingTable(write_table(vectors)).nearest(0)
