"""Blocks: equal numbers by every route, stochastic depth that keeps expectations, the paper's initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bestrq2 import BestRQ2ForPreTraining, BestRQ2Model
from bestrq2.model.attention import eager_attention_forward
from bestrq2.model.transformer import Block, RMSNorm, branch_scales
from bestrq2.train.objective import checkpoint_activations
from example_sounds import padded_batch, scenes

VARIANTS = [
    {},
    {"position_embedding": "rope_2d", "qk_norm": True},
    {"position_embedding": "rope_time", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False, "qk_norm": True},
    {"position_embedding": "learned", "activation": "swiglu"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_eager_attention_equals_the_fused_kernels(tiny_encoder, changes):
    batch, mask = padded_batch([80_000, 33_000, 5_000])
    model = tiny_encoder(**changes)
    model.set_attn_implementation("sdpa")
    fused = model(batch, mask)
    model.set_attn_implementation("eager")
    eager = model(batch, mask)
    real = model.patches(batch, mask).valid
    torch.testing.assert_close(eager.patch_hidden_states[real], fused.patch_hidden_states[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eager.pooler_output, fused.pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_attention_backend_is_chosen_when_a_model_is_loaded(tiny_encoder, tmp_path, monkeypatch):
    tiny_encoder().save_pretrained(tmp_path)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("the fused kernel was called")

    model = BestRQ2Model.from_pretrained(tmp_path, attn_implementation="eager")
    monkeypatch.setattr(F, "scaled_dot_product_attention", forbidden)
    model(scenes(1, 40_000))
    with pytest.raises(AssertionError, match="fused"):
        BestRQ2Model.from_pretrained(tmp_path)(scenes(1, 40_000))


def test_attention_is_a_weighted_mean_by_its_definition():
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    found, weights = eager_attention_forward(torch.nn.Module(), queries, keys, values, mask, scaling=0.5)
    torch.testing.assert_close((weights @ values).transpose(1, 2), found)
    for clip, count in ((0, 5), (1, 3)):
        for head in range(3):
            for token in range(5):
                scores = [math.exp(float(queries[clip, head, token] @ keys[clip, head, k]) / 2) for k in range(count)]
                expected = sum(s * values[clip, head, k] for k, s in enumerate(scores)) / sum(scores)
                torch.testing.assert_close(found[clip, token, head], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_block_follows_its_definition(tiny_encoder, changes):
    """One pre-norm block worked out in float64 from its weights, without positions of the rotary kind."""
    if changes.get("position_embedding", "").startswith("rope"):
        changes = {**changes, "position_embedding": "sincos"}
    model = tiny_encoder(**changes).double()
    block, config = model.encoder.blocks[1], model.config
    torch.manual_seed(1)
    tokens = torch.randn(1, 7, 32, dtype=torch.float64)

    def norm(layer, states):
        if config.norm == "rmsnorm":
            return states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
        return scaled if layer.bias is None else scaled + layer.bias

    def linear(layer, states):
        return states @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    qkv = linear(block.attn.qkv, norm(block.norm1, tokens))
    mixed = []
    for head in range(2):
        q, k, v = (qkv[0, :, part * 32 + head * 16 : part * 32 + (head + 1) * 16] for part in range(3))
        if config.qk_norm:
            q, k = norm(block.attn.q_norm, q), norm(block.attn.k_norm, k)
        mixed.append(torch.softmax(q @ k.T / 4, dim=-1) @ v)
    expected = tokens + linear(block.attn.proj, torch.cat(mixed, dim=-1)[None])
    inner = linear(block.mlp.fc1, norm(block.norm2, expected))
    if config.activation == "swiglu":
        gate, values = inner[..., :48], inner[..., 48:]
        inner = gate * torch.sigmoid(gate) * values
    else:
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    expected = expected + linear(block.mlp.fc2, inner)
    torch.testing.assert_close(block(tokens, None, None)[0], expected)


def test_the_order_of_tokens_does_not_matter_given_their_places(tiny_encoder):
    for changes in VARIANTS:
        model = tiny_encoder(**changes)
        patches = model.patches(scenes(1, 80_000))
        tokens = model.embed_patches(patches)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            in_order = model.encoder(tokens, 8, None, None)
            shuffled = model.encoder(tokens[:, order], 8, order[None], None)
        torch.testing.assert_close(shuffled, in_order[:, order], atol=2e-5, rtol=1e-5)


def test_stochastic_depth_drops_each_branch_of_each_clip_by_itself_and_keeps_the_expectation():
    torch.manual_seed(0)
    scales = branch_scales((0.0, 0.3), 20_000, torch.device("cpu"))
    assert scales.shape == (2, 2, 20_000, 1, 1)
    assert torch.all(scales[0] == 1)
    dropped = scales[1].flatten(1) == 0
    torch.testing.assert_close(scales[1].flatten(1)[~dropped], torch.full((int((~dropped).sum()),), 1 / 0.7))
    assert dropped.float().mean(dim=1).tolist() == pytest.approx([0.3, 0.3], abs=0.01)
    assert (dropped[0] & dropped[1]).float().mean().item() == pytest.approx(0.09, abs=0.01)


def test_a_dropped_branch_leaves_the_tokens_of_its_clip_as_they_are(tiny_encoder):
    block = tiny_encoder().encoder.blocks[0]
    torch.manual_seed(0)
    tokens = torch.randn(3, 6, 32)
    scales = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 1.0]])[..., None, None]
    with torch.no_grad():
        (found, _), (plain, _) = block(tokens, None, None, scales), block(tokens, None, None)
        second = tokens[1] + block.mlp(block.norm2(tokens[1:2]))[0]
        branch = block.attn(block.norm1(tokens[2:]), None, None)[0][0]
    assert torch.equal(found[0], tokens[0])
    torch.testing.assert_close(found[1], second)
    assert not torch.allclose(found[2], plain[2])
    middle = tokens[2] + 2.0 * branch
    torch.testing.assert_close(found[2], middle + block.mlp(block.norm2(middle[None]))[0])


def test_stochastic_depth_rises_linearly_in_the_encoder_and_is_zero_in_the_predictor(tiny_pretraining):
    model = tiny_pretraining(num_hidden_layers=5, drop_path_rate=0.2, predictor_num_layers=2)
    assert model.bestrq2.encoder.drop_path_rates == pytest.approx((0.0, 0.05, 0.1, 0.15, 0.2))
    assert model.predictor.drop_path_rates == (0.0, 0.0)
    clips = scenes(2, 80_000)
    torch.manual_seed(0)
    assert not torch.allclose(model.train().base_model(clips)[1], model.base_model(clips)[1])
    assert torch.equal(model.eval().base_model(clips)[1], model.base_model(clips)[1])


@pytest.mark.parametrize("changes", [{}, {"objective": "one_stage", "position_embedding": "rope_2d"}], ids=str)
def test_gradient_checkpointing_gives_equal_gradients(tiny_pretraining, changes):
    model = tiny_pretraining(num_hidden_layers=3, drop_path_rate=0.3, **changes).train()
    clips, hidden = scenes(3, 80_000), torch.arange(64) % 2 == 0
    gradients = []
    for enabled in (False, True):
        if enabled:
            checkpoint_activations(model)
            assert all(module.gradient_checkpointing for module in model.modules() if isinstance(module, Block))
        model.zero_grad()
        torch.manual_seed(5)
        model(clips, hidden_mask=hidden).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm of heads, not fused then
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_runs_in_bfloat16_autocast(tiny_pretraining, changes):
    model = tiny_pretraining(**changes)
    clips, hidden = scenes(2, 80_000), torch.arange(64) % 3 > 0
    exact = model(clips, hidden_mask=hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(clips, hidden_mask=hidden)
    rough.loss.backward()
    assert torch.equal(rough.targets, exact.targets)
    assert rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


@pytest.mark.parametrize("normalization", ["none", "clip"])
@torch.no_grad()
def test_autocast_rounds_branches_but_not_the_residual_stream(tiny_config, normalization):
    """Decibels and large tokens do not fit bfloat16; at initialisation the branches are small and hardly matter."""
    torch.manual_seed(0)
    model = BestRQ2Model(tiny_config(hidden_size=64, input_normalization=normalization)).eval()
    clips = scenes(2, 80_000)
    exact = model(clips).patch_hidden_states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(clips).patch_hidden_states
    assert rough.dtype == torch.float32
    spread = exact - exact.mean(dim=(0, 1))
    assert (rough - exact).norm() < 3e-3 * spread.norm()


def test_a_bfloat16_model_embeds_close_to_float32(tiny_encoder):
    model = tiny_encoder(position_embedding="rope_2d", qk_norm=True)
    clips = scenes(2, 80_000)
    with torch.no_grad():
        exact, rough = model(clips), model.to(torch.bfloat16)(clips)
    assert rough.last_hidden_state.dtype == rough.pooler_output.dtype == torch.bfloat16
    similarity = F.cosine_similarity(rough.pooler_output.float(), exact.pooler_output)
    assert similarity.min() > 0.99


def test_weights_are_initialized_as_in_the_paper(tiny_config):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, intermediate_size=256, num_attention_heads=4, position_embedding="learned")
    model = BestRQ2ForPreTraining(config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 4 * 3 + 3
    for name, module in linears.items():
        inside = "blocks" in name
        expected = 0.02 if inside else (3 * module.in_features) ** -0.5  # PyTorch's default
        assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert bool(module.bias.any()) is not inside
    assert 0.005 < model.mask_token.std().item() < 0.04
    assert model.bestrq2.encoder.positions.std().item() == pytest.approx(0.02, rel=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert torch.all(module.weight == 1)
            assert torch.all(module.bias == 0)


def test_training_works_after_embedding_in_inference_mode(tiny_pretraining):
    """Cached positions and filters are made in whatever mode comes first."""
    from bestrq2.model import log_mel, patches

    for cached in (
        log_mel.mel_filters,
        log_mel._window,
        patches.sine_cosine_positions,
        patches.rotary_angles,
        patches.rotary_tables,
    ):
        cached.cache_clear()
    for positions in ("sincos", "rope_2d", "rope_time", "learned"):
        model = tiny_pretraining(position_embedding=positions)
        clips = scenes(2, 80_000)
        with torch.inference_mode():
            model.base_model(clips)
        model.train()(clips.requires_grad_()).loss.backward()
        assert model.bestrq2.patch_embedding.weight.grad.abs().max() > 0
        assert clips.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rms_norms_handle_values_whose_squares_overflow(dtype):
    values = 50 * torch.randn(4, 768, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(768, eps=1e-5)
    expected = norm(values)
    found = norm.to(dtype)(values.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_model_of_16_bits_trains_with_stochastic_depth(tiny_encoder, norm):
    model = tiny_encoder(norm=norm, drop_path_rate=0.5).to(torch.bfloat16).train()
    batch, mask = padded_batch([80_000, 33_000])
    states = model(batch, mask).patch_hidden_states
    assert states.dtype == torch.bfloat16
    states.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.encoder.parameters())


@torch.no_grad()
def test_the_encoder_can_be_exported_from_the_waveform_on(tiny_encoder):
    model = tiny_encoder()
    batch = scenes(2, 40_000)
    expected = model(batch).pooler_output
    found = torch.export.export(model, (batch,)).module()(batch)
    torch.testing.assert_close(found.pooler_output, expected, atol=1e-5, rtol=1e-5)
