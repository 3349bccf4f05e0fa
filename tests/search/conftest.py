"""Embedded corpora: vectors made up, and recordings embedded by a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

import bestrq2
from example_sounds import RATE, scene, tones

FACTS = {
    "bestrq2": "0", "model": "made-up", "weights_sha256": "0" * 64, "source": "/corpus", "rows": "clips",
    "phases": "1", "layers": "output", "frequency": "mean", "pooling": "mean", "normalize": "False",
}  # fmt: skip


@pytest.fixture
def write_table(tmp_path) -> Callable[..., Path]:
    """Writes vectors [N, D] as `bestrq2 embed` does, in small row groups; None leaves a fact of the metadata out."""

    def write(vectors: np.ndarray, paths: list[str] | None = None, facts: dict[str, str | None] | None = None) -> Path:
        vectors = np.asarray(vectors, np.float32)
        paths = paths or [f"/corpus/{'ab'[row % 2]}/{row}.wav" for row in range(len(vectors))]
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        names = {"path": paths, "seconds": np.ones(len(vectors)), "embedding": column}
        metadata = {name: fact for name, fact in {**FACTS, **(facts or {})}.items() if fact is not None}
        output = tmp_path / "e.parquet"
        pq.write_table(pa.table(names).replace_schema_metadata(metadata), output, row_group_size=64)
        return output

    return write


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny_encoder) -> Path:
    """An encoder whose windows last 2.5 s."""
    path = tmp_path_factory.mktemp("search") / "model"
    tiny_encoder(max_seconds=2.5).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, model) -> Path:
    """Ten recordings in two folders, the last with tones from 3 to 4.5 s; embedded as `clips` and `frames.parquet`."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(10):
        name = folder / "sounds" / "ab"[number % 2] / f"{number}.wav"
        name.parent.mkdir(parents=True, exist_ok=True)
        sound = scene(RATE + number * 9000, number)
        if number == 9:
            sound[3 * RATE : 3 * RATE + 24_000] = tones(24_000, 300, 450)
        soundfile.write(name, sound, RATE, subtype="FLOAT")
    for frames in (False, True):
        output = folder / ("frames.parquet" if frames else "clips.parquet")
        bestrq2.embed(model, str(folder / "sounds"), output, frames=frames, phases=2, device="cpu", num_workers=0)
    return folder
