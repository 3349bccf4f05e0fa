"""Recipes against the public code that they rebuild: masks, targets, optimizer, initial weights and first loss.

Facts are those of SpeechBrain's recipe BEST-RQ at commit 9c826ef39, and of LudovicTuncay/audio-embeddings.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bestrq2
from bestrq2 import BestRQ2Config, BestRQ2ForPreTraining
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.train.optimizer import learning_rate_factor, make_optimizer, warmup_steps
from bestrq2.train.settings import OptimizerConfig
from example_sounds import padded_batch, scenes

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def conformer() -> BestRQ2ForPreTraining:
    torch.manual_seed(0)
    fields = {**bestrq2.recipe("best-rq-conformer")["model"], **SMALL, "conformer_channels": [8, 4]}
    return BestRQ2ForPreTraining(BestRQ2Config(**fields)).eval()


def optimizer_of(name: str) -> OptimizerConfig:
    settings = bestrq2.recipe(name)["optimizer"]
    return OptimizerConfig(**{**settings, "betas": tuple(settings.get("betas", (0.9, 0.999)))})


def test_a_conformer_hides_sixty_percent_in_masks_of_four_frames_without_replacement(conformer):
    config = conformer.config
    assert (config.patch_size, config.patch_rows) == ([80, 4], 1)  # a patch is 4 frames: starts are multiples of 4
    frames = 1000
    masks = draw_hidden_mask(config, [frames // 4] * 200, 0, 0, range(200))
    assert (masks.sum(dim=1) == 0.15 * frames).all()  # no two masks overlap
    assert float(masks.sum(dim=1)[0]) * 4 / frames == 0.6
    by_place = masks.float().mean(dim=0)
    assert float((by_place - 0.6).abs().max()) < 5 * math.sqrt(0.24 / 200)
    runs = np.diff(np.flatnonzero(np.diff(np.pad(masks.numpy().ravel(), 1).astype(int))))[::2]
    assert runs.mean() == pytest.approx(1 / 0.4, rel=0.05)  # independent tokens, not spans of a fixed length


@torch.no_grad()
def test_a_conformer_quantizes_stacked_frames_normalized_per_clip_and_band(conformer):
    lengths = [32_000, 20_500]
    values, mask = padded_batch(lengths, behind=0.7)
    hidden = draw_hidden_mask(conformer.config, [50, 32], 0, 0, range(2))
    found = conformer(values, mask, hidden_mask=hidden)
    for row, length in enumerate(lengths):
        log_mel, _ = conformer.base_model.log_mel(values[row : row + 1, :length])
        frames = log_mel[0, :, : log_mel.shape[-1] // 4 * 4]
        frames = (frames - frames.mean(dim=1, keepdim=True)) / frames.std(dim=1, keepdim=True, correction=0)
        stacked = frames.reshape(80, -1, 4).transpose(0, 1).flatten(1)[hidden[row, : frames.shape[1] // 4]]
        directions = stacked @ conformer.quantizer.projection[0]
        codes = torch.cdist(F.normalize(directions, dim=-1), conformer.quantizer.codebook[0]).argmin(dim=1)
        assert torch.equal(found.targets[row][found.hidden_valid[row]], codes)


def test_conformer_blocks_are_xavier_normal_and_use_gelu():
    torch.manual_seed(0)
    model = BestRQ2ForPreTraining(BestRQ2Config(**bestrq2.recipe("best-rq-conformer-small")["model"]))
    block = model.base_model.encoder.blocks[0]
    width, inner, kernel = 256, 1024, 31
    for weight, fans in (
        (model.base_model.patch_embedding.proj.weight, 640 + width),
        (block.attn.qkv.weight, 4 * width),
        (block.mlp1.fc1.weight, width + inner),
        (block.conv.depthwise.weight, kernel + kernel * width),
        (block.attn.position_bias, 4 + 64),
    ):
        assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / fans), rel=0.15)
    for weight, fan_in in (
        (model.head.weight, width),
        (model.base_model.patch_embedding.convolutions[1].conv.weight, 9 * 128),
    ):
        assert float(weight.detach().abs().max()) == pytest.approx(fan_in**-0.5, rel=0.01)
    assert model.config.conformer_activation == "gelu"


def test_the_conformer_is_optimized_as_published(conformer):
    recipe, config = bestrq2.recipe("best-rq-conformer"), optimizer_of("best-rq-conformer")
    steps = recipe["trainer"]["max_steps"]
    assert (recipe["trainer"]["gradient_clip_val"], warmup_steps(steps, config)) == (10, 25_000)
    (group,) = make_optimizer(conformer, config, "32-true").param_groups
    assert len(group["params"]) == len(list(conformer.parameters()))
    found = (group["lr"], group["weight_decay"], group["betas"], group["eps"])
    assert found == (8e-4, 0.01, (0.9, 0.98), 1e-9)
    for step in (1, 12_500, 24_999, 25_000, 100_000, 199_999):  # NoamScheduler(lr_initial=8e-4, n_warmup_steps=25000)
        noam = 25_000**0.5 * min(step**-0.5, step * 25_000**-1.5)
        assert learning_rate_factor(step, steps, config) == pytest.approx(noam, rel=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(200_000, 10_000), (99, 4), (10, 0)])
def test_the_learning_rate_of_best_rq_2_is_that_of_the_public_code(steps: int, warmup: int):
    config = optimizer_of("best-rq-2")
    assert warmup_steps(steps, config) == warmup  # rounded down
    for step in {0, 1, warmup // 2, warmup, (warmup + steps) // 2, steps - 1}:
        progress = (step - warmup) / (steps - warmup)
        expected = step / warmup if step < warmup else 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress))
        assert learning_rate_factor(step, steps, config) == pytest.approx(expected, rel=1e-12)


class Reference(nn.Module):
    """The two-step model in PyTorch's own modules, initialized as the public code does it."""

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embedding = nn.Conv2d(1, width, 16, stride=16)
        self.encoder, self.predictor = (self._blocks(config, layers) for layers in (config.num_hidden_layers, 2))
        self.predictor_input = nn.Linear(width, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.head = nn.Linear(width, config.codebook_size)

    @staticmethod
    def _blocks(config: BestRQ2Config, layers: int) -> nn.Module:
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        block = nn.TransformerEncoderLayer(*sizes, 0.0, "gelu", batch_first=True, norm_first=True)
        blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(sizes[0]), enable_nested_tensor=False)
        for name, parameter in blocks.named_parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return blocks

    def forward(self, log_mel: Tensor, hidden: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of clips [B, 128, T] with one mask [N]."""
        tokens = self.patch_embedding(log_mel[:, None]).flatten(2).transpose(1, 2)
        context = self.predictor_input(self.encoder((tokens + positions)[:, ~hidden]))
        asked = (self.mask_token + positions[hidden]).expand(len(tokens), -1, -1)
        states = self.predictor(torch.cat([context, asked], dim=1))[:, context.shape[1] :]
        return F.cross_entropy(self.head(states).flatten(0, 1), targets.flatten())


@torch.no_grad()
def test_best_rq_2_starts_with_the_weights_and_the_loss_of_the_public_code():
    fields = bestrq2.recipe("best-rq-2")["model"] | {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
        "predictor_hidden_size": 64, "predictor_num_layers": 2, "predictor_num_attention_heads": 4,
        "predictor_intermediate_size": 256, "max_seconds": 5.0,
    }  # fmt: skip
    config = BestRQ2Config(**fields)
    clips, hidden = scenes(4, 80_000), draw_hidden_mask(config, [8], 0, 0, [0])[0]
    losses: list[list[float]] = [[], []]
    for seed in range(12):
        torch.manual_seed(seed)
        model, reference = BestRQ2ForPreTraining(config).eval(), Reference(config).eval()
        found = model(clips, hidden_mask=hidden)
        log_mel, _ = model.base_model.log_mel(clips)
        positions = model.base_model.encoder.added_positions(8, torch.device("cpu"))
        losses[0].append(float(found.loss))
        losses[1].append(float(reference(log_mel[..., :128], hidden, positions, found.targets)))
    for name, part in reference.named_children():
        ours = getattr(model.base_model if name in ("patch_embedding", "encoder") else model, name)
        for ending in ("weight", "bias"):
            found, expected = (
                torch.cat([p.flatten() for key, p in whole.named_parameters() if "norm" not in key and ending in key])
                for whole in (ours, part)
            )
            assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.15), (name, ending)
    ours, theirs = np.array(losses)
    assert abs(ours.mean() - theirs.mean()) < 3 * math.hypot(ours.std(), theirs.std()) / len(ours) ** 0.5
    assert theirs.mean() > math.log(config.codebook_size) + 0.1  # above uniform guesses, where a small head would begin


@pytest.mark.parametrize(
    ("encoder", "quantizer", "expected"),
    [
        ("dataset", "decibels", "none"), ("none", "dataset", "dataset"), ("none", "clip", "clip"),
        ("clip", "clip_band", "clip_band"), ("clip_band", "none", "clip_band"), ("dataset", "clip", "clip"),
    ],
)  # fmt: skip
def test_the_quantizer_has_an_input_of_its_own(tiny_encoder, encoder, quantizer, expected):
    clips = scenes(2, 80_000)
    patches = tiny_encoder(input_normalization=encoder, quantizer_normalization=quantizer).patches(clips)
    assert torch.equal(patches.encoder_input, tiny_encoder(input_normalization=encoder).patches(clips).encoder_input)
    assert torch.equal(patches.quantizer_input, tiny_encoder(input_normalization=expected).patches(clips).encoder_input)
