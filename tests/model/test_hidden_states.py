"""Hidden states and attention weights of the encoder, and the other outputs that transformers' callers ask for."""

from __future__ import annotations

import pytest
import torch

from bestrq2 import BestRQ2ForAudioClassification, BestRQ2Model
from bestrq2.train.objective import checkpoint_activations
from example_sounds import padded_batch, scenes

VIT: dict[str, object] = {}
CONFORMER = {
    "objective": "one_stage",
    "mask_fill": "noise",
    "mask_ratio": [0.6, 0.6],
    "input_normalization": "clip",
    "quantizer_normalization": "layernorm",
    "encoder_type": "conformer",
    "position_embedding": "relative",
    "num_mel_bands": 80,
    "patch_size": [80, 4],
    "n_fft": 400,
    "win_length": 400,
    "hop_length": 160,
    "conformer_channels": [8, 4],
    "conformer_dropout": 0.0,
    "max_seconds": 2.5,
}


@pytest.fixture(params=[VIT, CONFORMER], ids=["vit", "conformer"])
def model(request, tiny_encoder) -> BestRQ2Model:
    return tiny_encoder(**request.param)


@torch.no_grad()
def test_hidden_states_are_inputs_and_outputs_of_the_blocks(model):
    seen: list[torch.Tensor] = []
    hooks = [model.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))]
    hooks += [block.register_forward_hook(lambda _, __, out: seen.append(out[0])) for block in model.encoder.blocks]
    waveforms, mask = padded_batch([40_000, 23_000])
    output = model(waveforms, mask, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for found, expected in zip(output.hidden_states, seen, strict=True):
        assert found.shape == output.patch_hidden_states.shape
        assert torch.equal(found, expected)
    norm = getattr(model.encoder, "norm", torch.nn.Identity())
    assert torch.equal(norm(output.hidden_states[-1]), output.patch_hidden_states)
    assert not torch.equal(output.hidden_states[0], output.hidden_states[1])


@torch.no_grad()
def test_output_hidden_states_changes_no_other_output(model):
    waveforms = scenes(2, 30_000)
    plain, asked = model(waveforms), model(waveforms, output_hidden_states=True)
    assert plain.hidden_states is None
    assert "hidden_states" not in plain.keys()  # noqa: SIM118 - a ModelOutput leaves out what is None
    for name in plain:
        assert torch.equal(plain[name], asked[name])


@torch.no_grad()
def test_the_configuration_can_request_hidden_states(model):
    waveforms = scenes(1, 20_000)
    model.config.output_hidden_states = True
    assert len(model(waveforms).hidden_states) == model.config.num_hidden_layers + 1
    assert model(waveforms, output_hidden_states=False).hidden_states is None


def test_gradient_checkpointing_keeps_hidden_states(model):
    waveforms = scenes(1, 20_000)
    expected = model(waveforms, output_hidden_states=True).hidden_states
    checkpoint_activations(model)
    model.train()
    found = model(waveforms, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, expected)
    found[1].sum().backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.encoder.blocks[1].attn.qkv.weight.grad is None


@torch.no_grad()
def test_attention_weights_are_shares_of_the_valid_patches(model):
    waveforms, mask = padded_batch([40_000, 23_000])
    fused = model(waveforms, mask, output_attentions=True)  # warns that there are none
    assert fused.attentions is None
    expected = fused.pooler_output
    model.set_attn_implementation("eager")
    output = model(waveforms, mask, output_attentions=True)
    torch.testing.assert_close(output.pooler_output, expected, atol=1e-5, rtol=1e-5)
    valid = model.patches(waveforms, mask).valid
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        assert weights.shape == (2, model.config.num_attention_heads, valid.shape[1], valid.shape[1])
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))
        assert torch.all(weights[1, ..., ~valid[1]] == 0)


@torch.no_grad()
def test_every_model_returns_states_and_weights_or_a_tuple(tiny_pretraining, tiny_config):
    clips, hidden = scenes(2, 80_000), torch.arange(64) % 4 == 0
    asked = {"output_hidden_states": True, "output_attentions": True}
    pretraining = tiny_pretraining(attn_implementation="eager")
    classifier = BestRQ2ForAudioClassification(tiny_config(attn_implementation="eager")).eval()
    for model, given, patches in ((pretraining, {"hidden_mask": hidden}, 48), (classifier, {}, 64)):
        output = model(clips, **given, **asked)
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, patches, 32)] * 3
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, patches, patches)] * 2
        model.config.return_dict = False
        found = model(clips, **given, **asked)
        assert isinstance(found, tuple)
        for left, right in zip(found, output.to_tuple(), strict=True):
            torch.testing.assert_close(left, right)
        assert torch.equal(model(clips, **given, return_dict=True)[0], output[0])


def test_a_conformer_refuses_kernels_without_a_bias(model):
    for name in ("flash_attention_2", "flex_attention"):
        if model.config.encoder_type == "conformer":
            with pytest.raises(ValueError, match="BestRQ2Model does not support"):
                model.set_attn_implementation(name)
