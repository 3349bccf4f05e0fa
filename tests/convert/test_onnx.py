"""Exported ONNX graphs embed like torch, without torch; a graph that does not is deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import bestrq2
from bestrq2.convert import numpy_front_end
from bestrq2.convert import onnx as onnx_export
from bestrq2.convert.onnx import FRONT_END_FILE, INT8_FILE, MODEL_FILE, export_onnx
from bestrq2.errors import BestRQ2Error, ConfigError
from example_sounds import scene

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed_with_onnx.py"
ARCHITECTURES = {
    "best-rq-2": {},
    "best-rq-2-plus": {
        "input_normalization": "dataset",
        "activation": "swiglu",
        "norm": "rmsnorm",
        "qk_norm": True,
        "use_bias": False,
        "position_embedding": "rope_2d",
        "readout": {"layers": "1+output", "frequency": "concat", "pooling": "mean+std+quarters"},
    },
    "strips": {
        "patch_size": (128, 4),
        "position_embedding": "rope_time",
        "input_normalization": "clip",
        "num_hidden_layers": 1,
    },
    "learned": {
        "position_embedding": "learned",
        "input_normalization": "clip",
        "num_hidden_layers": 1,
        "readout": {"layers": "0:0.5,output:0.5", "pooling": "max+attention"},
    },
}


QUICK = ("best-rq-2-plus",)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES],
)
def exported(request: pytest.FixtureRequest, tiny_encoder: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, in hub format, and what it was exported to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_encoder(**ARCHITECTURES[request.param])
    bands = torch.linspace(0, 1, 128)
    model.set_statistics(-30 - 20 * bands, 10 + 5 * bands)
    model.save_pretrained(folder / "model")
    assert export_onnx(str(folder / "model"), folder / "exported", int8=True) == folder / "exported"
    return folder


def session_of(folder: Path, file: str = MODEL_FILE) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / "exported" / file), providers=["CPUExecutionProvider"])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_a_file_embeds_without_torch_as_with_it(exported: Path, tmp_path: Path):
    for name, samples, rate in (("short", 7_001, 16_000), ("longest", 80_000, 16_000), ("stereo", 100_000, 44_100)):
        sound = scene(samples) if name != "stereo" else np.stack([scene(samples), scene(samples, 1)], axis=1)
        soundfile.write(tmp_path / f"{name}.wav", sound, rate, subtype="FLOAT")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'bestrq2', 'transformers'):\n"
        "            raise ImportError(f'{name} is not here')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    # One process for all files: importing onnxruntime takes longer than embedding them.
    program = (
        "import runpy, sys\n"
        f"for name in {('short', 'longest', 'stereo')}:\n"
        f"    sys.argv = ['embed', {str(exported / 'exported')!r}, name + '.wav', '--output', name + '.npz']\n"
        f"    runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
        "import torch\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stderr.strip().endswith("torch is not here"), result.stderr
    embedder = bestrq2.load(exported / "model", "cpu")
    for name in ("short", "longest", "stereo"):
        found = np.load(tmp_path / f"{name}.npz")
        expected = embedder.embed(tmp_path / f"{name}.wav")
        tolerance = 1e-4 if name != "stereo" else 5e-3  # soxr's filter is another
        assert relative_error(found["clip"], expected.clip[0]) <= tolerance
        assert relative_error(found["frames"], expected.frames[0]) <= tolerance
        np.testing.assert_allclose(found["seconds"], expected.timestamps[0])


def test_batch_and_time_are_dynamic_and_padding_does_not_matter(exported: Path):
    session = session_of(exported)
    front_end = numpy_front_end.FrontEnd.of(session)
    clips = [front_end.log_mel(scene(samples, samples)) for samples in (1, 80_000, 31_007)]
    together = numpy_front_end.encode(session, clips)
    for clip, frames in zip(clips, together, strict=True):
        alone = session.run(
            ["frames", "clip"], {"log_mel": clip[None], "frames_per_clip": np.array([clip.shape[1]], np.int64)}
        )
        assert len(frames) == max(1, clip.shape[1] // front_end.patch_frames)
        assert relative_error(frames, alone[0][0]) <= 1e-5
        assert relative_error(alone[1][0], numpy_front_end.pool(frames, front_end.pooling)) <= 1e-5


def test_the_graph_refuses_clips_beyond_max_seconds(exported: Path):
    session = session_of(exported)
    front_end = numpy_front_end.FrontEnd.of(session)
    frames = (front_end.window_frames + 1) * front_end.patch_frames
    log_mel = np.full((1, 128, frames), -30, np.float32)
    with pytest.raises(Exception, match=r"(?i)broadcast|dimension|bounds|shape"):
        session.run(None, {"log_mel": log_mel, "frames_per_clip": np.array([frames], np.int64)})


def test_long_audio_is_embedded_in_the_windows_of_the_embedder(exported: Path, tmp_path: Path):
    session = session_of(exported)
    embedder = bestrq2.load(exported / "model", "cpu")
    # Less than a window more than one, and more than a batch of windows.
    for samples, overlap in ((115_000, 0.5), (12 * 40_000 + 7_000, 0.5), (220_000, 0.0)):
        sound = np.stack([scene(samples), scene(samples, 1)])
        soundfile.write(tmp_path / "long.wav", sound.T, 16_000, subtype="FLOAT")
        clip, frames, seconds = numpy_front_end.embed(session, sound, 16_000, overlap=overlap)
        expected = embedder.embed(tmp_path / "long.wav", overlap=overlap)
        assert relative_error(frames, expected.frames[0]) <= 1e-4
        assert relative_error(clip, expected.clip[0]) <= 1e-4
        np.testing.assert_allclose(seconds, expected.timestamps[0])
    default = embedder.embed(tmp_path / "long.wav")
    assert relative_error(numpy_front_end.embed(session, sound, 16_000)[1], default.frames[0]) <= 1e-4
    assert relative_error(frames, default.frames[0]) > 1e-2


def test_8_bit_weights_are_smaller_and_close(exported: Path):
    folder = exported / "exported"
    assert (folder / INT8_FILE).stat().st_size < (folder / MODEL_FILE).stat().st_size
    sound = scene(70_000)
    exact = numpy_front_end.embed(session_of(exported), sound, 16_000)[1]
    coarse = numpy_front_end.embed(session_of(exported, INT8_FILE), sound, 16_000)[1]
    cosine = (exact * coarse).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(coarse, axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-7
    # The patch embedding reads decibels and keeps its 32 bits.
    config = bestrq2.BestRQ2Config.from_pretrained(exported / "model")
    weights = {tuple(weight.dims): weight.data_type for weight in onnx.load(str(folder / INT8_FILE)).graph.initializer}
    assert weights[config.patch_values, config.hidden_size] == onnx.TensorProto.FLOAT
    assert weights[config.hidden_size, 3 * config.hidden_size] == onnx.TensorProto.INT8


def test_the_front_end_is_copied_unchanged(exported: Path):
    assert {path.name for path in (exported / "exported").iterdir()} == {MODEL_FILE, INT8_FILE, FRONT_END_FILE}
    assert (exported / "exported" / FRONT_END_FILE).read_text() == Path(numpy_front_end.__file__).read_text()


def test_a_graph_that_differs_from_torch_is_not_left_behind(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = bestrq2.BestRQ2Model.from_pretrained(exported / "model")
    with torch.no_grad():
        model.encoder.norm.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "model")
    graph = exported / "exported" / MODEL_FILE
    monkeypatch.setattr(onnx_export, "_write_graph", lambda source, model, path: shutil.copyfile(graph, path))
    with pytest.raises(BestRQ2Error, match="is off by"):
        export_onnx(str(tmp_path / "model"), tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_conformer_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="encoder_type is 'conformer'"):
        export_onnx("best-rq-conformer-tiny", tmp_path / "exported")


@pytest.mark.usefixtures("empty_folder")
def test_unwritable_outputs_are_refused_before_the_export(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output, complaint in {
        tmp_path / "full": "is not empty",
        tmp_path / "full" / "notes.txt": "is a file",
        tmp_path / "full" / "notes.txt" / "exported": "cannot be written",
        tmp_path / "model.onnx": "name a folder",
    }.items():
        with pytest.raises(ConfigError, match=complaint):
            export_onnx("demo", output)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript.*pip install 'bestrq2\[onnx\]'"):
        export_onnx("demo", tmp_path / "exported")
