"""The Conformer: equal to transformers' own, to its definition, and to itself by every route."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as reference

from bestrq2 import BestRQ2Config
from bestrq2.model.conformer import (
    Conformer,
    ConformerBlock,
    ConvolutionalEmbedding,
    RelativeAttention,
    relative_positions,
    relative_shift,
)
from bestrq2.model.patches import patchify

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conformer_channels": (6, 5),
    "conformer_kernel_size": 7,
    "conformer_dropout": 0.0,
}


def conformer_config(bands: int = 80, attention: str = "sdpa", **changes) -> BestRQ2Config:
    fixed = {
        "encoder_type": "conformer",
        "objective": "one_stage",
        "mask_fill": "noise",
        "position_embedding": "relative",
        "num_mel_bands": bands,
        "patch_size": (bands, 4),
        "hop_length": 160,
        "n_fft": 400,
        "win_length": 400,
        "mask_ratio": [0.6, 0.6],
        "input_normalization": "clip",
        "quantizer_normalization": "layernorm",
        "attn_implementation": attention,
    }
    return BestRQ2Config(**{**fixed, **SMALL, **changes})


def strengthened(module: nn.Module) -> nn.Module:
    """Random weights under which every token and every parameter matters, in evaluation mode."""
    random = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        scale, centre = 0.4, 0.0
        if parameter.ndim == 1 and name.endswith("weight"):
            centre = 1.0
        elif parameter.ndim >= 2 and not name.endswith("_bias"):
            scale = 1.2 * parameter[0].numel() ** -0.5
        parameter.data.copy_(centre + scale * torch.randn(parameter.shape, generator=random))
    return module.eval()


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LayerNormOverChannels(nn.Module):
    """Takes the place of the batch norm in transformers' block."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states.transpose(1, 2)).transpose(1, 2)


def reference_config(config: BestRQ2Config) -> Wav2Vec2ConformerConfig:
    return Wav2Vec2ConformerConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.conformer_activation,
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=config.conformer_kernel_size,
        max_source_positions=50,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        conformer_conv_dropout=0.0,
        attn_implementation="eager",
    )


def reference_block(block: ConformerBlock, config: BestRQ2Config) -> nn.Module:
    """transformers' block with the weights of ours, and with the biases that its convolutions lack."""
    width = config.hidden_size
    layer = reference.Wav2Vec2ConformerEncoderLayer(reference_config(config))
    convolution = layer.conv_module
    convolution.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
    convolution.depthwise_conv = block.conv.depthwise
    convolution.batch_norm = LayerNormOverChannels(block.conv.depthwise_norm)
    convolution.pointwise_conv2 = nn.Conv1d(width, width, 1)
    for theirs, ours in (
        (convolution.pointwise_conv1, block.conv.pointwise1),
        (convolution.pointwise_conv2, block.conv.pointwise2),
    ):
        theirs.load_state_dict({"weight": ours.weight[..., None], "bias": ours.bias})
    convolution.layer_norm = block.conv.norm
    for theirs, norm, ours in (
        (layer.ffn1, "ffn1_layer_norm", block.mlp1),
        (layer.ffn2, "ffn2_layer_norm", block.mlp2),
    ):
        theirs.intermediate_dense, theirs.output_dense = ours.fc1, ours.fc2
        setattr(layer, norm, ours.norm)
    attention = layer.self_attn
    for name, weight, bias in zip(
        ("linear_q", "linear_k", "linear_v"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
    ):
        getattr(attention, name).load_state_dict({"weight": weight, "bias": bias})
    attention.linear_out, attention.linear_pos = block.attn.proj, block.attn.position
    attention.pos_bias_u, attention.pos_bias_v = block.attn.content_bias, block.attn.position_bias
    layer.self_attn_layer_norm, layer.final_layer_norm = block.attn_norm, block.norm
    return layer.eval()


@pytest.mark.parametrize(("count", "activation"), [(1, "silu"), (2, "gelu"), (23, "silu"), (23, "gelu")])
@torch.no_grad()
def test_conformer_block_equals_wav2vec2_conformer(count, activation):
    config = conformer_config(conformer_activation=activation)
    block = strengthened(ConformerBlock(config))
    positions = reference.Wav2Vec2ConformerRelPositionalEmbedding(reference_config(config))
    tokens = random_tokens(3, count, 32)
    theirs = reference_block(block, config)(tokens, relative_position_embeddings=positions(tokens))
    ours, _ = block(tokens, relative_positions(count, 32, CPU), None, None)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert float((ours - tokens).abs().mean()) > 0.1


@torch.no_grad()
def test_relative_positions_equal_those_of_transformers():
    module = reference.Wav2Vec2ConformerRelPositionalEmbedding(reference_config(conformer_config()))
    for count in (1, 2, 40, 50):
        ours = relative_positions(count, 32, CPU)
        assert ours.shape == (2 * count - 1, 32)
        torch.testing.assert_close(ours, module(torch.zeros(1, count, 32))[0], atol=1e-5, rtol=0)


def test_relative_shift_picks_the_score_of_every_offset():
    for count in (1, 2, 3, 6):
        offsets = torch.arange(count - 1, -count, -1)
        shifted = relative_shift(offsets.expand(2, 3, count, -1).contiguous())
        place = torch.arange(count)
        assert torch.equal(shifted, (place[:, None] - place).expand(2, 3, count, count))


@torch.no_grad()
def test_relative_attention_follows_its_formula():
    config = conformer_config(hidden_size=12, num_attention_heads=2)
    attention = strengthened(RelativeAttention(config)).double()
    tokens = random_tokens(2, 5, 12).double()
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found, _ = attention(tokens, relative_positions(5, 12, CPU), valid[:, None, None])

    def position(offset: int) -> torch.Tensor:
        angles = [offset / 10_000 ** (2 * index / 12) for index in range(6)]
        return torch.tensor([part for a in angles for part in (math.sin(a), math.cos(a))], dtype=torch.float64)

    for clip, count in ((0, 5), (1, 3)):
        q, k, v = (attention.qkv(tokens[clip]).chunk(3, dim=-1)[part].view(5, 2, 6) for part in range(3))
        for i in range(5):
            mixed = []
            for head in range(2):
                to_key = q[i, head] + attention.content_bias[head]
                to_offset = q[i, head] + attention.position_bias[head]
                weights = []
                for j in range(count):
                    offset = attention.position(position(i - j)).view(2, 6)[head]
                    weights.append(math.exp((to_key @ k[j, head] + to_offset @ offset) / math.sqrt(6)))
                mixed.append(sum(w * v[j, head] for j, w in enumerate(weights)) / sum(weights))
            expected = attention.proj(torch.cat(mixed))
            torch.testing.assert_close(found[clip, i], expected, atol=1e-6, rtol=1e-6)


def test_eager_attention_equals_the_fused_kernels_forward_and_backward():
    tokens = random_tokens(2, 19, 32)
    valid = torch.arange(19) < torch.tensor([[19], [11]])
    outputs, gradients = [], []
    for attention in ("sdpa", "eager"):
        model = strengthened(Conformer(conformer_config(attention=attention)))
        states = model(tokens, 19, None, valid)[valid]
        (states * random_tokens(*states.shape, seed=2)).sum().backward()
        outputs.append(states.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in gradients[0].values())


@pytest.mark.parametrize("count", [1, 2, 9])
@torch.no_grad()
def test_padding_does_not_change_the_output(count):
    config = conformer_config()
    embedding, model = strengthened(ConvolutionalEmbedding(config)), strengthened(Conformer(config))
    patches = random_tokens(2, 24, 320)
    patches[1, count:] *= 30.0  # junk behind the short clip
    valid = torch.arange(24) < torch.tensor([[24], [count]])
    tokens = embedding(patches)
    together = model(tokens, 24, None, valid)
    alone = embedding(patches[1:, :count])
    torch.testing.assert_close(alone[0], tokens[1, :count], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(alone, count, None, None)[0], together[1, :count], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens[:1], 24, None, None)[0], together[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_valid_token_reaches_every_other():
    model = strengthened(Conformer(conformer_config(num_hidden_layers=1, conformer_kernel_size=3)))
    tokens = random_tokens(1, 20, 32)
    valid = torch.arange(20)[None] < 15
    before = model(tokens, 20, None, valid)
    for place, reached in ((0, True), (14, True), (15, False), (19, False)):
        changed = tokens.clone()
        changed[0, place] += random_tokens(32, seed=3)
        moved = (model(changed, 20, None, valid) - before)[0, :15].abs().amax(dim=1)
        assert bool((moved > 1e-4).all()) if reached else bool((moved == 0).all())


@torch.no_grad()
def test_a_token_depends_on_no_frame_after_its_strip():
    config = conformer_config()
    embedding = strengthened(ConvolutionalEmbedding(config))
    log_mel = random_tokens(1, 80, 32)
    before = embedding(patchify(log_mel, (80, 4)))
    assert before.shape == (1, 8, 32)
    for frame in range(32):
        changed = log_mel.clone()
        changed[0, :, frame] += random_tokens(80, seed=3)
        moved = (embedding(patchify(changed, (80, 4))) - before)[0].abs().amax(dim=1) > 1e-5
        expected = [4 * token - 3 <= frame <= 4 * token + 3 for token in range(8)]
        assert moved.tolist() == expected, frame


@pytest.mark.parametrize(("bands", "values"), [(80, 20), (62, 16), (41, 11)])
@torch.no_grad()
def test_the_embedding_is_two_convolutions_each_normalised_per_time_step(bands, values):
    embedding = strengthened(ConvolutionalEmbedding(conformer_config(bands)))
    log_mel = random_tokens(2, bands, 24)
    image = log_mel.transpose(1, 2)[:, None]
    for block in embedding.convolutions:
        image = F.conv2d(image, block.conv.weight, block.conv.bias, stride=2, padding=1)
        mean = image.mean(dim=(1, 3), keepdim=True)
        deviation = (image.var(dim=(1, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        # Values of a step lie band by band, the channels of a band side by side.
        weight, bias = (part.view(image.shape[3], image.shape[1]).T[:, None] for part in block.norm.parameters())
        image = (image - mean) / deviation * weight + bias
        image = torch.where(image > 0, image, 0.01 * image)
    assert image.shape == (2, 5, 6, values)
    expected = embedding.proj(torch.stack([image[:, :, step].transpose(1, 2).flatten(1) for step in range(6)], dim=1))
    torch.testing.assert_close(embedding(patchify(log_mel, (bands, 4))), expected, atol=1e-5, rtol=1e-5)


def test_parameter_count_of_the_published_size_matches_a_count_by_hand():
    config = conformer_config(
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_hidden_layers=12,
        conformer_kernel_size=31,
        conformer_channels=(128, 32),
    )
    with torch.device("meta"):
        model, embedding = Conformer(config), ConvolutionalEmbedding(config)
    width, inner, norm = 512, 2048, 2 * 512
    feed_forward = norm + (width * inner + inner) + (inner * width + width)
    attention = norm + 4 * (width * width + width) + width * width + 2 * width  # q, k, v, out; positions; u and v
    convolution = norm + (width * 2 * width + 2 * width) + (31 * width + width) + norm + (width * width + width)
    block = 2 * feed_forward + attention + convolution + norm
    assert sum(parameter.numel() for parameter in model.parameters()) == 12 * block == 75_884_544
    front = (9 * 128 + 128) + 2 * 128 * 40 + (9 * 128 * 32 + 32) + 2 * 640 + (640 * width + width)
    assert sum(parameter.numel() for parameter in embedding.parameters()) == front == 377_888
    assert not list(model.buffers()) + list(embedding.buffers())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    model = strengthened(Conformer(conformer_config(conformer_dropout=dropout))).train()
    tokens = random_tokens(2, 10, 32).requires_grad_()
    valid = torch.arange(10) < torch.tensor([[10], [6]])

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        for block in model.blocks:
            block.gradient_checkpointing = checkpointing
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        torch.manual_seed(5)
        states = model(tokens, 10, None, valid)[valid]
        loss = (states * random_tokens(*states.shape, seed=2)).sum()
        return list(torch.autograd.grad(loss, [tokens, *model.parameters()]))

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_dropout_acts_in_training_only_and_keeps_expectations(attention):
    plain = strengthened(RelativeAttention(conformer_config(attention=attention)))
    dropping = strengthened(RelativeAttention(conformer_config(attention=attention, conformer_dropout=0.3)))
    tokens, positions = random_tokens(1, 6, 32), relative_positions(6, 32, CPU)
    expected, _ = plain(tokens, positions, None)
    torch.testing.assert_close(dropping(tokens, positions, None)[0], expected)
    dropping.train()
    torch.manual_seed(0)
    drawn, _ = dropping(tokens.expand(20_000, -1, -1), positions, None)
    assert float(drawn.std(dim=0).mean()) > 0.05
    torch.testing.assert_close(drawn.mean(dim=0), expected[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_autocast_stays_near_float32(attention):
    config = conformer_config(attention=attention)
    embedding, model = strengthened(ConvolutionalEmbedding(config)), strengthened(Conformer(config))
    patches = random_tokens(2, 12, 320)
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    exact = model(embedding(patches), 12, None, valid)[valid]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(embedding(patches).float(), 12, None, valid)[valid]
    assert rounded.dtype == torch.float32  # the residual stream is that of the tokens
    assert float(((rounded - exact).norm() / exact.norm()).detach()) < 0.03
    rounded.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for module in (embedding, model) for p in module.parameters())


@torch.no_grad()
def test_a_model_in_bfloat16_stays_near_float32():
    config = conformer_config()
    embedding, model = strengthened(ConvolutionalEmbedding(config)), strengthened(Conformer(config))
    patches = random_tokens(2, 12, 320)
    exact = model(embedding(patches), 12, None, None)
    rounded = model.bfloat16()(embedding.bfloat16()(patches.bfloat16()), 12, None, None)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.05


def test_training_follows_an_evaluation_in_inference_mode():
    relative_positions.cache_clear()
    model = strengthened(Conformer(conformer_config()))
    tokens = random_tokens(1, 17, 32)
    with torch.inference_mode():
        evaluated = model(tokens, 17, None, None)
    trained = model(tokens, 17, None, None)
    trained.square().sum().backward()
    torch.testing.assert_close(trained.detach(), evaluated, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_places_are_ignored_and_no_positions_are_added():
    model = strengthened(Conformer(conformer_config()))
    tokens = random_tokens(2, 6, 32)
    assert model.added_positions(6, CPU) is None
    places = torch.zeros(2, 6, dtype=torch.int64)
    assert torch.equal(model(tokens, 6, places, None), model(tokens, 6, None, None))
