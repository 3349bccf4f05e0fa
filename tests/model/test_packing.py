"""A clip in a packed row gives what it gives alone: embeddings, codes, logits, loss and gradients."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from example_masks import CONFORMER, OBJECTIVES
from packed_rows import by_clip, pack

from bestrq2 import BestRQ2ForAudioClassification
from bestrq2.data.batch import fixed_batches
from bestrq2.model.masking import draw_packed_mask, split_packed
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTrainingOutput
from bestrq2.model.packing import Packing
from example_sounds import scene

CAPACITY = 8
# Whole patches, parts of patches, less than a patch, a row of one clip, an empty slot between two clips.
ROWS = [[47_000, 9_374, 30_000], [80_000], [28_100, 2, 100], [9_375, 19_000]]
ARCHITECTURES = [
    {},
    {"position_embedding": "rope_2d", "input_normalization": "clip"},
    {"position_embedding": "rope_time", "input_normalization": "dataset", "quantizer_normalization": "dataset"},
    {"position_embedding": "learned", "quantizer_normalization": "layernorm", "num_codebooks": 2},
    {"patch_size": [8, 16], "short_win_length": 400, "short_mel_bands": 8, "num_codebooks": 2},
    {"input_normalization": "clip"},
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


def in_grid(of_hidden: torch.Tensor, output: BestRQ2ForPreTrainingOutput) -> torch.Tensor:
    """Values of hidden patches [R, H, ...] at their places in the grid, [R, N, ...]; 0 elsewhere."""
    grid = of_hidden.new_zeros(*output.hidden_mask.shape, *of_hidden.shape[2:])
    grid[output.hidden_mask] = of_hidden[output.hidden_valid]
    return grid.detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda changes: " ".join(map(str, changes.values())))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_clips_have_the_logits_loss_and_gradients_of_clips_alone(tiny_pretraining, architecture, objective):
    model = tiny_pretraining(objective=objective, mask_ratio=[0.5, 0.5], **architecture)
    alone_model = copy.deepcopy(model)
    rows = clips_of(ROWS)
    values, packing = pack(model.config, rows, CAPACITY)
    hidden = draw_packed_mask(model.config, packing.segments, 3, 5, [4, 5, 6, 7])
    together = model(values, hidden_mask=hidden, packing=packing)
    together.loss.backward()

    found = by_clip(in_grid(together.logits, together), packing)
    found_targets = by_clip(in_grid(together.targets, together), packing)
    own_masks = by_clip(hidden, packing)
    total, loss = int(together.hidden_mask.sum()), 0.0
    for clip, mask, logits, targets in zip(all_clips(rows), own_masks, found, found_targets, strict=True):
        alone = alone_model(clip[None], hidden_mask=mask[None])
        share = mask.sum() / total
        (alone.loss * share).backward()
        loss += alone.loss.item() * share.item()
        assert torch.equal(targets[mask], alone.targets[0])
        torch.testing.assert_close(logits[mask], alone.logits[0], atol=1e-5, rtol=1e-5)
    assert together.loss.item() == pytest.approx(loss, abs=1e-5)
    for (name, parameter), expected in zip(model.named_parameters(), alone_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("normalization", ["none", "clip", "clip_band"])
@pytest.mark.parametrize("positions", ["sincos", "rope_2d", "rope_time", "learned"])
@torch.no_grad()
def test_packed_clips_have_the_embeddings_of_clips_alone(tiny_encoder, positions, normalization):
    model = tiny_encoder(position_embedding=positions, input_normalization=normalization)
    rows = clips_of(ROWS)
    values, packing = pack(model.config, rows, CAPACITY)
    together = model(values, packing=packing)
    assert torch.equal(together.frame_attention_mask, packing.segments != 0)
    assert torch.all(together.last_hidden_state[packing.segments == 0] == 0)
    states = by_clip(together.patch_hidden_states, packing)
    assert len(states) == len(together.pooler_output) == 8
    for clip, own, pooled in zip(all_clips(rows), states, together.pooler_output, strict=True):
        alone = model(clip[None])
        torch.testing.assert_close(own, alone.patch_hidden_states[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, alone.pooler_output[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batches_of_the_loader_have_the_embeddings_of_clips_alone(tiny_encoder):
    model = tiny_encoder(input_normalization="clip")
    clips = {length: scene(length, index) for index, length in enumerate([80_000, 47_000, 9_374, 30_000, 100, 19_999])}
    (batch,) = fixed_batches(list(clips.values()), model.config, 16)
    assert batch.lengths.tolist() != list(clips)  # the order is that of rows
    assert len(batch.input_values) == 3
    together = model(batch.input_values, packing=batch.packing).pooler_output
    for length, pooled in zip(batch.lengths.tolist(), together, strict=True):
        alone = model(torch.from_numpy(clips[length])[None]).pooler_output[0]
        torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=1e-5)


def test_packed_clips_have_the_logits_of_clips_alone_row_by_row(tiny_config):
    torch.manual_seed(0)
    model = BestRQ2ForAudioClassification(tiny_config(num_labels=3)).eval()
    rows = clips_of(ROWS)
    values, packing = pack(model.config, rows, CAPACITY)
    labels = torch.arange(8) % 3
    together = model(values, labels=labels, packing=packing)
    alone = torch.cat([model(clip[None]).logits for clip in all_clips(rows)])
    torch.testing.assert_close(together.logits, alone, atol=1e-5, rtol=1e-5)
    assert together.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(alone, labels).item(), abs=1e-5)


@torch.no_grad()
def test_a_conformer_takes_rows_of_one_clip_and_refuses_others(tiny_pretraining):
    model = tiny_pretraining(**CONFORMER)
    clips = [torch.from_numpy(scene(length, length)) for length in (32_000, 20_500, 9_100)]
    values, packing = pack(model.config, [[clip] for clip in clips], 50)
    together = model.bestrq2(values, packing=packing)
    for clip, frames, pooled in zip(clips, together.last_hidden_state, together.pooler_output, strict=True):
        alone = model.bestrq2(clip[None])
        torch.testing.assert_close(
            frames[: alone.last_hidden_state.shape[1]], alone.last_hidden_state[0], atol=2e-5, rtol=0
        )
        torch.testing.assert_close(pooled, alone.pooler_output[0], atol=2e-5, rtol=0)
    assert torch.isfinite(model(values, packing=packing).loss)
    values, packing = pack(model.config, [clips[1:]], 50)
    with pytest.raises(ValueError, match="give it rows of one clip"):
        model(values, packing=packing)


@torch.no_grad()
def test_stochastic_depth_drops_the_branches_of_each_clip_of_a_row_by_itself(tiny_encoder):
    model = tiny_encoder(drop_path_rate=0.5).train()
    clip = torch.from_numpy(scene(20_000))
    values, packing = pack(model.config, [[clip, clip], [clip, clip]], CAPACITY)
    alone = torch.cat([model(clip.expand(8, -1)).pooler_output for _ in range(4)])
    together = torch.cat([model(values, packing=packing).pooler_output for _ in range(4)])
    differences = (together[:, None] - alone).abs().amax(dim=-1)
    assert torch.all(differences.amin(dim=1) < 1e-4)
    differ = (together[0::2] - together[1::2]).abs().amax(dim=-1) > 1e-2
    assert 0 < int(differ.sum()) < 8  # the two clips of a row sometimes differ and sometimes do not


def random_segments(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of clips of one to four columns, with empty columns at random places, int64 [rows, columns]."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, columns), dtype=np.int64)
    for row in segments:
        first, number = 0, 0
        while first < columns:
            length, used = rng.integers(1, 5), rng.random() < 0.8
            number += used
            row[first : first + length] = number * used
            first += length
    return torch.from_numpy(segments)


@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.77])
def test_all_rows_have_equally_many_hidden_patches_whatever_their_clips(tiny_config, ratio):
    config = tiny_config(mask_ratio=[ratio, ratio], max_seconds=10.0)
    segments = random_segments(20, 16, 0)
    hidden = draw_packed_mask(config, segments, 1, 2, range(20))
    assert hidden.shape == (20, 128)
    packing = Packing(segments, torch.zeros_like(segments), torch.zeros_like(segments))
    numbers = packing.patch_segments(8)
    split = split_packed(hidden, numbers, packing.patch_positions(8), torch.device("cpu"))
    assert split.places.shape == (20, 128)
    assert split.visible_count == 128 - int(ratio * 128)
    assert torch.equal(numbers.gather(1, split.places), split.valid)
    for of_clip in by_clip(hidden, packing):
        share = int(ratio * len(of_clip))
        assert share <= int(of_clip.sum()) <= share + 1
    assert torch.equal(hidden[7:9], draw_packed_mask(config, segments[7:9], 1, 2, [7, 8]))
    full = torch.ones(1, 16, dtype=torch.int64)
    assert int(draw_packed_mask(config, full, 1, 2, [0]).sum()) == int(ratio * 128)


@torch.no_grad()
def test_marks_of_empty_patches_change_nothing(tiny_pretraining):
    model = tiny_pretraining()
    values, packing = pack(model.config, clips_of(ROWS), CAPACITY)
    marked = draw_packed_mask(model.config, packing.segments, 0, 0, range(4))
    plain = marked & (packing.patch_segments(8) != 0)
    assert not torch.equal(marked, plain)
    first, second = (model(values, hidden_mask=mask, packing=packing) for mask in (marked, plain))
    assert first.loss.item() == pytest.approx(second.loss.item(), abs=1e-6)
    assert torch.equal(first.hidden_mask, second.hidden_mask)
    assert torch.equal(first.code_counts, second.code_counts)
    assert int(first.hidden_valid.sum()) == int(plain.sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_without_any_clip_have_no_loss(tiny_pretraining, objective):
    model = tiny_pretraining(objective=objective, input_normalization="clip").train()
    values, packing = pack(model.config, [[8], [8]], CAPACITY)
    for output_logits in (True, False):
        output = model(values, packing=packing, output_logits=output_logits)
        assert output.loss.item() == 0.0
        output.loss.backward()
    assert all(torch.all(parameter.grad == 0) for parameter in model.parameters() if parameter.grad is not None)


def test_packings_that_do_not_fit_are_refused_by_one_sentence(tiny_pretraining):
    model = tiny_pretraining()
    values, packing = pack(model.config, clips_of(ROWS), CAPACITY)
    hidden = draw_packed_mask(model.config, packing.segments, 0, 0, range(4))
    with pytest.raises(ValueError, match=r"reads 134 frames of rows that have 100$"):
        model(values[:, : 99 * 625 + 2048], packing=packing)
    with pytest.raises(ValueError, match="must have 3 rows"):
        model(values[:3], packing=packing)
    with pytest.raises(ValueError, match="at least one patch of every clip"):
        model(values, hidden_mask=hidden & (packing.patch_segments(8) != 2), packing=packing)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2' cannot keep the clips of a packed row apart; choose"):
        model(values, packing=packing)


@torch.no_grad()
def test_tokens_of_a_packed_row_attend_to_their_own_clip_alone(tiny_encoder):
    model = tiny_encoder(attn_implementation="eager")
    values, packing = pack(model.config, clips_of(ROWS), CAPACITY)
    numbers = packing.patch_segments(8)
    same = numbers[:, :, None] == numbers[:, None, :]
    for weights in model(values, packing=packing, output_attentions=True).attentions:
        assert torch.equal(weights[:, 0] > 0, same)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention is compiled")
@torch.no_grad()
def test_flex_attention_keeps_the_clips_of_a_row_apart(tiny_encoder):
    model = tiny_encoder(position_embedding="rope_2d")
    values, packing = pack(model.config, clips_of(ROWS), CAPACITY)
    expected = model(values, packing=packing).pooler_output
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(values, packing=packing).pooler_output, expected, atol=1e-5, rtol=1e-5)
