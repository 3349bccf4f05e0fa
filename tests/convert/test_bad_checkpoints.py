"""Wrong or hostile checkpoints are refused in one sentence and in little memory."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bestrq2
from bestrq2.convert.hub import write_model
from bestrq2.convert.weights import load_model_folder, read_state_dict
from bestrq2.errors import CheckpointError, ConfigError
from reference_layout import reference_config, reference_state

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ANCHOR = "patch_embed.patch_embed.proj.weight"


def safetensors(path: Path, header: Any) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x00\x00\x80?")
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1, 2], "not a whole safetensors file .*; copy or download it again"),
        ({"a": ONE | {"dtype": "F4_E9"}}, "not a whole safetensors file"),
        ({"a": ONE | {"shape": [2]}}, "not a whole safetensors file"),
        ({"a": ONE | {"shape": [2**62]}}, "not a whole safetensors file"),
        ({"a": ONE, "b": ONE}, "not a whole safetensors file"),
        ({"a": {"name": "a", "type": "float"}}, "not a whole safetensors file"),
        ({"wav2vec2.encoder.bias": ONE}, rf"no tensor '{ANCHOR}' in it.*it holds wav2vec2.encoder.bias"),
        ({"model.layers.0.weight": ONE, "__metadata__": {"format": "mlx"}}, "not a checkpoint of the reference"),
        ({ANCHOR: ONE, "a\nb\x1b": ONE | {"shape": [0], "data_offsets": [4, 4]}}, r"unexpected 1: a\?b\?"),
    ],
)
def test_an_unknown_header_is_refused(tiny_pretraining, tmp_path, header, message):
    path = safetensors(tmp_path / "model.safetensors", header)
    path.with_suffix(".json").write_text(json.dumps(reference_config(tiny_pretraining())))
    with pytest.raises(CheckpointError, match=message) as error:
        bestrq2.load(path)
    assert str(error.value).isprintable()
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF\x03\x00" + bytes(200),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 342\n",
        b"\x89PNG",
    ],
    ids=["gguf", "lfs pointer", "png"],
)
def test_files_of_other_kinds_are_refused(tmp_path, content):
    for suffix in (".safetensors", ".ckpt"):
        (tmp_path / f"model{suffix}").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model\{suffix}: not a "):
            read_state_dict(tmp_path / f"model{suffix}")


def test_an_oversized_archive_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(20_000_000))
    with pytest.raises(CheckpointError, match=r"bomb.ckpt: unpacks to 20000000 bytes, more than its size"):
        read_state_dict(tmp_path / "bomb.ckpt")
    with (tmp_path / "arrays.ckpt").open("wb") as file:
        np.savez(file, a=np.arange(100.0))
    with pytest.raises(CheckpointError, match=r"arrays.ckpt: not a file of plain tensors"):
        read_state_dict(tmp_path / "arrays.ckpt")


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(1).expand(10**6, 10**6), torch.ones(3, device="meta"), torch.eye(3).to_sparse()],
    ids=["spread", "meta", "sparse"],
)
def test_inconsistent_tensors_are_refused(tmp_path, tensor):
    torch.save({"state_dict": {ANCHOR: tensor}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "last.ckpt")
    torch.save({"state_dict": {3: torch.ones(3)}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "last.ckpt")


def test_a_transposed_tensor_loads(tmp_path):
    torch.save({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "last.ckpt")
    assert read_state_dict(tmp_path / "last.ckpt")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1000},
        {"hidden_size": 2**24},
        {"intermediate_size": 10**7},
        {"num_mel_bands": 2**20, "patch_size": [2**20, 4], "n_fft": 128, "win_length": 128},
        {"position_embedding": "learned", "max_columns": 10**7},
        {"predictor_num_layers": 1000},
        {"predictor_intermediate_size": 10**7},
        {"codebook_size": 10**7},
        {"num_codebooks": 1000, "codebook_size": 10**5},
    ],
    ids=str,
)
def test_sizes_beyond_the_weights_are_refused_before_memory_is_allocated(tiny_pretraining, tmp_path, changes):
    tiny_pretraining().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=r"asks for a model of about .* values, but the weights hold \d+; check"):
        load_model_folder(tmp_path, bestrq2.BestRQ2ForPreTraining)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("encoder", {"depth": 1000}),
        ("encoder", {"embed_dim": 2**20}),
        ("predictor", {"depth": 1000}),
        ("encoder", {"mlp_ratio": 1e5}),
    ],
)
def test_a_reference_configuration_beyond_its_checkpoint_is_refused(tiny_pretraining, part, changes):
    model = tiny_pretraining()
    config = reference_config(model)
    config["net"][part] |= changes
    with pytest.raises(CheckpointError, match=r"the state dict: the configuration asks for a model of about"):
        bestrq2.load_reference(reference_state(model), config)


def test_a_huge_front_end_is_refused_before_it_is_computed(tiny_pretraining):
    model = tiny_pretraining()
    for changes, name in (({"n_fft": 2**24}, "mel_scale.fb"), ({"win_length": 2**24}, "spectrogram.window")):
        config = reference_config(model)
        config["net"]["spectrogram"] |= {"n_fft": 2**24} | changes
        with pytest.raises(
            (CheckpointError, ConfigError), match=rf"({name}|window).* is not what|weights of mel filters"
        ):
            bestrq2.load_reference(reference_state(model), config)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"net": ' * 100_000, "\ud800", "\x00"])
def test_a_deeply_nested_or_binary_configuration_is_refused(tiny_pretraining, tmp_path, text):
    path = tmp_path / "model.safetensors"
    save_file(reference_state(tiny_pretraining()), path)
    for name in ("model.json", "model.yaml"):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read as JSON or YAML: ") as error:
            bestrq2.load_reference(path, tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config.json: "):
        bestrq2.load(tmp_path)


def test_unknown_fields_are_refused_in_either_form_of_configuration(tiny_pretraining):
    model = tiny_pretraining()
    state = reference_state(model)
    whole = {"data": {"rate": 3}, "model": {**reference_config(model), "_target_": "src.models.X", "warmup_pct": 0.05}}
    assert bestrq2.load_reference(state, whole).config.hidden_size == 32
    for change, message in (
        ({"quantizer": {"type": "fitted"}}, r"model.quantizer \(\{'type': 'fitted'\}\) is not a known field"),
        ({"net": {"encodr": {}}}, r"model.net.encodr \(\{\}\) is not a known field; did you mean 'encoder'\?"),
        (
            {"net": {"predictor": {"swiglu_gate": "first"}}},
            r"model.net.predictor.swiglu_gate \('first'\) is not a known",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            bestrq2.load_reference(state, {"model": whole["model"] | change})


def test_an_error_in_a_file_of_a_model_folder_names_the_folder(tiny_pretraining, tmp_path):
    tiny_pretraining().save_pretrained(tmp_path / "run" / "model")
    torch.save({"state_dict": {}}, tmp_path / "run" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"is part of the model in .*run/model; name that folder"):
        bestrq2.load(tmp_path / "run" / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"last.ckpt: is part of the model in .*run; name that folder"):
        bestrq2.load(tmp_path / "run" / "last.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weight: weight.index_fill(0, torch.tensor([1]), float("nan")),
            "holds weights that are NaN or infinite",
        ),
        (lambda weight: weight.index_fill(0, torch.tensor([1]), float("-inf")), "holds weights that are NaN or infin"),
        (lambda weight: (100 * weight).to(torch.int8), "is of type I8, expected floating point"),
        (lambda weight: weight > 0, "is of type BOOL, expected floating point"),
    ],
    ids=["nan", "inf", "int8", "bool"],
)
def test_weights_that_are_not_finite_or_not_floating_are_refused(tiny_pretraining, tmp_path, change, message):
    model = tiny_pretraining()
    model.save_pretrained(tmp_path)
    name = "bestrq2.encoder.blocks.1.mlp.fc1.weight"
    save_file(model.state_dict() | {name: change(model.state_dict()[name])}, tmp_path / "model.safetensors")
    for model_class in (bestrq2.BestRQ2Model, bestrq2.BestRQ2ForPreTraining):
        with pytest.raises(CheckpointError, match=f"'[a-z0-9.]*encoder.blocks.1.mlp.fc1.weight' {message}"):
            load_model_folder(tmp_path, model_class)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_pipe_or_device_in_a_model_folder_is_refused_at_once(tiny_encoder, tmp_path, name):
    write_model(tmp_path, tiny_encoder())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(it is a device, a pipe or a socket\)"):
        bestrq2.load(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
        bestrq2.load(tmp_path)


def test_a_recipe_beyond_the_memory_of_the_machine_is_refused(tmp_path):
    settings = {"extends": "best-rq-2", "model": {"hidden_size": 2**20, "num_attention_heads": 2**10}}
    (tmp_path / "large.yaml").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"needs about .* GB for its weights, and this machine has"):
        bestrq2.load(tmp_path / "large.yaml")
