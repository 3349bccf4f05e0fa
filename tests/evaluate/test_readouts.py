"""Choosing a readout on training clips: vectors, choice, table and flags that reproduce it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

import bestrq2
from bestrq2 import Embedder, cli
from bestrq2.convert.numpy_front_end import pool
from bestrq2.data.labels import LabelledClips, LabelledTask, load_labelled
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.probe import run_probe
from bestrq2.evaluate.readouts import _AllReadouts, candidate_readouts, compare_readouts
from bestrq2.evaluate.result import read_result
from bestrq2.evaluate.task_probe import time_statistics
from example_sounds import scene


def half_silent(late: bool, index: int) -> np.ndarray:
    """A second of sound and a second of faint noise, in either order: only order in time tells the classes apart."""
    noise = 1e-3 * np.random.default_rng(index).standard_normal(40_000)
    sound = scene(40_000, index)
    return np.concatenate([noise, sound] if late else [sound, noise]).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_encoder) -> Path:
    path = tmp_path_factory.mktemp("readouts") / "tiny"
    tiny_encoder(num_hidden_layers=3, input_normalization="clip").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "order"
    for index in range(48):
        split, label = "test" if index >= 32 else "train", "late" if index % 2 else "early"
        place = folder / split / label
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{index}.wav", half_silent(index % 2 == 1, index // 2), 16_000)
    return folder


def test_vectors_from_one_pass_are_those_of_each_readout(tiny_encoder):
    embedder = Embedder(tiny_encoder(max_seconds=2.5, num_hidden_layers=4), "cpu")
    readouts = candidate_readouts(embedder.config)
    assert len(readouts) == 16
    assert readouts[0].changes() == {}
    assert {one.layers for one in readouts} == {"output", "2", "3", "mean"}
    clips = [scene(20_000), scene(95_000, 1)]
    together = _AllReadouts(embedder, readouts).embed(clips).clip
    alone = [embedder.embed(clips, **one.settings()).clip for one in readouts]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-5)
    assert len(candidate_readouts(tiny_encoder(patch_size=(128, 4)).config)) == 6  # half is two thirds of two blocks


def test_the_widest_pooling_is_what_statistics_are(tiny_encoder):
    frames = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    np.testing.assert_allclose(pool(frames, "mean+std+quarters"), time_statistics(frames), atol=1e-6)


def test_the_chosen_readout_and_the_flags_that_reproduce_it(model, labelled, tmp_path, capsys):
    output = tmp_path / "readouts.json"
    assert cli.run(["probe", str(model), str(labelled), "--readouts", "--output", str(output), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    result = read_result(output, "probe")
    found = result.provenance
    (task,) = found["validation"]
    chosen = found["readouts"][found["chosen"][task]]
    assert chosen["pooling"] == "mean+std+quarters"  # a mean over time does not tell the order
    scores = np.array(found["validation"][task])
    assert scores[found["chosen"][task]] == scores.max() > 0.9
    assert scores[0] < scores.max()
    (score,) = result.scores
    assert score.score > 0.9
    assert score.n_test == 16
    flags = f"--layers {chosen['layers']} --frequency {chosen['frequency']} --pooling {chosen['pooling']}"
    assert flags in said
    options = {name: chosen[name] for name in ("layers", "frequency", "pooling")}
    again = run_probe(model, labelled, baselines=False, device="cpu", **options)
    (linear,) = [one for one in again.scores if one.method == "linear"]
    assert linear.clips == score.clips
    assert linear.features.startswith(f"tiny, layers {chosen['layers']}, frequency {chosen['frequency']}, pooling")


def test_test_clips_have_no_part_in_the_choice(model, labelled, monkeypatch):
    few = candidate_readouts(bestrq2.load(model, "cpu").config)[:2]
    monkeypatch.setattr("bestrq2.evaluate.readouts.candidate_readouts", lambda config: few)
    embedder = bestrq2.load(model, "cpu")
    (task,) = load_labelled(str(labelled))
    swapped = LabelledClips(task.test.audio, 1 - np.asarray(task.test.labels), task.test.sampling_rate)
    other = LabelledTask(task.name, task.domain, task.kind, task.classes, task.train, swapped)
    scores, found = compare_readouts(embedder, [task], progress=False)
    others, found_again = compare_readouts(embedder, [other], progress=False)
    assert found == found_again
    assert others[0].score == pytest.approx(1 - scores[0].score)


def test_impossible_comparisons_are_refused(model, labelled, tiny_encoder):
    with pytest.raises(ConfigError, match="pooling is max, but readouts are compared; leave one of them out"):
        bestrq2.probe(model, labelled, readouts=True, pooling="max")
    with pytest.raises(DataError, match="tasks with one class per clip, and there is none"):
        compare_readouts(Embedder(tiny_encoder(), "cpu"), [], progress=False)
