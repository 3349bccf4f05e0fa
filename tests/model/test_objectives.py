"""Both objectives: nothing hidden is seen, padding plays no part, and they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_masks import COLUMNS, OBJECTIVES, N, change_encoder_input, mask_of, random_mask

from bestrq2 import BestRQ2ForPreTraining
from example_sounds import padded_batch, scenes


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", ["sincos", "rope_2d", "rope_time", "learned"])
@torch.no_grad()
def test_hidden_values_do_not_change_the_output(tiny_pretraining, monkeypatch, objective, positions):
    model = tiny_pretraining(objective=objective, position_embedding=positions)
    clips = scenes(2, 80_000)
    hidden = random_mask(model, [8, 8])[0]
    before = model(clips, hidden_mask=hidden)
    change_encoder_input(model, monkeypatch, hidden)
    after = model(clips, hidden_mask=hidden)
    assert torch.equal(after.context_hidden_state, before.context_hidden_state)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.targets, before.targets)


@pytest.mark.parametrize("objective", OBJECTIVES)
@torch.no_grad()
def test_every_visible_patch_matters_to_every_hidden_one(tiny_pretraining, monkeypatch, objective):
    model = tiny_pretraining(objective=objective)
    clips, hidden = scenes(2, 80_000), random_mask(model, [8, 8])[0]
    before = model(clips, hidden_mask=hidden)
    for place in (~hidden).nonzero().flatten()[::5].tolist():
        with monkeypatch.context() as patch:
            change_encoder_input(model, patch, mask_of(place))
            after = model(clips, hidden_mask=hidden)
        difference = (after.logits - before.logits).abs().amax(dim=-1)
        assert difference.min() > 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
@torch.no_grad()
def test_sound_inside_a_hidden_column_does_not_reach_the_encoder(tiny_pretraining, objective):
    model = tiny_pretraining(objective=objective)
    clips = scenes(2, 80_000)
    column = 3
    hidden = (torch.arange(N) % COLUMNS == column) | (torch.arange(N) % 5 == 0)
    before = model(clips, hidden_mask=hidden)
    changed = clips.clone()
    # 16 frames of 625 samples a column; the window reaches 1024 samples beyond.
    inside = slice(column * 10_000 + 1_100, (column + 1) * 10_000 - 1_800)
    changed[:, inside] = changed[:, inside].flip(1) * 0.3
    after = model(changed, hidden_mask=hidden)
    torch.testing.assert_close(after.context_hidden_state, before.context_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)
    assert not torch.equal(after.targets, before.targets)


@torch.no_grad()
def test_in_one_stage_the_mask_token_stands_for_hidden_patches(tiny_pretraining):
    model = tiny_pretraining(objective="one_stage")
    clips, hidden = scenes(2, 80_000), random_mask(model, [8, 8])
    patches = model.bestrq2.patches(clips)
    tokens = model.bestrq2.patch_embedding(patches.encoder_input)
    tokens[hidden] = model.mask_token.flatten()
    states = model.bestrq2.encoder(tokens + model.bestrq2.encoder.added_positions(8, tokens.device), 8, None, None)
    output = model(clips, hidden_mask=hidden)
    expected = model.head(torch.stack([states[clip][hidden[clip]] for clip in range(2)]))
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    visible = torch.stack([states[clip][~hidden[clip]] for clip in range(2)])
    torch.testing.assert_close(output.context_hidden_state, visible, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_two_steps_the_predictor_gets_context_and_mask_tokens_in_their_places(tiny_pretraining):
    """The same as scattering both into the grid and running the predictor over it in grid order."""
    model = tiny_pretraining(predictor_num_layers=2)
    clips, hidden = scenes(2, 80_000), random_mask(model, [8, 8])
    output = model(clips, hidden_mask=hidden)
    positions = model.predictor.added_positions(8, clips.device)
    grid = torch.empty(2, N, 24)
    for clip in range(2):
        grid[clip, ~hidden[clip]] = model.predictor_input(output.context_hidden_state[clip])
        grid[clip, hidden[clip]] = model.mask_token[0] + positions[hidden[clip]]
    states = model.predictor(grid, 8, None, None)
    expected = model.head(torch.stack([states[clip][hidden[clip]] for clip in range(2)]))
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_two_steps_the_encoder_works_on_visible_patches_only(tiny_pretraining):
    model = tiny_pretraining()
    counts = []
    model.bestrq2.encoder.register_forward_pre_hook(lambda _, arguments: counts.append(arguments[0].shape[1]))
    hidden = torch.arange(N) % 4 > 0
    output = model(scenes(2, 80_000), hidden_mask=hidden)
    assert counts == [16]
    assert output.context_hidden_state.shape == (2, 16, 32)
    assert output.logits.shape == (2, 48, 64)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", ["sincos", "rope_2d", "learned"])
@torch.no_grad()
def test_a_clip_in_a_padded_batch_has_the_logits_it_has_alone(tiny_pretraining, objective, positions):
    model = tiny_pretraining(objective=objective, position_embedding=positions, input_normalization="clip")
    lengths = [80_000, 31_000, 52_000, 4_000]
    columns = [model.config.columns(length) for length in lengths]
    batch, attention_mask = padded_batch(lengths, behind=float("nan"))
    hidden = random_mask(model, columns)
    together = model(batch, attention_mask, hidden_mask=hidden)
    losses, total = 0.0, 0
    for index, (length, own) in enumerate(zip(lengths, columns, strict=True)):
        own_mask = hidden.view(4, 8, COLUMNS)[index, :, :own].flatten()
        alone = model(batch[index : index + 1, :length], hidden_mask=own_mask)
        real = together.hidden_valid[index]
        assert real.sum() == own_mask.sum()
        assert torch.equal(together.targets[index][real], alone.targets[0])
        torch.testing.assert_close(together.logits[index][real], alone.logits[0], atol=1e-4, rtol=0)
        visible = alone.context_hidden_state.shape[1]
        torch.testing.assert_close(
            together.context_hidden_state[index, :visible], alone.context_hidden_state[0], atol=1e-4, rtol=0
        )
        losses, total = losses + alone.loss * real.sum(), total + real.sum()
    assert together.loss.item() == pytest.approx((losses / total).item(), abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@torch.no_grad()
def test_clips_of_equal_length_may_hide_unequal_numbers_of_patches(tiny_pretraining, objective):
    """Then the surplus places of one clip point at its other patches, which must not be seen through them."""
    model = tiny_pretraining(objective=objective)
    clips = scenes(2, 80_000)
    hidden = torch.stack([mask_of(*range(0, 20)), mask_of(*range(10, 50))])
    together = model(clips, hidden_mask=hidden)
    for index in range(2):
        alone = model(clips[index : index + 1], hidden_mask=hidden[index])
        real = together.hidden_valid[index]
        torch.testing.assert_close(together.logits[index][real], alone.logits[0], atol=1e-5, rtol=1e-5)
        visible = alone.context_hidden_state.shape[1]
        torch.testing.assert_close(
            together.context_hidden_state[index, :visible], alone.context_hidden_state[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
@torch.no_grad()
def test_masks_drawn_in_the_model_never_hide_padding(tiny_pretraining, objective):
    model = tiny_pretraining(objective=objective)
    batch, attention_mask = padded_batch([30_000, 50_000], total=80_000)
    output = model(batch, attention_mask, generator=torch.Generator().manual_seed(1))
    grid = output.hidden_mask.view(2, 8, 8)
    assert not grid[0, :, 3:].any()
    assert not grid[1, :, 5:].any()
    assert 0.35 < grid[1, :, :5].float().mean() < 0.6
    assert torch.isfinite(output.loss)


@torch.no_grad()
def test_the_generator_determines_the_mask(tiny_pretraining):
    model, clips = tiny_pretraining(), scenes(2, 80_000)
    masks = [model(clips, generator=torch.Generator().manual_seed(seed)).hidden_mask for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])
    torch.manual_seed(7)
    first = model(clips).hidden_mask
    assert not torch.equal(model(clips).hidden_mask, first)


@torch.no_grad()
def test_one_mask_can_serve_the_whole_batch(tiny_pretraining):
    model, clips = tiny_pretraining(), scenes(3, 80_000)
    mask = torch.arange(N) % 2 == 0
    shared, spelt_out = model(clips, hidden_mask=mask), model(clips, hidden_mask=mask.expand(3, -1).clone())
    assert torch.equal(shared.logits, spelt_out.logits)
    assert shared.hidden_mask.shape == (3, N)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(N, dtype=torch.bool), "hide at least one patch of every clip and leave one visible"),
        (torch.zeros(2, N, dtype=torch.bool), "hide at least one patch"),
        (torch.ones(2, 30, dtype=torch.bool), r"bool \[2, 64\], got torch.bool \[2, 30\]"),
        (torch.ones(2, N), r"bool \[2, 64\], got torch.float32"),
    ],
)
def test_invalid_hidden_masks_are_refused(tiny_pretraining, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_pretraining()(scenes(2, 80_000), hidden_mask=mask)


def test_a_mask_that_hides_nothing_inside_a_short_clip_is_refused(tiny_pretraining):
    batch, attention_mask = padded_batch([20_000, 80_000])
    behind = torch.arange(N) % COLUMNS >= 5
    with pytest.raises(ValueError, match="hide at least one patch of every clip"):
        tiny_pretraining()(batch, attention_mask, hidden_mask=behind)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_embedding": "learned", "num_codebooks": 2},
        {
            "position_embedding": "rope_2d",
            "qk_norm": True,
            "norm": "rmsnorm",
            "activation": "swiglu",
            "use_bias": False,
        },
    ],
    ids=str,
)
def test_gradients_reach_every_parameter_and_no_buffer(tiny_pretraining, objective, changes):
    model = tiny_pretraining(objective=objective, **changes).train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert {name.split(".")[-1] for name in buffers} == {"projection", "codebook", "mean", "deviation"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch, attention_mask = padded_batch([80_000, 45_000])
    model(batch, attention_mask).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name
    optimizer.step()
    for name, value in model.named_buffers():
        assert not value.requires_grad
        assert torch.equal(value, buffers[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("codebooks", [1, 3])
@torch.no_grad()
def test_loss_and_diagnostics_follow_from_logits_and_targets(tiny_pretraining, objective, codebooks):
    model = tiny_pretraining(objective=objective, num_codebooks=codebooks, quantizer_normalization="layernorm")
    batch, attention_mask = padded_batch([80_000, 31_000, 52_000])
    output = model(batch, attention_mask, hidden_mask=random_mask(model, [8, 3, 5]))
    shape = (3, output.hidden_valid.shape[1])
    assert output.logits.shape == (*shape, *([codebooks] if codebooks > 1 else []), 64)
    assert output.targets.shape == (*shape, *([codebooks] if codebooks > 1 else []))
    real = output.hidden_valid.numpy()
    logits = output.logits.double().numpy().reshape(*shape, codebooks, 64)[real]
    targets = output.targets.numpy().reshape(*shape, codebooks)[real]
    losses, right, entropies, coverages, tops = [], [], [], [], []
    for book in range(codebooks):
        shifted = logits[:, book] - logits[:, book].max(axis=1, keepdims=True)
        chosen = shifted[np.arange(len(shifted)), targets[:, book]]
        losses.append(np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen))
        right.append(np.mean(shifted.argmax(axis=1) == targets[:, book]))
        counts = np.bincount(targets[:, book], minlength=64)
        assert output.code_counts[book].tolist() == counts.tolist()
        shares = counts[counts > 0] / counts.sum()
        entropies.append(-(shares * np.log(shares)).sum())
        coverages.append((counts > 0).mean())
        tops.append(shares.max())
    assert output.loss.item() == pytest.approx(np.mean(losses), abs=1e-6)
    assert output.accuracy.item() == pytest.approx(np.mean(right), abs=1e-6)
    assert output.target_entropy.item() == pytest.approx(np.mean(entropies), abs=1e-5)
    assert output.excess_loss.item() == pytest.approx(np.mean(losses) - np.mean(entropies), abs=1e-5)
    assert output.code_perplexity.item() == pytest.approx(np.mean(np.exp(entropies)), rel=1e-5)
    assert output.code_coverage.item() == pytest.approx(np.mean(coverages))
    assert output.top_code_share.item() == pytest.approx(np.mean(tops))
    assert 2 < output.code_perplexity.item() < 64


@pytest.mark.parametrize("objective", OBJECTIVES)
@torch.no_grad()
def test_the_loss_is_the_mean_over_codebooks(tiny_pretraining, objective):
    model = tiny_pretraining(objective=objective, num_codebooks=3)
    clips, mask = scenes(2, 80_000), torch.arange(N) % 2 == 0
    output = model(clips, hidden_mask=mask)
    single = [
        torch.nn.functional.cross_entropy(output.logits[:, :, book].flatten(0, 1), output.targets[..., book].flatten())
        for book in range(3)
    ]
    assert output.loss.item() == pytest.approx(sum(single).item() / 3, abs=1e-6)
    assert torch.equal(output.targets, model.quantizer(model.bestrq2.patches(clips).quantizer_input)[:, mask])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_batch_can_be_overfitted(tiny_config, objective):
    config = tiny_config(
        objective=objective,
        input_normalization="clip",
        quantizer_normalization="layernorm",
        max_seconds=2.5,
        hidden_size=64,
        intermediate_size=128,
        predictor_hidden_size=64,
        predictor_intermediate_size=128,
    )
    torch.manual_seed(0)
    model = BestRQ2ForPreTraining(config).train()
    clips = scenes(6, 40_000)
    hidden = random_mask(model, [4] * 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        output = model(clips, hidden_mask=hidden)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if output.accuracy > 0.99:
            break
    assert output.top_code_share < 0.3
    assert output.accuracy > 0.95
    assert output.excess_loss < -1.0
