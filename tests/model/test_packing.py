"""A clip in a packed row gives what it gives alone: embeddings, codes, logits, loss and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from example_masks import OBJECTIVES
from packed_rows import by_clip, pack

from bestrq2.model.masking import draw_packed_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTrainingOutput
from example_sounds import scene

CAPACITY = 8
# Whole patches, parts of patches, less than a patch, a row of one clip, an empty slot between two clips.
ROWS = [[47_000, 9_374, 30_000], [80_000], [28_100, 2, 100], [9_375, 19_000]]
ARCHITECTURES = [
    {},
    {"position_embedding": "rope_2d", "input_normalization": "clip"},
    {"position_embedding": "rope_time", "input_normalization": "dataset", "quantizer_normalization": "dataset"},
    {"position_embedding": "learned", "quantizer_normalization": "layernorm", "num_codebooks": 2},
    {"predictor_context_positions": True, "input_normalization": "clip"},
    {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "use_bias": False, "position_embedding": "rope_2d"},
]


def clips_of(rows: list[list[int]]) -> list[list[torch.Tensor | int]]:
    """Scenes of these lengths in samples; a number below 100 is one of empty columns."""
    return [
        [
            length if length < 100 else torch.from_numpy(scene(length, 10 * row + place))
            for place, length in enumerate(of)
        ]
        for row, of in enumerate(rows)
    ]


def all_clips(rows: list[list[torch.Tensor | int]]) -> list[torch.Tensor]:
    return [clip for row in rows for clip in row if not isinstance(clip, int)]


def in_grid(of_hidden: torch.Tensor, output: BestRQ2ForPreTrainingOutput, masks: int) -> torch.Tensor:
    """Values of hidden patches [R * masks, H, ...] at their places in the grid, [R, masks, N, ...]; 0 elsewhere."""
    grid = of_hidden.new_zeros(*output.hidden_mask.shape, *of_hidden.shape[2:])
    grid[output.hidden_mask] = of_hidden[output.hidden_valid]
    return grid.detach().unflatten(0, (-1, masks))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda changes: " ".join(map(str, changes.values())))
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_clips_have_the_logits_loss_and_gradients_of_clips_alone(
    tiny_pretraining, architecture, objective, masks
):
    model = tiny_pretraining(objective=objective, mask_ratio=[0.5, 0.5], **architecture)
    alone_model = copy.deepcopy(model)
    rows = clips_of(ROWS)
    values, packing = pack(model.config, rows, CAPACITY)
    hidden = draw_packed_mask(model.config, packing.segments, 3, 5, [4, 5, 6, 7], masks)
    together = model(values, hidden_mask=hidden, packing=packing)
    together.loss.backward()

    found = by_clip(in_grid(together.logits, together, masks), packing)
    found_targets = by_clip(in_grid(together.targets, together, masks), packing)
    own_masks = by_clip(hidden.view(len(rows), masks, -1), packing)
    total, loss = int(together.hidden_mask.sum()), 0.0
    for clip, mask, logits, targets in zip(all_clips(rows), own_masks, found, found_targets, strict=True):
        alone = alone_model(clip[None], hidden_mask=mask[None])
        share = mask.sum() / total
        (alone.loss * share).backward()
        loss += alone.loss.item() * share.item()
        assert torch.equal(targets[mask], alone.targets.flatten(0, 1))
        torch.testing.assert_close(logits[mask], alone.logits.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert together.loss.item() == pytest.approx(loss, abs=1e-5)
    for (name, parameter), expected in zip(model.named_parameters(), alone_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("normalization", ["none", "clip"])
@pytest.mark.parametrize("positions", ["sincos", "rope_2d", "rope_time", "learned"])
@torch.no_grad()
def test_packed_clips_have_the_embeddings_of_clips_alone(tiny_encoder, positions, normalization):
    model = tiny_encoder(position_embedding=positions, input_normalization=normalization)
    rows = clips_of(ROWS)
    values, packing = pack(model.config, rows, CAPACITY)
    together = model(values, packing=packing)
    assert torch.equal(together.frame_attention_mask, packing.segments != 0)
    assert torch.all(together.last_hidden_state[packing.segments == 0] == 0)
    states = by_clip(together.patch_hidden_states[:, None], packing)
    assert len(states) == len(together.pooler_output) == 8
    for clip, own, pooled in zip(all_clips(rows), states, together.pooler_output, strict=True):
        alone = model(clip[None])
        torch.testing.assert_close(own, alone.patch_hidden_states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, alone.pooler_output[0], atol=1e-5, rtol=1e-5)
