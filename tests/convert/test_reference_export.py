"""Export to the reference layout: exact round trips, and errors for what the layout cannot express."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import bestrq2
from bestrq2.convert.export import export_reference
from bestrq2.errors import CheckpointError, ConfigError
from reference_layout import reference_config, reference_state

LAYOUTS = {
    "two_step": {},
    "one_stage": {"objective": "one_stage"},
    "rotary": {"position_embedding": "rope_2d"},
    "rotary one_stage": {"objective": "one_stage", "position_embedding": "rope_2d"},
}
# The block of BEST-RQ-2.1, with a head of 16 and full-height strips.
MODERN = {
    "activation": "swiglu",
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "use_bias": False,
    "qk_norm": True,
    "position_embedding": "rope_time",
    "patch_size": [128, 4],
}


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key].view(torch.int32), value.view(torch.int32))
        for key, value in expected.items()
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, "modern"])
def test_an_exported_checkpoint_loads_as_the_same_model(tiny_pretraining, tmp_path, layout):
    model = tiny_pretraining(**LAYOUTS.get(layout, MODERN))
    model.save_pretrained(tmp_path / "model")
    written = export_reference(str(tmp_path), tmp_path / "out.safetensors")
    assert written == tmp_path / "out.safetensors"
    loaded = bestrq2.load_reference(written, written.with_suffix(".json"))
    assert same_bits(loaded.state_dict(), model.state_dict())
    found, expected = loaded.config.to_diff_dict(), model.config.to_diff_dict()
    changed = {name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)}
    changed -= {"architectures", "dtype", "transformers_version"}
    # A one-stage model has no predictor, so its sizes say nothing.
    assert all(name.startswith("predictor_") and "one_stage" in layout for name in changed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_reference_checkpoint_comes_back_bit_for_bit(tiny_pretraining, tmp_path, layout, suffix):
    model = tiny_pretraining(**LAYOUTS[layout])
    state = reference_state(model)
    for part in ("encoder", "predictor"):
        if f"{part}.pos_embed" in state:  # the last bits of the table are checked against the fixture below
            state[f"{part}.pos_embed"] = export_table(model, part, tmp_path)
    source = tmp_path / f"theirs{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 3}, source)
    else:
        save_file(state, source)
    source.with_suffix(".yaml").write_text(yaml.safe_dump(reference_config(model)))
    assert same_bits(load_file(export_reference(str(source), tmp_path / "ours.safetensors")), state)


def export_table(model: bestrq2.BestRQ2ForPreTraining, part: str, folder: Path) -> Tensor:
    model.save_pretrained(folder / "for_table")
    return load_file(export_reference(str(folder / "for_table"), folder / "table.safetensors"))[f"{part}.pos_embed"]


def test_the_reference_fixture_comes_back_bit_for_bit(reference_fixture, tmp_path):
    source = reference_fixture.with_suffix(".safetensors")
    written = export_reference(str(source), tmp_path / "again.safetensors")
    assert same_bits(load_file(written), load_file(source))
    # The exported configuration says what the original says, in every field they share.
    theirs, ours = (json.loads(path.with_suffix(".json").read_text()) for path in (reference_fixture, written))
    samples = {"win_length_ms": "win_length", "hop_length_ms": "hop_length"}
    for part, fields in theirs["net"].items():
        for name, value in fields.items():
            if name in samples:
                assert ours["net"][part][samples[name]] == value * 16
            else:
                assert ours["net"][part][name] == value, (part, name)


@pytest.mark.parametrize("layout", ["two_step", "rotary", "modern"])
def test_an_encoder_is_exported_as_a_hub_export(tiny_encoder, tmp_path, layout):
    encoder = tiny_encoder(**LAYOUTS.get(layout, MODERN))
    encoder.save_pretrained(tmp_path / "encoder")
    first = export_reference(str(tmp_path / "encoder"), tmp_path / "first.safetensors")
    assert json.loads(first.with_suffix(".json").read_text())["model_type"] == "audio_embeddings"
    loaded = bestrq2.load(first, "cpu").model
    assert same_bits(loaded.state_dict(), encoder.state_dict())
    second = export_reference(str(first), tmp_path / "second.safetensors")
    assert same_bits(load_file(second), load_file(first))
    assert second.with_suffix(".json").read_text() == first.with_suffix(".json").read_text()


def test_mlp_ratio_reproduces_the_width_in_float_arithmetic(tiny_pretraining, tmp_path):
    for intermediate in range(20, 120, 3):
        model = tiny_pretraining(intermediate_size=intermediate, hidden_size=44, num_hidden_layers=1)
        model.save_pretrained(tmp_path / "model")
        written = export_reference(str(tmp_path / "model"), tmp_path / "out.safetensors")
        encoder = json.loads(written.with_suffix(".json").read_text())["net"]["encoder"]
        assert int(44 * encoder["mlp_ratio"]) == intermediate


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input_normalization": "dataset"}, "input_normalization is 'dataset'"),
        ({"patch_size": [8, 16], "short_win_length": 400, "short_mel_bands": 8}, "short_mel_bands is 8"),
        ({"quantizer_normalization": "layernorm"}, "quantizer_normalization is 'layernorm'"),
        ({"num_codebooks": 2}, "num_codebooks is 2"),
        ({"position_embedding": "learned"}, "position_embedding is 'learned'"),
    ],
)
def test_fields_that_the_layout_cannot_express_are_refused_by_name(tiny_pretraining, tmp_path, changes, field):
    tiny_pretraining(**changes).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"^{field}: the .*layout.*export as hf"):
        export_reference(str(tmp_path / "model"), tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_a_conformer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^encoder_type is 'conformer'"):
        export_reference("best-rq-conformer-tiny", tmp_path / "out.safetensors")


def test_an_encoder_exports_whatever_its_pretraining_settings(tiny_encoder, tmp_path):
    tiny_encoder(num_codebooks=2).save_pretrained(tmp_path / "model")
    assert export_reference(str(tmp_path / "model"), tmp_path / "out.safetensors").is_file()


def test_impossible_outputs_and_sources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"out.ckpt: a reference checkpoint is written as .safetensors"):
        export_reference("best-rq-2-tiny", tmp_path / "out.ckpt")
    with pytest.raises(ConfigError, match="does not exist; create it"):
        export_reference("best-rq-2-tiny", tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(CheckpointError, match="there is no such model"):
        export_reference("unknown", tmp_path / "out.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        export_reference(str(tmp_path / "model"), tmp_path / "out.safetensors")
