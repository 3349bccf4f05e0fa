"""Reading weights: complete files of plain tensors load, others are refused, and no code is executed."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bestrq2 import BestRQ2ForPreTraining, BestRQ2Model, load_reference
from bestrq2.convert.weights import load_model_folder, read_state_dict
from bestrq2.errors import CheckpointError
from reference_layout import reference_config, reference_state


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(30, 40), "b": torch.randn(7).half()}


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".bin"])
def test_plain_tensors_are_read(tmp_path, state, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1} if suffix == ".ckpt" else state, path)
    assert equal(read_state_dict(path), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("variable", ["0", "1"])
def test_pickled_objects_are_refused_and_their_code_does_not_run(
    tmp_path, state, suffix, writer, variable, monkeypatch
):
    """Also under the variable of torch that the harness of HEAR needs for its own checkpoints."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    canary, path = tmp_path / "canary", tmp_path / f"model{suffix}"
    content = {"state_dict": state, "callbacks": Canary(canary)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"model\.\w+: not a file of plain tensors.*pickled objects.*never loaded"
    ):
        read_state_dict(path)
    assert not canary.exists()
    # The canary itself works: unpickled without care, it would have sung.
    if writer == "torch":
        torch.load(path, weights_only=False)
        assert canary.exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_truncated_files_are_refused(tmp_path, state, suffix, kept):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=rf"model\{suffix}: not a"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_other_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"notes{suffix}"
    path.write_text("these are notes, and a good many of them, about nothing in particular\n" * 20)
    with pytest.raises(CheckpointError, match=rf"notes\{suffix}: not a"):
        read_state_dict(path)


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text("().]}tcbRidlsNK0123\n", max_size=40).map(str.encode)))
def test_random_bytes_are_never_loaded_as_weights(tmp_path_factory, content):
    for suffix in (".safetensors", ".pt"):
        path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_state_dict(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.ckpt: there is no such file"):
        read_state_dict(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    "content", [torch.ones(3), [torch.ones(3)], {"epoch": 3}, {"state_dict": {"lr": 0.1}}], ids=str
)
def test_tensors_without_names_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "model.pt")


def test_a_reference_checkpoint_with_code_in_it_is_refused(tmp_path, tiny_pretraining):
    model, canary = tiny_pretraining(), tmp_path / "canary"
    torch.save({"state_dict": reference_state(model), "hparams": Canary(canary)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt.*pickled objects"):
        load_reference(tmp_path / "last.ckpt", reference_config(model))
    assert not canary.exists()


@pytest.fixture
def folder(tmp_path, tiny_pretraining):
    tiny_pretraining().save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("model_class", [BestRQ2Model, BestRQ2ForPreTraining])
def test_a_folder_loads_as_encoder_or_pretraining_model(folder, model_class):
    model = load_model_folder(folder, model_class)
    assert type(model) is model_class
    assert not model.training


def test_another_model_type_is_refused(folder):
    change_config(folder, model_type="wav2vec2")
    with pytest.raises(CheckpointError, match=r"config.json: model_type is 'wav2vec2', expected 'bestrq2'"):
        load_model_folder(folder, BestRQ2Model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": ', "config.json: "),
        ("[1, 2]", "config.json: expected a mapping"),
        ("\xff\xfe", "config.json: "),
    ],
)
def test_a_broken_config_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        load_model_folder(folder, BestRQ2Model)


def test_a_config_of_another_architecture_is_refused_with_the_tensors_that_differ(folder):
    change_config(folder, num_hidden_layers=3, codebook_size=128)
    with pytest.raises(CheckpointError, match=r"do not fit the architecture \(missing 12: encoder.blocks.2.attn"):
        load_model_folder(folder, BestRQ2Model)
    change_config(folder, num_hidden_layers=1, intermediate_size=20)
    with pytest.raises(CheckpointError, match=r"unexpected 12: .*misshaped 3: .*blocks.0.mlp.fc1.weight"):
        load_model_folder(folder, BestRQ2Model)
    change_config(folder, hidden_size=33)
    with pytest.raises(CheckpointError, match=r"config.json: hidden_size \(33\) must be a multiple"):
        load_model_folder(folder, BestRQ2Model)


def test_truncated_weights_in_a_folder_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="the model cannot be loaded: "):
        load_model_folder(folder, BestRQ2Model)


def test_a_folder_with_a_pickle_for_weights_is_refused(folder):
    canary = folder / "canary"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Canary(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no .safetensors weights in it; pytorch_model.bin is a pickle"):
        load_model_folder(folder, BestRQ2Model)
    assert not canary.exists()


def test_a_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no .safetensors weights in it$"):
        load_model_folder(folder, BestRQ2Model)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json in it; name a run folder or an exported"):
        load_model_folder(folder, BestRQ2Model)


def test_a_hub_id_that_cannot_be_reached_is_an_error_of_one_line():
    with pytest.raises(CheckpointError, match=r"^nobody/nothing-of-the-kind: [^:]*: [^\n]+$"):
        load_model_folder("nobody/nothing-of-the-kind", BestRQ2Model)
