"""Mixtures: shares that match the weights, whatever reads them and from wherever."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import noise, write
from shard_crops import batches, fields

from bestrq2.data.loader import AllRejectedError, training_rows
from bestrq2.data.mixture import MixtureOrder, MixtureSource, apportioned, open_mixture
from bestrq2.data.open_source import open_source
from bestrq2.data.order import BatchSchedule, EpochOrder
from bestrq2.data.sources import ArraySource, SubsetSource, split_source
from bestrq2.errors import ConfigError, DataError

RATE = 16_000


def tones(count, name):
    return ArraySource([noise(0.3, RATE, seed=i + 1000 * len(name)) for i in range(count)], RATE, name)


def mixture(lengths=(7, 3, 20), weights=(2.0, 1.0, 1.0)):
    return MixtureSource("mix", tuple(tones(n, "abc"[i] * (i + 1)) for i, n in enumerate(lengths)), weights)


def component_of(source, index):
    return source.describe(index).split()[0]


def order_of(source, seed=0):
    """Order of the rows of a mixture, each of which holds one clip."""
    return training_rows(source, fields(0.3), seed).order()


def row(source, count, start=0, seed=0):
    order = order_of(source, seed)
    return [order(number) for number in range(start, start + count)]


def test_shares_match_the_weights_over_many_clips():
    source = mixture(weights=(0.5, 0.3, 0.2))
    found = Counter(component_of(source, index) for _, index in row(source, 5000))
    assert found == {"a": 2500, "bb": 1500, "ccc": 1000}


def test_shares_are_near_the_weights_already_in_few_clips():
    source = mixture(weights=(2.0, 1.0, 1.0))
    first = Counter(component_of(source, index) for _, index in row(source, 200))
    assert abs(first["a"] - 100) < 25
    assert row(source, 50)[:20] != sorted(row(source, 50)[:20])


def test_a_tiny_weight_comes_up_as_seldom_as_it_says():
    source = mixture(weights=(1.0, 1e-4, 1.0))
    order = order_of(source)
    places = [order(number)[1] for number in range(100_000)]
    assert sum(7 <= index < 10 for index in places) == 5


def test_shares_are_those_of_the_audio_however_full_the_rows_are():
    clips = {0.3: 40, 0.6: 30, 1.0: 10}  # three, one and one of them fill a row
    parts = [ArraySource(np.ones((count, round(16_000 * s)), np.float32), 16_000, f"{s}") for s, count in clips.items()]
    weights = (1.0, 2.0, 1.0)
    rows = training_rows(MixtureSource("mix", tuple(parts), weights), fields(), 0)
    order, heard = rows.order(), Counter()
    for number in range(4000):
        for segment in rows.segments(*order(number)):
            heard[int(np.searchsorted([40, 70], segment.recording, side="right"))] += segment.samples
    assert np.allclose([heard[part] / heard.total() for part in range(3)], [0.25, 0.5, 0.25], atol=0.005)


def test_no_clip_comes_again_before_all_of_its_component_were_there():
    source = mixture()
    seen = {}
    for epoch, index in row(source, 2000):
        seen.setdefault(component_of(source, index), []).append((epoch, index))
    for name, visits in seen.items():
        length = {"a": 7, "bb": 3, "ccc": 20}[name]
        for start in range(0, len(visits) - length, length):
            pass_ = visits[start : start + length]
            assert len({index for _, index in pass_}) == length
            assert {epoch for epoch, _ in pass_} == {start // length}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 5000),
    data=st.data(),
)
def test_any_place_is_a_pure_function_of_seed_and_number(lengths, seed, start, data):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(lengths), max_size=len(lengths)))
    starts = np.cumsum([0, *lengths])[:-1]

    def order():
        return MixtureOrder([EpochOrder(n, seed + i) for i, n in enumerate(lengths)], starts, weights, seed)

    whole = order()
    for number in range(start):
        if number % 97 == 0:
            whole(number)
    resumed = order()
    assert [whole(n) for n in range(start, start + 60)] == [resumed(n) for n in range(start, start + 60)]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 5000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_apportioned_shares_sum_up_and_are_off_by_less_than_one(total, weights):
    shares = apportioned(total, weights)
    assert shares.sum() == total
    assert np.all(np.abs(shares - total * np.array(weights) / sum(weights)) < 1)


def test_processes_share_the_row_of_one_without_overlap():
    source = mixture()
    whole = list(BatchSchedule(order_of(source), 6, start_step=3, max_steps=200))
    ranks = [list(BatchSchedule(order_of(source), 6, 3, 200, rank, 3)) for rank in range(3)]
    for step, shares in enumerate(zip(*ranks, strict=True)):
        assert sorted(itertools.chain(*shares), key=lambda key: key.place) == whole[step]


def test_workers_give_the_same_batches():
    found = [batches(mixture(), workers, 6, fields(0.3)) for workers in (0, 2)]
    for a, b in zip(*found, strict=True):
        assert a.recordings == b.recordings
        assert a.input_values.equal(b.input_values)
    assert len({name for batch in found[0] for name in batch.recordings}) > 10


def test_a_bad_recording_leaves_its_place_in_the_share_of_its_component_empty():
    bad = ArraySource([np.zeros(5000, np.float32), noise(0.3, RATE, 1), noise(0.3, RATE, 2)], RATE, "bad")
    source = MixtureSource("mix", (tones(5, "good"), bad), (1.0, 1.0))
    made = batches(source, steps=10, config=fields(0.4), rows=1)
    assert [entry for batch in made for entry in batch.rejected] == [
        ("bad clip 0", "is silent: no sample exceeds 0.0001 of full scale.")
    ]


def test_a_component_without_a_usable_recording_is_named():
    source = MixtureSource("mix", (tones(5, "good"), ArraySource(np.zeros((3, 500)), RATE, "bad")), (1.0, 1.0))
    with pytest.raises(AllRejectedError, match=r"mix: all 3 recordings were rejected; first: bad clip \d: is silent"):
        batches(source, steps=10, rows=1)


def test_a_mixture_reads_describes_and_travels_as_its_components_do():
    source = pickle.loads(pickle.dumps(mixture()))
    assert len(source) == 30
    assert [source.describe(i) for i in (0, 6, 7, 9, 10, 29)] == [
        "a clip 0", "a clip 6", "bb clip 0", "bb clip 2", "ccc clip 0", "ccc clip 19",
    ]  # fmt: skip
    crop = source.read(8, RATE, np.random.default_rng(0), 0.1)
    np.testing.assert_array_equal(crop, source.components[1].read(1, RATE, np.random.default_rng(0), 0.1))
    with source.opened(8) as decoder:
        assert decoder.measure() == 4800
    assert source.metadata(8) == {}
    with pytest.raises(IndexError):
        source.describe(30)


def test_every_component_is_split_in_proportion():
    source = mixture(lengths=(100, 60, 100), weights=(2.0, 1.0, 1.0))
    training, validation = split_source(source, 8, seed=1)
    names = [[part.describe(i) for i in range(len(part))] for part in (training, validation)]
    assert Counter(name.split()[0] for name in names[1]) == {"a": 4, "bb": 2, "ccc": 2}
    assert sorted(names[0] + names[1]) == sorted(source.describe(i) for i in range(260))
    assert training.weights == source.weights
    assert isinstance(validation.components[0], SubsetSource)
    single = MixtureSource("mix", (tones(1, "a"), tones(1, "b")), (1.0, 1.0))
    assert split_source(single, 4, seed=0)[1] is None


@pytest.fixture
def corpus(tmp_path):
    for folder in ("speech", "music"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            write(tmp_path / folder / f"{number}.wav", noise(0.3, RATE, number), RATE)
    (tmp_path / "list.txt").write_text("music/1.wav\n")
    return tmp_path


def declared(folder, text, name="mix.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_yaml_file_declares_a_mixture(corpus, monkeypatch):
    monkeypatch.chdir("/")
    inner = declared(corpus, "sources:\n  - data: list.txt\n", "inner.yml")
    path = declared(corpus, f"sources:\n  - data: speech\n    weight: 3\n  - data: {inner}\n  - data: {corpus}/music\n")
    source = open_source(path)
    assert isinstance(source, MixtureSource)
    assert source.weights == (3.0, 1.0, 1.0)
    assert [len(part) for part in source.components] == [3, 1, 3]
    assert source.name == str(path)
    assert len(source.read(3, RATE, np.random.default_rng(0), 0.1)) == 1600


def test_rows_to_exclude_start_at_the_folder_of_the_yaml_file_however_they_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    for text in ("data: a.h5?exclude=lists/ex.csv", "data: a.h5\n    exclude: lists/ex.csv"):
        opened = []

        def nothing(spec, opened=opened):
            opened.append(spec)
            return ArraySource([], RATE)

        with pytest.raises(DataError, match="holds no recordings"):
            open_mixture(declared(tmp_path, f"sources:\n  - {text}\n"), nothing)
        assert opened == [f"{tmp_path}/a.h5?exclude={tmp_path}/lists/ex.csv"]


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("sources: []", DataError, "'sources' is missing or empty"),
        ("{}", DataError, "'sources' is missing or empty"),
        ("- data: speech", DataError, "is not a mixture; expected a key 'sources'"),
        ("sources: [", DataError, "is not YAML"),
        ("source:\n  - data: speech", ConfigError, "there is no option 'source'; did you mean 'sources'"),
        ("sources:\n  - speech", DataError, "source 1: expected 'data: FOLDER', found 'speech'"),
        ("sources:\n  - dat: speech", ConfigError, "source 1: there is no option 'dat'; did you mean 'data'"),
        ("sources:\n  - weight: 1", DataError, "source 1: 'data' is missing"),
        ("sources:\n  - data: speech\n    wieght: 1", ConfigError, "no option 'wieght'; did you mean 'weight'"),
        ("sources:\n  - data: speech\n    weight: 0", ConfigError, "weight is 0; it must be a number above 0"),
        ("sources:\n  - data: speech\n    weight: .inf", ConfigError, "weight is inf"),
        ("sources:\n  - data: speech\n    weight: .nan", ConfigError, "weight is nan"),
        ("sources:\n  - data: speech\n    weight: many", ConfigError, "weight is 'many'"),
        ("sources:\n  - data: speech\n    exclude: [1]", ConfigError, r"exclude is \[1\]; it must be a text"),
        ("sources:\n  - data: speech\n    exclude: a.csv", ConfigError, "speech: there is no option 'exclude'"),
        ("sources:\n  - data: other.yaml\n    split: test", ConfigError, "source 1: there is no option 'split'"),
        ("sources:\n  - data: gone", DataError, "gone does not exist"),
        ("sources:\n  - data: mix.yaml", DataError, "mix.yaml includes itself"),
        ("sources:\n  - data: speech\n  - data: music\n    weight: 1.0e-9", ConfigError, "less than a millionth"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_named(corpus, text, kind, reason):
    with pytest.raises(kind, match=reason) as error:
        open_source(declared(corpus, text))
    assert "\n" not in str(error.value)


def test_mixtures_that_include_each_other_are_refused(corpus):
    declared(corpus, "sources:\n  - data: b.yaml\n", "a.yaml")
    with pytest.raises(DataError, match=r"a\.yaml includes itself"):
        open_source(declared(corpus, "sources:\n  - data: a.yaml\n", "b.yaml").with_name("a.yaml"))


def test_a_mixture_takes_remote_tars(corpus, server, own_cache):
    path = declared(corpus, f"sources:\n  - data: speech\n  - data: {server.url}/{{0..3}}.tar\n    weight: 3\n")
    source = open_source(path)
    assert len(source) == len(source.components[0]) + 27
    assert source.is_remote()
    first = len(source.components[0])
    assert source.remote_shard(0) is None
    assert source.remote_shard(first).url == f"{server.url}/0.tar"
    assert source.parts().starts.tolist() == [0, *(first + np.array([0, 9, 14, 15, 27]))]
    found = batches(source, config=fields(0.2, sampling_rate=8_000, mel_max_hz=4000.0))
    assert any(name.startswith(server.url) for batch in found for name in batch.recordings)
