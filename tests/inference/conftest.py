"""A model and recordings that a corpus of seconds is made of."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import soundfile

from bestrq2.inference.corpus import sharing, work
from example_sounds import RATE, scene

LENGTHS = [40_000, 12_000, 100_000, 500, 33_000]


@pytest.fixture(scope="session")
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


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Parts of two recordings at most."""
    monkeypatch.setattr(sharing, "BLOCK", 2)
    monkeypatch.setattr(work, "BLOCK", 2)


@pytest.fixture
def rejected():
    """Reads the list beside an output: reasons by path."""

    def read(output: Path) -> dict[str, str]:
        with output.with_name(f"{output.name}.rejected.csv").open() as file:
            return {row["path"]: row["reason"] for row in csv.DictReader(file)}

    return read
