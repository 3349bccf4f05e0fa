"""Import of every reference layout, with checkpoints built from models of this package."""

from __future__ import annotations

import pytest
import torch

from bestrq2 import load_reference
from bestrq2.errors import CheckpointError
from example_sounds import scenes
from reference_layout import reference_config, reference_state


@pytest.mark.parametrize("objective", ["two_step", "one_stage"])
@pytest.mark.parametrize("positions", ["sincos", "rope_2d"])
@torch.no_grad()
def test_every_layout_reproduces_the_outputs_of_its_model(tiny_pretraining, objective, positions):
    model = tiny_pretraining(objective=objective, position_embedding=positions, drop_path_rate=0.1)
    state, config = reference_state(model), reference_config(model)
    assert ("encoder.rope.inv_freq_h" in state) == (positions == "rope_2d")
    assert ("encoder.pos_embed" in state) == (positions == "sincos")
    assert ("output_proj.weight" in state) == (objective == "one_stage")
    loaded = load_reference(state, config)
    whole = {"architectures": ["BestRQ2ForPreTraining"]}
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() | whole
    clips, hidden = scenes(2, 80_000), torch.arange(64) % 3 > 0
    expected, found = model(clips, hidden_mask=hidden), loaded(clips, hidden_mask=hidden)
    for name in ("logits", "targets", "context_hidden_state", "loss"):
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(loaded.base_model(clips).pooler_output, model.base_model(clips).pooler_output)


def test_values_absent_from_the_configuration_are_the_papers(tiny_pretraining):
    model = tiny_pretraining(
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_size=48,
        intermediate_size=192,
        predictor_hidden_size=48,
        predictor_num_layers=4,
        predictor_num_attention_heads=12,
        predictor_intermediate_size=192,
        codebook_dim=16,
        max_seconds=10.0,
    )
    loaded = load_reference(reference_state(model), {"vocab_size": 64, "net": {"encoder": {"embed_dim": 48}}})
    assert loaded.config.drop_path_rate == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_converted_exactly(tiny_pretraining, dtype):
    model = tiny_pretraining()
    state = {name: value.to(dtype) for name, value in reference_state(model).items()}
    found = load_reference(state, reference_config(model)).state_dict()
    for name, value in model.state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value if "statistics" in name else value.to(dtype).float()), name


def without(state: dict, *keys: str) -> dict:
    return {name: value for name, value in state.items() if name not in keys}


def test_missing_extra_and_misshaped_tensors_are_listed_by_their_own_names(tiny_pretraining):
    model = tiny_pretraining()
    state = without(reference_state(model), "encoder.blocks.1.attn.qkv.weight", "rq_proj.bias", "quantizer.CB")
    state["encoder.blocks.2.norm1.weight"] = torch.ones(32)
    state["teacher.weight"] = torch.ones(2)
    state["predictor_input_proj.weight"] = torch.ones(24, 16)
    state["patch_embed.patch_embed.proj.weight"] = torch.ones(32, 1, 16, 8)
    state["quantizer.P"] = torch.ones(256, 4)
    with pytest.raises(CheckpointError) as error:
        load_reference(state, reference_config(model))
    message = str(error.value)
    assert "missing 3: encoder.blocks.1.attn.qkv.weight, quantizer.CB, rq_proj.bias" in message
    assert "unexpected 2: encoder.blocks.2.norm1.weight, teacher.weight" in message
    assert "misshaped 3: patch_embed.patch_embed.proj.weight [32, 1, 16, 8], not [32, 1, 16, 16]" in message
    assert "predictor_input_proj.weight [24, 16], not [24, 32]" in message
    assert "quantizer.P [256, 4], not [256, 8]" in message


@pytest.mark.parametrize(
    "name", ["encoder.pos_embed", "predictor.pos_embed", "spectrogram.mel_spec.spectrogram.window", "mask_token"]
)
def test_every_tensor_of_the_layout_is_required(tiny_pretraining, name):
    model = tiny_pretraining()
    with pytest.raises(CheckpointError, match=rf"missing 1: {name}\)"):
        load_reference(without(reference_state(model), name), reference_config(model))


def test_a_tensor_outside_of_the_prefix_is_extra(tiny_pretraining):
    model = tiny_pretraining()
    state = {f"net.{name}": value for name, value in reference_state(model).items()}
    load_reference(state, reference_config(model))
    state["criterion.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"unexpected 1: criterion.weight\)"):
        load_reference(state, reference_config(model))


@pytest.mark.parametrize(("objective", "other"), [("two_step", "output_proj"), ("one_stage", "rq_proj")])
def test_the_head_of_the_other_objective_is_extra(tiny_pretraining, objective, other):
    model = tiny_pretraining(objective=objective)
    state = reference_state(model) | {f"{other}.{name}": value for name, value in model.head.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"unexpected 2: {other}.bias, {other}.weight\)"):
        load_reference(state, reference_config(model))


def test_a_patch_embedding_of_another_shape_and_equal_size_is_refused(tiny_pretraining):
    model = tiny_pretraining()
    state = reference_state(model)
    for shape in ((32, 256), (32, 2, 16, 8), (32, 1, 8, 32), (32 * 256,)):
        state["patch_embed.patch_embed.proj.weight"] = torch.ones(shape)
        with pytest.raises(
            CheckpointError, match=rf"proj.weight \[{', '.join(map(str, shape))}\], not \[32, 1, 16, 16\]"
        ):
            load_reference(state, reference_config(model))


@pytest.mark.parametrize("place", ["encoder.rope.inv_freq_h", "predictor.blocks.0.attn.rope.inv_freq_w"])
def test_rotary_frequencies_of_another_base_are_refused(tiny_pretraining, place):
    model = tiny_pretraining(position_embedding="rope_2d")
    state = reference_state(model)
    state[place] = state[place] * 0.9
    with pytest.raises(CheckpointError, match=f"'{place}'.* is not what the configuration gives"):
        load_reference(state, reference_config(model))


def test_positions_that_contradict_the_configuration_are_refused(tiny_pretraining):
    rotary, sine_cosine = tiny_pretraining(position_embedding="rope_2d"), tiny_pretraining()
    with pytest.raises(CheckpointError, match=r"missing 2: encoder.pos_embed, predictor.pos_embed; unexpected 10: "):
        load_reference(reference_state(rotary), reference_config(sine_cosine))


def test_other_checkpoints_are_not_taken_for_reference_checkpoints(tiny_pretraining):
    model = tiny_pretraining()
    with pytest.raises(CheckpointError, match=r"no tensor 'patch_embed.patch_embed.proj.weight'.*it holds bestrq2\."):
        load_reference(model.state_dict(), reference_config(model))
    with pytest.raises(CheckpointError, match="not a checkpoint of the reference"):
        load_reference({}, {})
