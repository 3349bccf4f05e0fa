"""The encoder for MTEB: its contract, and MTEB's own mock tasks."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from environments import environment, run_there
from torch.utils.data import DataLoader

from bestrq2.errors import AudioError, ConfigError
from bestrq2.evaluate.mteb import MTEBEncoder
from bestrq2.inference.embedder import Embedder
from example_sounds import RATE, scene

TASK = {"task_metadata": SimpleNamespace(name="Toy"), "hf_split": "test", "hf_subset": "default"}


@pytest.fixture
def encoder(tiny_encoder, monkeypatch) -> MTEBEncoder:
    """An encoder beside a stand-in for `mteb.models`, so that the quick tests need no mteb."""
    monkeypatch.setitem(sys.modules, "mteb", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mteb.models", SimpleNamespace(ModelMeta=SimpleNamespace))
    return MTEBEncoder(Embedder(tiny_encoder(max_seconds=2.5), "cpu", name="tiny"))


def _file(audio: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=kind)
    return file.getvalue()


def _loader(files: list[bytes], batch_size: int, rate: int | None = None) -> DataLoader[Any]:
    """A loader as MTEB makes it: rows of a dataset whose column `audio` decodes, clips of a batch as a list."""
    dataset = Dataset.from_dict({"audio": [{"bytes": file, "path": None} for file in files]})
    dataset = dataset.cast_column("audio", Audio(sampling_rate=rate))
    return DataLoader(dataset, batch_size, collate_fn=lambda rows: {"audio": [row["audio"] for row in rows]})


@pytest.mark.parametrize(("batch_size", "rate"), [(1, None), (5, None), (5, 32_000)])
def test_vectors_are_those_of_each_file_alone(encoder, batch_size, rate):
    """Of mixed lengths, rates, channels and formats; neither batch nor padding counts."""
    files = [
        _file(scene(3 * RATE), RATE),
        _file(scene(20_000, 1), 44_100, "FLAC"),
        _file(np.stack([scene(9000, 2), scene(9000, 3)], axis=1), 8000),
        _file(scene(9, 4), RATE),
        _file(scene(30_000, 5), 24_000, "MP3"),
    ]
    vectors = encoder.encode(_loader(files, batch_size, rate), **TASK, show_progress_bar=False, batch_size=batch_size)
    assert vectors.dtype == np.float32
    alone = np.concatenate([encoder.embedder.embed(file).clip for file in files])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert vectors.shape[1] == encoder.mteb_model_meta.embed_dim


def test_decoded_clips_give_the_same_vectors(encoder):
    clips = [{"array": scene(size, size), "sampling_rate": rate} for size, rate in ((RATE, RATE), (9000, 8000))]
    decoded = DataLoader(clips, 2, collate_fn=lambda rows: {"audio": rows})
    files = _loader([_file(clip["array"], clip["sampling_rate"]) for clip in clips], 2)
    np.testing.assert_allclose(
        encoder.encode(decoded, **TASK), encoder.encode(files, **TASK), atol=0.01
    )  # 16-bit files


def test_empty_and_broken_clips_get_zeros_and_a_warning(encoder, caplog):
    files = [_file(scene(RATE), RATE), _file(np.zeros(0), RATE), b"RIFF", _file(scene(RATE, 1), RATE)]
    vectors = encoder.encode(_loader(files, 4), **TASK)
    assert [bool(vector.any()) for vector in vectors] == [True, False, False, True]
    assert "Toy (test): 2 of 4 clips cannot be embedded and get zeros, the first: " in caplog.text
    similarity = encoder.similarity(vectors, vectors)
    torch.testing.assert_close(similarity.diagonal(), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(similarity[:, 3], encoder.similarity_pairwise(vectors, vectors[3:]))
    assert 0 < float(similarity[0, 3]) < 1
    with pytest.raises(AudioError, match="2 of 2 clips"):
        encoder.encode(_loader(files[1:3], 4), **TASK)


def test_cached_results_belong_to_weights_and_options(tiny_encoder, encoder):
    """MTEB keeps results by name, revision and experiment_kwargs."""
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.experiment_kwargs, meta.modalities) == ("bestrq2/tiny", None, ["audio"])
    model = tiny_encoder(max_seconds=2.5)
    assert MTEBEncoder(Embedder(model, "cpu")).mteb_model_meta.revision == meta.revision
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert MTEBEncoder(Embedder(model, "cpu")).mteb_model_meta.revision != meta.revision
    chosen = MTEBEncoder(encoder.embedder, phases=2, layers=1, pooling="mean+max").mteb_model_meta
    assert chosen.experiment_kwargs == {"phases": 2, "layers": 1, "pooling": "mean+max"}
    assert chosen.embed_dim == 2 * meta.embed_dim
    with pytest.raises(ConfigError, match="pooling"):
        MTEBEncoder(encoder.embedder, pooling="median")


def test_a_missing_package_is_named_with_its_install_command(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(ConfigError, match=r"pip install 'bestrq2\[mteb\]'"):
        MTEBEncoder(encoder.embedder)


MOCK_RUN = """
import io, json, sys
import numpy as np, soundfile
from datasets import Audio

def encode_example(self, value):  # datasets would need torchcodec to write the mock audio
    file = io.BytesIO()
    soundfile.write(file, np.asarray(value["array"], "float32"), value["sampling_rate"], format="WAV")
    return {"bytes": file.getvalue(), "path": None}

Audio.encode_example = encode_example
import mteb
from bestrq2.evaluate.mteb import MTEBEncoder

encoder = MTEBEncoder("best-rq-2-tiny", "cpu")
done = {name: status for name, status in mteb.mock_run(encoder).items() if status is not None}
zero_shot = mteb.mocks.MOCK_MAEB_TASK_GRID[2]
try:
    refusal = mteb.evaluate(encoder, zero_shot, cache=None)
except ValueError as error:
    refusal = str(error)
cache = mteb.ResultCache("cache")
mteb.evaluate(encoder, mteb.mocks.MOCK_MAEB_TASK_GRID[0], cache=cache, show_progress_bar=False)
protocol = mteb.EncoderProtocol
print(json.dumps({
    "scores": {name: getattr(status, "exception", None) or status.get_score() for name, status in done.items()},
    "protocol": isinstance(encoder, protocol), "refusal": refusal, "revision": encoder.mteb_model_meta.revision,
}))
"""


@pytest.mark.slow
def test_mteb_runs_its_audio_mock_tasks(tmp_path):
    (tmp_path / "mock_run.py").write_text(MOCK_RUN)
    with environment(tmp_path / "environment", ["mteb>=2.26"]) as python:
        found = json.loads(run_there(python, ["mock_run.py"], tmp_path, MTEB_CACHE="cache").splitlines()[-1])
    assert found["protocol"]
    assert (
        len(found["scores"]) >= 7
    )  # classification, with folds too, multilabel, clustering, pairs, reranking, retrieval
    assert all(isinstance(score, float) for score in found["scores"].values()), found["scores"]
    assert "['audio']" in found["refusal"]
    folder = tmp_path / "cache/results/bestrq2__best-rq-2-tiny" / found["revision"]
    assert (folder / "MockAudioClusteringTask.json").is_file()
