"""Ways of hiding: noise before a Conformer, and several masks of a clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_masks import CONFORMER, OBJECTIVES, N, change_encoder_input, random_mask

from bestrq2.model.masking import draw_hidden_mask
from example_sounds import padded_batch, scenes


@torch.no_grad()
def test_a_conformer_sees_noise_in_hidden_frames(tiny_pretraining, monkeypatch):
    model = tiny_pretraining(**CONFORMER)
    clips = scenes(2, 32_000)
    hidden = random_mask(model, [50, 50])[0]
    before = model(clips, hidden_mask=hidden)
    change_encoder_input(model, monkeypatch, hidden)
    after = model(clips, hidden_mask=hidden)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.targets, after.targets)
    monkeypatch.undo()
    change_encoder_input(model, monkeypatch, ~hidden)
    assert not torch.allclose(before.logits, model(clips, hidden_mask=hidden).logits, atol=1e-2)


@torch.no_grad()
def test_a_conformers_clip_is_the_same_alone_and_in_a_padded_batch(tiny_pretraining):
    model = tiny_pretraining(**CONFORMER).base_model
    lengths = [32_000, 20_500, 9_100]
    values, mask = padded_batch(lengths, behind=0.7)
    together = model(values, mask)
    for row, length in enumerate(lengths):
        alone = model(values[row : row + 1, :length])
        count = alone.last_hidden_state.shape[1]
        assert int(together.frame_attention_mask[row].sum()) == count
        torch.testing.assert_close(
            together.last_hidden_state[row, :count], alone.last_hidden_state[0], rtol=0, atol=2e-5
        )
        torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], rtol=0, atol=2e-5)


def test_noise_is_random_in_training_and_fixed_in_evaluation(tiny_pretraining):
    model = tiny_pretraining(**{**CONFORMER, "conformer_dropout": 0.0})
    clips, hidden = scenes(2, 32_000), random_mask(model, [50, 50])
    evaluated = [model(clips, hidden_mask=hidden).loss.item() for _ in range(2)]
    assert evaluated[0] == evaluated[1]
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(clips, hidden_mask=hidden).loss.item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("codebooks", [1, 3])
def test_several_masks_of_a_clip_give_the_mean_of_their_single_losses(tiny_pretraining, objective, codebooks):
    model = tiny_pretraining(objective=objective, mask_ratio=[0.5, 0.5], num_codebooks=codebooks)
    clips = scenes(3, 80_000)
    masks = draw_hidden_mask(model.config, [8, 8, 8], 5, 0, range(3), masks=2)
    assert masks.shape == (3, 2, N)
    calls = []
    model.bestrq2.log_mel.register_forward_hook(lambda *_: calls.append(1))
    together = model(clips, hidden_mask=masks)
    assert len(calls) == 1  # one spectrogram for all masks
    singles = [model(clips, hidden_mask=masks[:, index]) for index in range(2)]
    assert together.loss.item() == pytest.approx(np.mean([one.loss.item() for one in singles]), rel=1e-5)
    for index, one in enumerate(singles):
        assert torch.equal(together.targets[index::2], one.targets)
        torch.testing.assert_close(together.logits[index::2], one.logits, rtol=0, atol=1e-4)
        assert torch.equal(together.hidden_mask[index::2], masks[:, index])


def test_several_masks_of_padded_clips(tiny_pretraining):
    model = tiny_pretraining(mask_ratio=[0.5, 0.5], masks_per_clip=2)
    values, mask = padded_batch([80_000, 40_000])
    hidden = draw_hidden_mask(model.config, [8, 4], 0, 0, range(2))
    together = model(values, mask, hidden)
    short = model(values[1:, :40_000], None, hidden[1:].unflatten(-1, (8, 8))[..., :4].flatten(-2))
    count = short.targets.shape[1]
    assert torch.equal(together.targets[2:, :count], short.targets)
    torch.testing.assert_close(together.logits[2:, :count], short.logits, rtol=0, atol=1e-4)
