"""Numerical parity with the reference implementation, on a shared fixture.

Needs `../shared/fixtures` beside the checkout, or its folder in BESTRQ2_FIXTURES; skipped elsewhere. What fits into the
repository of it is compared in `tests/model/test_reference_small.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import bestrq2
from bestrq2.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def outputs(reference_fixture) -> dict[str, np.ndarray]:
    with np.load(reference_fixture.with_suffix(".npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(reference_fixture) -> Path:
    return reference_fixture.with_suffix(".safetensors")


@pytest.fixture(scope="module")
def config(reference_fixture) -> dict:
    return json.loads(reference_fixture.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def model(checkpoint, reference_fixture) -> bestrq2.BestRQ2ForPreTraining:
    return bestrq2.load_reference(checkpoint, reference_fixture.with_suffix(".json"))


@pytest.fixture(scope="module")
def waveform(outputs) -> torch.Tensor:
    return torch.from_numpy(outputs["waveform"][:, 0].astype(np.float32) / 32768)


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(found.shape) == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max())


def test_log_mel_is_within_a_thousandth_of_a_decibel(model, waveform, outputs):
    log_mel, frames = model.base_model.log_mel(waveform)
    assert frames.tolist() == [257, 257]
    assert difference(log_mel[:, None, :, :256], outputs["log_mel"]) < 1e-3


@torch.no_grad()
def test_pretraining_reproduces_the_reference(model, waveform, outputs):
    output = model(waveform, hidden_mask=torch.from_numpy(outputs["mask"]))
    assert torch.equal(output.targets, torch.from_numpy(outputs["targets"]).long())
    assert difference(output.context_hidden_state, outputs["context_output"]) < 1e-4
    assert difference(output.logits, outputs["logits"]) < 1e-4
    assert abs(output.loss.item() - float(outputs["loss"])) < 1e-4
    for name in ("context_output", "logits"):
        assert outputs[name].std() > 0.1  # so that 1e-4 says something


@torch.no_grad()
def test_the_encoder_reproduces_the_reference(model, waveform, outputs):
    output = model.base_model(waveform)
    assert difference(output.patch_hidden_states, outputs["encoder_output"]) < 1e-4
    assert difference(output.last_hidden_state, outputs["frame_embeddings"]) < 1e-4
    assert outputs["frame_embeddings"].std() > 0.1


def test_the_embedder_reproduces_the_reference(reference_fixture, waveform, outputs):
    embeddings = bestrq2.load(reference_fixture.with_suffix(".safetensors"), "cpu").embed(
        list(waveform.numpy()), 16_000
    )
    assert np.abs(embeddings.frames - outputs["frame_embeddings"]).max() < 1e-4
    assert np.abs(embeddings.clip - outputs["frame_embeddings"].mean(axis=1)).max() < 1e-4
    assert embeddings.timestamps[0] == pytest.approx(0.3125 + 0.625 * np.arange(16))


def test_every_tensor_of_the_reference_is_used(model, checkpoint):
    stored = load_file(checkpoint)
    weights = {name: value for name, value in model.state_dict().items() if ".statistics." not in name}
    fixed = [name for name in stored if name.startswith("spectrogram.") or name.endswith("pos_embed")]
    assert len(fixed) == 4
    assert len(weights) == len(stored) - len(fixed)
    assert sorted(value.double().sum().item() for value in weights.values()) == pytest.approx(
        sorted(value.double().sum().item() for name, value in stored.items() if name not in fixed)
    )
    assert not model.training


def test_the_configuration_is_translated(model):
    found = model.config
    assert (found.sampling_rate, found.n_fft, found.win_length, found.hop_length) == (16_000, 2048, 2048, 625)
    assert (found.hidden_size, found.num_hidden_layers, found.num_attention_heads) == (64, 3, 4)
    assert (found.predictor_hidden_size, found.predictor_num_layers) == (48, 2)
    assert (found.intermediate_size, found.predictor_intermediate_size) == (256, 192)
    assert (found.codebook_size, found.codebook_dim, found.mask_ratio) == (512, 16, [0.4, 0.6])
    assert (found.objective, found.position_embedding, found.input_normalization) == ("two_step", "sincos", "none")
    assert (found.max_seconds, found.columns(found.max_samples)) == (10.0, 16)


@pytest.mark.parametrize("kind", ["mapping", "json", "yaml"])
@pytest.mark.parametrize("form", ["safetensors", "ckpt", "state dict", "prefixed safetensors"])
def test_any_form_of_checkpoint_and_configuration_gives_the_same_model(model, checkpoint, config, tmp_path, kind, form):
    state = load_file(checkpoint)
    source = state
    if form == "safetensors":
        source = checkpoint
    elif form == "ckpt":
        source = tmp_path / "last.ckpt"
        prefixed = {f"net.{name}": value for name, value in state.items()}
        torch.save({"state_dict": prefixed, "epoch": 3, "global_step": 12, "hyper_parameters": {"lr": 1e-4}}, source)
    elif form == "prefixed safetensors":
        source = tmp_path / "model.safetensors"
        save_file({f"model.net.{name}": value for name, value in state.items()}, source)
    given = config
    if kind != "mapping":
        given = tmp_path / f"config.{kind}"
        given.write_text(json.dumps(config) if kind == "json" else yaml.safe_dump(config))
    loaded = bestrq2.load_reference(source, given)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    ("part", "changes", "tensor"),
    [
        ("spectrogram", {"n_mels": 64}, "mel_scale.fb"),
        ("spectrogram", {"f_max": 7600}, "mel_scale.fb"),
        ("spectrogram", {"f_min": 60}, "mel_scale.fb"),
        ("spectrogram", {"win_length_ms": 64}, "spectrogram.window"),
        ("spectrogram", {"n_fft": 4096}, "mel_scale.fb"),
        ("patch_embed", {"img_size": [128, 208]}, "encoder.pos_embed"),
        ("patch_embed", {"patch_size": [32, 8]}, "encoder.pos_embed"),
        ("encoder", {"embed_dim": 128}, "encoder.pos_embed"),
    ],
)
def test_a_configuration_that_contradicts_the_checkpoint_is_refused(checkpoint, config, part, changes, tensor):
    wrong = {**config, "net": {**config["net"], part: {**config["net"][part], **changes}}}
    with pytest.raises(
        CheckpointError, match=rf"{tensor}.* is not what the configuration gives.*check net.spectrogram"
    ):
        bestrq2.load_reference(checkpoint, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"embed_dim": 64, "num_heads": 5}},
            r"hidden_size \(64\) must be a multiple of num_attention_heads",
        ),
        ({"spectrogram": {"power": 1.0}}, "power is 1.0, only 2.0"),
        (
            {"spectrogram": {"hop_length_ms": "short"}},
            "fit: net.spectrogram.hop_length_ms is 'short', expected a number",
        ),
        ({"spectrogram": "mel"}, "does not fit"),
    ],
)
def test_an_impossible_configuration_is_refused(checkpoint, config, changes, message):
    with pytest.raises(ConfigError, match=message):
        bestrq2.load_reference(checkpoint, {**config, "net": {**config["net"], **changes}})
    with pytest.raises(ConfigError, match="does not fit"):
        bestrq2.load_reference(checkpoint, {"net": "small"})


def test_an_unreadable_configuration_file_is_refused(checkpoint, tmp_path):
    broken, other = tmp_path / "broken.json", tmp_path / "list.yaml"
    broken.write_text('{"net": ')
    other.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match=r"broken.json: cannot be read as JSON or YAML"):
        bestrq2.load_reference(checkpoint, broken)
    with pytest.raises(ConfigError, match=r"list.yaml: expected a mapping with the key 'net', found list"):
        bestrq2.load_reference(checkpoint, other)
    with pytest.raises(ConfigError, match=r"nowhere.json: does not exist; name the JSON or YAML file"):
        bestrq2.load_reference(checkpoint, tmp_path / "nowhere.json")
