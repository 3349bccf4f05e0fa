"""The encoder that comes with the package, under its name wherever a model is taken."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from transformers import AutoModel

import bestrq2
from bestrq2 import cli
from bestrq2.convert import shipped
from bestrq2.convert.shipped import ENCODERS, shipped_folder, shipped_training
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.hear import load_model
from example_sounds import RATE, scene

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "bestrq2" / "encoders" / "bestrq2-tiny"
# The embedding of scene(80_000), written by benchmarks/ship_encoder.py with the weights.
NUMBERS = Path(__file__).parent / "bestrq2-tiny.json"


def test_its_embedding_equals_the_stored_numbers():
    found = bestrq2.load(device="cpu").embed(scene(80_000)).clip[0]
    np.testing.assert_allclose(found, json.loads(NUMBERS.read_text()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "docs" / "encoder.md", ROOT / "docs" / "onnx.md", FOLDER / "README.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_no_figure_is_missing_in_what_is_written_about_it(page):
    assert "FILL" not in page.read_text(encoding="utf-8")


def test_weights_take_16_bits_in_the_package_and_load_as_float32():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000
    with safe_open(FOLDER / "model.safetensors", framework="pt") as stored:
        types = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    assert {name for name, kind in types.items() if kind != "F16"} == {"statistics.mean", "statistics.deviation"}
    for model in (bestrq2.load("bestrq2-tiny").model, AutoModel.from_pretrained(FOLDER)):
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_folder_of_its_name_is_neither_used_nor_hidden_silently(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_folder("bestrq2-tiny") == FOLDER
    tiny_encoder().save_pretrained("bestrq2-tiny")
    with pytest.raises(ConfigError, match=r"encoder of the package and a folder here; write ./bestrq2-tiny for the"):
        bestrq2.load()
    for folder in ("./bestrq2-tiny", Path("./bestrq2-tiny")):
        assert bestrq2.load(folder).config.hidden_size == tiny_encoder().config.hidden_size
        assert "model card" not in bestrq2.info(folder)


def test_an_installation_without_its_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=f"bestrq2-tiny: the files of this encoder are missing in {tmp_path}"):
        bestrq2.load()


def test_exports_embed_alike_and_carry_its_card(tmp_path):
    clip = scene(60_000)
    expected = bestrq2.load(device="cpu").embed(clip)
    bestrq2.export("bestrq2-tiny", tmp_path / "mine")
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path / "mine").eval()(torch.from_numpy(clip)[None])
    np.testing.assert_allclose(output.pooler_output, expected.clip, rtol=0, atol=1e-4)
    card, own = ((folder / "README.md").read_text(encoding="utf-8") for folder in (tmp_path / "mine", FOLDER))
    assert 'bestrq2.load("mine")' in card
    assert own[own.index("## Training") :].strip() in card
    assert "license: mit" in card


@pytest.mark.slow
def test_its_onnx_graph_embeds_alike(tmp_path):
    onnx = pytest.importorskip("bestrq2.convert.onnx")
    pytest.importorskip("onnxscript")
    onnx.export_onnx("bestrq2-tiny", tmp_path / "graph", int8=True)  # compares every graph with torch
    assert {onnx.MODEL_FILE, onnx.INT8_FILE} <= {file.name for file in (tmp_path / "graph").iterdir()}


def run(*words: object) -> None:
    assert cli.run([str(word) for word in words]) == 0, words


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    for number in range(12):
        label = ("low", "high")[number % 2]
        (tmp_path / "sounds" / label).mkdir(parents=True, exist_ok=True)
        sound = scene(RATE, number) if label == "low" else scene(2 * RATE, number)[::2]
        soundfile.write(tmp_path / "sounds" / label / f"{number}.wav", sound, RATE)
    return tmp_path / "sounds"


def test_pretraining_continues_from_it_by_its_recipe(recordings, tmp_path, caplog):
    small = {"trainer.max_steps": 1, "loader.batch_seconds": 4, "loader.validation_clips": 1, "loader.num_workers": 0}
    words = [f"--{name}={value}" for name, value in small.items()]
    with caplog.at_level(logging.INFO):
        run("pretrain", "--init", "bestrq2-tiny", "--data", recordings, "--output", tmp_path / "run", *words)
    assert "starts from the encoder of bestrq2-tiny; its predictor, mask token and head are initialised" in caplog.text
    settings = bestrq2.info(tmp_path / "run")
    assert settings["started from"].startswith("bestrq2-tiny (sha256 ")
    assert settings["recipe"] == shipped_training("bestrq2-tiny")["recipe"]


@pytest.mark.slow
def test_commands_take_its_name(recordings, tmp_path, capsys):
    run("embed", "bestrq2-tiny", recordings, "--output", tmp_path / "e.parquet")
    run("probe", "bestrq2-tiny", recordings, "--no-baselines")
    run("finetune", "bestrq2-tiny", recordings, "--output", tmp_path / "tuned", "--epochs", 1)
    run("info", "bestrq2-tiny")
    run("info", tmp_path / "tuned")
    printed = capsys.readouterr().out
    assert str(FOLDER / "README.md") in printed
    assert "from bestrq2-tiny" in printed
    assert load_model("bestrq2-tiny").scene_embedding_size == bestrq2.load().config.hidden_size
    assert cli.run(["predict", "bestrq2-tiny", str(recordings), "--output", str(tmp_path / "p.csv")]) == 2
    assert "name a run of `bestrq2 finetune`" in capsys.readouterr().err


def test_the_wheel_contains_it(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    path = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    files = [f"bestrq2/encoders/{name}/{file.name}" for name in ENCODERS for file in FOLDER.iterdir()]
    assert "bestrq2/encoders/bestrq2-tiny/model.safetensors" in files
    assert set(files) <= set(zipfile.ZipFile(path).namelist())
