"""Noise in place of hidden patches, before a Conformer."""

from __future__ import annotations

import torch
from example_masks import CONFORMER, change_encoder_input, random_mask

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
