"""`bestrq2.load`: every source of weights, and one sentence for everything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import bestrq2
from bestrq2.errors import CheckpointError
from example_sounds import scene
from reference_layout import reference_config, reference_state


@pytest.fixture(scope="module")
def model(tiny_pretraining) -> bestrq2.BestRQ2ForPreTraining:
    return tiny_pretraining(max_seconds=2.5)


def gives_the_same(found: bestrq2.Embedder, model: bestrq2.BestRQ2ForPreTraining) -> None:
    clip = scene(60_000)
    expected = bestrq2.Embedder(model.base_model, "cpu").embed(clip)
    assert np.array_equal(found.embed(clip).frames, expected.frames)
    assert isinstance(found.model, bestrq2.BestRQ2Model)
    assert not found.model.training


@pytest.mark.parametrize("below", ["", "model"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_folder_and_a_run_folder_load(model, tmp_path, below, whole):
    (model if whole else model.base_model).save_pretrained(tmp_path / "trained" / below)
    embedder = bestrq2.load(tmp_path / "trained", "cpu")
    gives_the_same(embedder, model)
    assert embedder.name == "trained"
    gives_the_same(bestrq2.load(str(tmp_path / "trained"), "cpu"), model)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("beside", [".json", ".yaml", ".yml"])
def test_a_reference_checkpoint_loads_with_its_configuration_beside_it(model, tmp_path, suffix, beside):
    path = tmp_path / f"reference{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": {f"net.{name}": value for name, value in reference_state(model).items()}}, path)
    else:
        save_file(reference_state(model), path)
    config = reference_config(model)
    path.with_suffix(beside).write_text(json.dumps(config) if beside == ".json" else yaml.safe_dump(config))
    gives_the_same(bestrq2.load(path, "cpu"), model)


def test_a_checkpoint_without_its_configuration_says_where_it_is_expected(model, tmp_path):
    save_file(reference_state(model), tmp_path / "reference.safetensors")
    with pytest.raises(
        CheckpointError, match=r"expected beside it as reference.json or reference.yaml.*load_reference"
    ):
        bestrq2.load(tmp_path / "reference.safetensors")


def test_a_recipe_is_an_untrained_encoder_from_seed_0():
    torch.manual_seed(1)
    first = bestrq2.load("best-rq-2-tiny", "cpu")
    torch.manual_seed(2)
    again = bestrq2.load("best-rq-2-tiny", "cpu")
    assert first.config.hidden_size == bestrq2.recipe("best-rq-2-tiny")["model"]["hidden_size"]
    assert first.name == "best-rq-2-tiny"
    clip = scene(40_000)
    assert np.array_equal(first.embed(clip).frames, again.embed(clip).frames)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("best-rq-2-tyni", "no such encoder or recipe, and no such file or folder; did you mean 'best-rq-2-tiny'"),
        ("bestrq2_tiny", "did you mean 'bestrq2-tiny'"),
        (
            "no such thing",
            r"no such model; name an encoder of the package \(bestrq2-tiny\), .* such as best-rq-2-tiny$",
        ),
        ("/no/such/folder", "does not exist; name a run folder, an exported folder or a checkpoint$"),
        ("./no/folder", "does not exist"),
        ("a/b/c", "does not exist"),
        ("model.safetensors", "does not exist"),
        ("run/modle", "does not exist"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_with_what_was_probably_meant(source, message, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{source}: .*{message}"):
        bestrq2.load(source)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(CheckpointError, match=r"no config.json in it; name a run folder"):
        bestrq2.load(tmp_path)


def test_a_folder_with_an_onnx_graph_says_that_it_is_one(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds an ONNX graph.*name the model that it was exported from$"):
        bestrq2.load(tmp_path)


def test_a_damaged_run_folder_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model: the model cannot be loaded"):
        bestrq2.load(tmp_path)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which is never loaded"):
        bestrq2.load(tmp_path)


def test_a_model_of_another_kind_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "hubert"}))
    with pytest.raises(CheckpointError, match="model_type is 'hubert', expected 'bestrq2'"):
        bestrq2.load(tmp_path)


def test_a_hub_id_is_looked_up_where_there_is_no_such_folder():
    with pytest.raises(CheckpointError, match="nobody/nothing-of-the-kind: is not a local folder, nor a hub id"):
        bestrq2.load("nobody/nothing-of-the-kind")
