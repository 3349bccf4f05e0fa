"""Hub exports of the reference implementation (`model_type: audio_embeddings`) and the layout of BEST-RQ-2.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bestrq2
from bestrq2.convert.reference import load_reference_encoder
from bestrq2.errors import CheckpointError, ConfigError
from example_sounds import scene
from reference_layout import reference_config, reference_state

MODERN = {
    "activation": "swiglu",
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "use_bias": False,
    "qk_norm": True,
    "position_embedding": "rope_time",
    "patch_size": [128, 4],
}
GATED = "encoder.blocks.{}.mlp."


def hub_state(model: bestrq2.BestRQ2ForPreTraining) -> dict[str, Tensor]:
    """What an export of the encoder holds: everything in front of and in the encoder, its fixed buffers included."""
    parts = ("encoder.", "patch_embed.", "spectrogram.")
    return {name: value for name, value in reference_state(model).items() if name.startswith(parts)}


def hub_config(model: bestrq2.BestRQ2ForPreTraining, **encoder: Any) -> dict[str, Any]:
    net = reference_config(model)["net"]
    return {
        "architectures": ["AudioEmbeddingsModel"],
        "auto_map": {"AutoModel": "modeling.AudioEmbeddingsModel"},
        "dtype": "float32",
        "encoder_kwargs": net["encoder"] | encoder,
        "extraction_preset": "overlap50_two_phase",
        "hidden_size": model.config.hidden_size,
        "model_target": "src.models.best_rq2_module.BestRQ2Module",
        "model_type": "audio_embeddings",
        "patch_embed_kwargs": net["patch_embed"],
        "sampling_rate": 16_000,
        "spectrogram_adjustment_mode": "truncate",
        "spectrogram_kwargs": net["spectrogram"],
        "transformers_version": "4.57.1",
    }


def modern_config(model: bestrq2.BestRQ2ForPreTraining, **encoder: Any) -> dict[str, Any]:
    return hub_config(model, **{"norm_layer": "rmsnorm", "norm_eps": 1e-6, **encoder})


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(tiny_pretraining) -> bestrq2.BestRQ2ForPreTraining:
    return tiny_pretraining()


@pytest.fixture(scope="module")
def modern(tiny_pretraining) -> bestrq2.BestRQ2ForPreTraining:
    return tiny_pretraining(**MODERN)


def same_encoder(found: bestrq2.BestRQ2Model, model: bestrq2.BestRQ2ForPreTraining) -> bool:
    expected = model.base_model.state_dict()
    same = found.state_dict().keys() == expected.keys() and not found.training
    return same and all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.", "audio_embeddings.net."])
@pytest.mark.parametrize("layout", ["sincos", "rope_2d"])
def test_a_hub_folder_loads_with_any_prefix_of_keys(tiny_pretraining, tmp_path, prefix, layout):
    model = tiny_pretraining(position_embedding=layout)
    state = {prefix + name: value for name, value in hub_state(model).items()}
    embedder = bestrq2.load(write(tmp_path / "hub", state, hub_config(model)), "cpu")
    assert same_encoder(embedder.model, model)
    clip = scene(60_000)
    expected = bestrq2.Embedder(model.base_model, "cpu").embed(clip)
    assert np.array_equal(embedder.embed(clip).frames, expected.frames)


def test_the_reference_fixture_gives_its_frames_as_a_hub_export(reference_fixture, tmp_path):
    parts = ("encoder.", "patch_embed.", "spectrogram.")
    stored = load_file(reference_fixture.with_suffix(".safetensors"))
    state = {f"backbone.{name}": value for name, value in stored.items() if name.startswith(parts)}
    net = json.loads(reference_fixture.with_suffix(".json").read_text())["net"]
    config = {f"{part}_kwargs": net[part] for part in ("encoder", "patch_embed", "spectrogram")}
    embedder = bestrq2.load(write(tmp_path / "hub", state, config | {"model_type": "audio_embeddings"}), "cpu")
    with np.load(reference_fixture.with_suffix(".npz")) as outputs:
        waveform = outputs["waveform"][:, 0].astype(np.float32) / 32768
        found = embedder.embed(list(waveform), 16_000).frames
        assert np.abs(found - outputs["frame_embeddings"]).max() < 1e-4


def test_keys_are_matched_by_their_ends_and_buffers_may_be_missing(model, tmp_path):
    state = {
        name.replace("encoder.", "vit.").replace("patch_embed.patch_embed.", "embeddings.patch_embed."): value
        for name, value in hub_state(model).items()
        if not name.startswith("spectrogram.")
    }
    del state["vit.pos_embed"]
    assert same_encoder(bestrq2.load(write(tmp_path / "hub", state, hub_config(model)), "cpu").model, model)


def test_weights_in_several_files_load(model, tmp_path):
    names = sorted(hub_state(model))
    folder = write(tmp_path / "hub", {name: hub_state(model)[name] for name in names[:9]}, hub_config(model))
    save_file({name: hub_state(model)[name] for name in names[9:]}, folder / "model-2.safetensors")
    assert same_encoder(bestrq2.load(folder, "cpu").model, model)


def test_a_hub_id_is_downloaded_and_loaded_like_a_folder(model, tmp_path, monkeypatch):
    folder = write(tmp_path / "hub", hub_state(model), hub_config(model))
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        bestrq2.BestRQ2Config, "get_config_dict", lambda name: (json.loads((folder / "config.json").read_text()), {})
    )
    assert same_encoder(bestrq2.load("someone/BEST-RQ-2", "cpu").model, model)
    assert asked == [("someone/BEST-RQ-2", ["config.json", "*.safetensors"])]  # neither code nor pickles


def test_a_failed_download_is_an_error_of_one_sentence(monkeypatch):
    def download(name: str, **options: Any) -> str:
        raise OSError("no connection\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(bestrq2.BestRQ2Config, "get_config_dict", lambda name: ({"model_type": "audio_embeddings"}, {}))
    with pytest.raises(CheckpointError, match=r"^someone/it: the model cannot be downloaded: no connection$"):
        bestrq2.load("someone/it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "mean"}, r"hub/config.json: .*pooling \('mean'\) is not a known field"),
        ({"sampling_rat": 8000}, r"sampling_rat \(8000\) is not a known field; did you mean 'sampling_rate'\?"),
        (
            {"spectrogram_adjustment_mode": "pad"},
            r"spectrogram_adjustment_mode is 'pad', only whole patches count here",
        ),
        ({"sampling_rate": 32_000}, r"sampling_rate is 32000, spectrogram_kwargs.sample_rate is 16000"),
        ({"hidden_size": 768}, r"hidden_size is 768, encoder_kwargs.embed_dim is 32"),
        (
            {"model_target": "src.models.audio_jepa_module.AudioJEPAModule"},
            r"model_target is '.*', expected a module",
        ),
        ({"encoder_kwargs": "base"}, r"encoder_kwargs is 'base', expected a mapping"),
    ],
)
def test_unknown_or_contradictory_fields_are_refused_by_name(model, tmp_path, changes, message):
    folder = write(tmp_path / "hub", hub_state(model), hub_config(model) | changes)
    with pytest.raises(ConfigError, match=message):
        bestrq2.load(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("encoder", {"window_size": 7}, r"encoder_kwargs.window_size \(7\) is not a known field"),
        ("encoder", {"pos_embed_type": "learnable"}, r"pos_embed_type is 'learnable', expected sincos, rope"),
        ("encoder", {"qkv_bias": False}, r"encoder_kwargs.qkv_bias is False, by the tensors it is True"),
        ("encoder", {"qk_norm": True}, r"encoder_kwargs.qk_norm is True, by the tensors it is False"),
        ("encoder", {"act_layer": "torch.nn.SiLU"}, r"act_layer is 'torch.nn.SiLU', by the tensors it is gelu"),
        ("encoder", {"norm_layer": "batchnorm"}, r"norm_layer is 'batchnorm', expected layernorm or rmsnorm"),
        ("encoder", {"attn_drop_rate": 0.1}, r"attn_drop_rate is 0.1, there is no dropout here"),
        ("encoder", {"num_patches": 100}, r"num_patches is 100, the grid has 64"),
        ("encoder", {"depth": 2.5}, r"encoder_kwargs.depth is 2.5, expected a whole number"),
        ("patch_embed", {"in_chans": 2}, r"patch_embed_kwargs.in_chans is 2, the spectrogram has one channel"),
        ("patch_embed", {"embed_dim": 64}, r"patch_embed_kwargs.embed_dim is 64, the encoder's width is 32"),
        ("patch_embed", {"img_size": [64, 128]}, r"patch_embed_kwargs.img_size is \[64, 128\], the mel bands are 128"),
        ("spectrogram", {"power": 1.0}, r"spectrogram_kwargs.power is 1.0, only 2.0"),
        ("spectrogram", {"normalize_db": True}, r"spectrogram_kwargs.normalize_db \(True\) is not a known field"),
        ("spectrogram", {"sample_rate": "${data.rate}"}, r"sample_rate is '\$\{data.rate\}', expected a number"),
    ],
)
def test_fields_of_the_parts_are_refused_by_name(model, tmp_path, part, changes, message):
    config = hub_config(model)
    config[f"{part}_kwargs"] = config[f"{part}_kwargs"] | changes
    with pytest.raises(ConfigError, match=message):
        bestrq2.load(write(tmp_path / "hub", hub_state(model), config))


@pytest.mark.parametrize(("part", "names"), [("encoder", ["num_heads"]), ("spectrogram", ["hop_length_ms"])])
def test_fields_that_tensors_do_not_determine_are_required(model, tmp_path, part, names):
    config = hub_config(model)
    config[f"{part}_kwargs"] = {name: value for name, value in config[f"{part}_kwargs"].items() if name not in names}
    with pytest.raises(ConfigError, match=rf"{part}_kwargs.{names[0]} is None, expected .*no tensor shows"):
        bestrq2.load(write(tmp_path / "hub", hub_state(model), config))


def test_misshaped_tensors_are_named(model, tmp_path):
    state = hub_state(model)
    del state["encoder.blocks.1.norm2.bias"]
    state |= {"pool.query": torch.ones(3), "encoder.norm.weight": torch.ones(31)}
    with pytest.raises(CheckpointError, match=r"missing 1: .*1.norm2.bias; unexpected 1: pool.query; misshaped 1: "):
        bestrq2.load(write(tmp_path / "one", state, hub_config(model)))
    state = hub_state(model) | {"patch_embed.norm.weight": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"'.*norm.weight' and '.*norm.weight' both end like 'encoder.norm.w"):
        bestrq2.load(write(tmp_path / "two", state, hub_config(model)))
    state = hub_state(model) | {"predictor.blocks.0.norm1.weight": torch.ones(24)}
    with pytest.raises(CheckpointError, match=r"unexpected 1: predictor.blocks.0.norm1.weight"):
        bestrq2.load(write(tmp_path / "three", state, hub_config(model)))
    state = hub_state(model) | {"encoder.norm.bias": torch.ones(32, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"not of floating point 1: encoder.norm.bias \(torch.int64\)"):
        bestrq2.load(write(tmp_path / "four", state, hub_config(model)))


def test_an_encoder_does_not_load_as_a_pretraining_model(model):
    with pytest.raises(ConfigError, match=r"encoder alone, without predictor and quantizer; load it with bestrq2.load"):
        bestrq2.load_reference(hub_state(model), hub_config(model))


def spelled(model: bestrq2.BestRQ2ForPreTraining, spelling: str) -> dict[str, Tensor]:
    """The modern encoder with its gates under the names of one code base."""
    state = modern_state(model)
    for block in range(model.config.num_hidden_layers):
        at = GATED.format(block)
        gate, value = state.pop(f"{at}fc1.weight").chunk(2)
        output = state.pop(f"{at}fc2.weight")
        state |= {
            f"{at}{name}.weight": tensor.clone()
            for name, tensor in {
                "timm": {"fc1_g": gate, "fc1_x": value, "fc2": output},
                "llama": {"w1": gate, "w3": value, "w2": output},
                "dinov3": {"w1": gate, "w2": value, "w3": output},
                "dinov2": {"w12": torch.cat([gate, value]), "w3": output},
                "transformers": {"gate_proj": gate, "up_proj": value, "down_proj": output},
                "gate first": {"fc1": torch.cat([gate, value]), "fc2": output},
                "gate last": {"fc1": torch.cat([value, gate]), "fc2": output},
            }[spelling].items()
        }
    return state


def modern_state(model: bestrq2.BestRQ2ForPreTraining) -> dict[str, Tensor]:
    """The modern encoder by the reference's names, without the buffers whose names are not known."""
    encoder = model.bestrq2.encoder.state_dict()
    weight = model.bestrq2.patch_embedding.weight.detach()
    state = {f"encoder.{name}": value.clone() for name, value in encoder.items()}
    return state | {"patch_embed.patch_embed.proj.weight": weight.view(-1, 1, 128, 4).clone()}


@pytest.mark.parametrize("spelling", ["timm", "llama", "dinov3", "dinov2", "transformers", "gate first", "gate last"])
def test_every_unambiguous_spelling_of_swiglu_gives_the_same_encoder(modern, spelling):
    fields = {"pos_embed_type": "rope_time", "qkv_bias": False, "qk_norm": True, "act_layer": "swiglu"}
    if spelling.startswith("gate"):
        fields["swiglu_gate"] = spelling.split()[1]
    found = load_reference_encoder(spelled(modern, spelling), modern_config(modern, **fields))
    assert same_encoder(found, modern)
    expected = modern.config.to_diff_dict()
    for name in MODERN:
        assert getattr(found.config, name) == expected[name], name


def test_a_packed_gate_of_unknown_order_is_refused_with_the_field_that_states_it(modern):
    with pytest.raises(
        CheckpointError,
        match=r"'encoder.blocks.0.mlp.fc1.weight' \[96, 32\] holds gate and value.*"
        r"set encoder_kwargs.swiglu_gate to first or last",
    ):
        load_reference_encoder(spelled(modern, "gate first"), modern_config(modern))
    with pytest.raises(ConfigError, match="swiglu_gate is 'middle', expected first or last"):
        load_reference_encoder(spelled(modern, "gate first"), modern_config(modern, swiglu_gate="middle"))


def test_numbered_square_matrices_do_not_determine_the_order_of_a_gate(tiny_pretraining):
    square = tiny_pretraining(**MODERN, hidden_size=48, intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"missing 4: encoder.blocks.0.mlp.fc1.weight.*unexpected 6: .*mlp.w1"):
        load_reference_encoder(spelled(square, "llama"), modern_config(square, pos_embed_type="rope_time"))


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("norm_layer", r"norm_layer is None, expected rmsnorm or layernorm: norms without bias may be either"),
        ("norm_eps", r"norm_eps is None, expected the epsilon of the RMSNorm"),
    ],
)
def test_ambiguous_norms_require_a_field(modern, dropped, message):
    config = modern_config(modern, pos_embed_type="rope_time")
    del config["encoder_kwargs"][dropped]
    with pytest.raises(ConfigError, match=message):
        load_reference_encoder(spelled(modern, "timm"), config)


@pytest.mark.parametrize(
    ("names", "width", "kind"),
    [(["inv_freq_t"], 16, "rope_time"), (["inv_freq"], 16, "rope_time"), (["inv_freq_h", "inv_freq_w"], 8, "rope_2d")],
)
def test_rotary_frequencies_determine_the_kind_of_positions(modern, names, width, kind):
    frequencies = 1.0 / 10_000 ** (torch.arange(0, width, 2).float() / width)
    state = spelled(modern, "timm") | {f"encoder.blocks.0.attn.rope.{name}": frequencies.clone() for name in names}
    assert load_reference_encoder(state, modern_config(modern)).config.position_embedding == kind
    other = {name: value * 0.9 if "inv_freq" in name else value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"inv_freq.* is not what the configuration gives"):
        load_reference_encoder(other, modern_config(modern))


def test_undetermined_positions_are_refused(modern):
    with pytest.raises(ConfigError, match=r"pos_embed_type is None, expected .*among the tensors are no positions"):
        load_reference_encoder(spelled(modern, "timm"), modern_config(modern))


@pytest.mark.parametrize(("ratio", "fits"), [(1.5, True), (2.25, True), (4.0, False)])
def test_the_ratio_of_a_gated_layer_may_count_both_halves(modern, ratio, fits):
    config = modern_config(modern, pos_embed_type="rope_time", mlp_ratio=ratio)
    if fits:
        assert same_encoder(load_reference_encoder(spelled(modern, "timm"), config), modern)
    else:
        with pytest.raises(ConfigError, match=r"mlp_ratio is 4.0, by the tensors the gated width is 48"):
            load_reference_encoder(spelled(modern, "timm"), config)


def test_a_bias_of_the_patch_embedding_alone_is_refused(modern):
    state = spelled(modern, "timm") | {"patch_embed.patch_embed.proj.bias": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"unexpected 1: patch_embed.patch_embed.proj.bias"):
        load_reference_encoder(state, modern_config(modern, pos_embed_type="rope_time"))
