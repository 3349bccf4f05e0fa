"""Models and recordings for corpora of seconds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import soundfile

import bestrq2
from example_sounds import RATE, scene

LENGTHS = [40_000, 12_000, 100_000, 500, 33_000]


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny_encoder) -> Path:
    """An encoder whose windows last 2.5 s."""
    path = tmp_path_factory.mktemp("corpus") / "model"
    tiny_encoder(max_seconds=2.5).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory, tiny_config) -> Callable[[bool], Path]:
    """Classifiers with the classes a, b and c, of which a recording has one or any number."""
    import torch

    from bestrq2 import BestRQ2ForAudioClassification

    def make(multi_label: bool) -> Path:
        torch.manual_seed(4)
        kind = "multi_label_classification" if multi_label else "single_label_classification"
        config = tiny_config(max_seconds=2.5, id2label=dict(enumerate("abc")), problem_type=kind)
        model = BestRQ2ForAudioClassification(config)
        model.classifier.weight.data.normal_()
        path = tmp_path_factory.mktemp("classifier") / f"classifier{multi_label}"
        model.save_pretrained(path)
        return path

    return {multi_label: make(multi_label) for multi_label in (False, True)}.__getitem__


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Five recordings of 0.03 to 6.25 s."""
    folder = tmp_path / "recordings"
    (folder / "deeper").mkdir(parents=True)
    for index, length in enumerate(LENGTHS):
        name = folder / ("deeper" if index % 2 else "") / f"clip{index}.wav"
        soundfile.write(name, scene(length, index), RATE, subtype="FLOAT")
    return folder


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Parts of two recordings at most."""
    monkeypatch.setattr("bestrq2.data.parts.BLOCK", 2)


@pytest.fixture
def embed(model) -> Callable[..., Path]:
    """`bestrq2.embed` with the model, on the CPU, without worker processes."""
    return partial(bestrq2.embed, model, **{"device": "cpu", "num_workers": 0})


@pytest.fixture
def predict(classifiers) -> Callable[..., Path]:
    """`bestrq2.predict` with the classifier of one class per recording, likewise."""
    return partial(bestrq2.predict, classifiers(False), **{"device": "cpu", "num_workers": 0})


@pytest.fixture
def rejected() -> Callable[[Path], dict[str, str]]:
    """Reads the list beside an output: reasons by path."""

    def read(output: Path) -> dict[str, str]:
        with output.with_name(f"{output.name}.rejected.csv").open() as file:
            return {row["path"]: row["reason"] for row in csv.DictReader(file)}

    return read
