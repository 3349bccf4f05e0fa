"""A clip has the same embeddings alone, in a batch, and before padding of any content."""

from __future__ import annotations

import itertools

import pytest
import torch

from example_sounds import padded_batch, scenes

# Whole patches, parts of patches, less than a patch, next to nothing.
LENGTHS = [80_000, 47_000, 9_375, 9_374, 100, 1]

ARCHITECTURES = [
    {"position_embedding": positions, "input_normalization": normalization}
    for positions, normalization in itertools.product(
        ("sincos", "rope_2d", "rope_time", "learned"), ("none", "dataset", "clip")
    )
] + [
    {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "use_bias": False, "position_embedding": "rope_2d"},
    {"norm": "layernorm", "activation": "swiglu", "qk_norm": True, "use_bias": False},
    {"patch_size": [128, 4], "position_embedding": "rope_time", "input_normalization": "clip"},
]


def name_of(architecture: dict) -> str:
    return " ".join(str(value) for value in architecture.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name_of)
@torch.no_grad()
def test_padding_does_not_change_embeddings(tiny_encoder, architecture):
    model = tiny_encoder(**architecture)
    model.set_statistics(torch.linspace(-30, -60, 128), torch.linspace(8, 20, 128))
    batch, mask = padded_batch(LENGTHS, behind=float("nan"))
    together = model(batch, mask)
    rows, columns = model.config.patch_rows, together.last_hidden_state.shape[1]
    assert torch.isfinite(together.last_hidden_state).all()
    for index, length in enumerate(LENGTHS):
        alone = model(batch[index : index + 1, :length])
        own = model.config.columns(length)
        assert alone.last_hidden_state.shape == (1, own, 32)
        assert together.frame_attention_mask[index].tolist() == [place < own for place in range(columns)]
        torch.testing.assert_close(
            together.last_hidden_state[index, :own], alone.last_hidden_state[0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(together.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=0)
        grid = together.patch_hidden_states.view(len(LENGTHS), rows, columns, -1)[index, :, :own]
        torch.testing.assert_close(grid.flatten(0, 1), alone.patch_hidden_states[0], atol=1e-5, rtol=0)
        assert torch.all(together.last_hidden_state[index, own:] == 0)


@pytest.mark.parametrize("normalization", ["none", "clip", "clip_band"])
@torch.no_grad()
def test_padding_beyond_the_longest_clip_changes_nothing(tiny_encoder, normalization):
    model = tiny_encoder(input_normalization=normalization)
    close = model(*padded_batch([30_000, 50_000]))
    wide = model(*padded_batch([30_000, 50_000], behind=0.7, total=80_000))
    columns = close.last_hidden_state.shape[1]
    assert (columns, wide.last_hidden_state.shape[1]) == (5, 8)
    torch.testing.assert_close(wide.last_hidden_state[:, :columns], close.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(wide.pooler_output, close.pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(tiny_encoder):
    model = tiny_encoder()
    clips = scenes(2, 60_000)
    without, with_mask = model(clips), model(clips, torch.ones_like(clips, dtype=torch.bool))
    torch.testing.assert_close(with_mask.patch_hidden_states, without.patch_hidden_states, atol=1e-5, rtol=0)
    assert torch.equal(with_mask.frame_attention_mask, without.frame_attention_mask)


@torch.no_grad()
def test_frames_are_the_mean_over_rows_and_clips_the_mean_over_frames(tiny_encoder):
    output = tiny_encoder()(scenes(2, 80_000))
    grid = output.patch_hidden_states.view(2, 8, 8, 32)
    torch.testing.assert_close(output.last_hidden_state, grid.mean(dim=1))
    torch.testing.assert_close(output.pooler_output, output.patch_hidden_states.mean(dim=1), atol=1e-6, rtol=1e-5)
    assert output.patch_hidden_states.std() > 0.1


@pytest.mark.parametrize("positions", ["sincos", "rope_2d", "rope_time", "learned"])
@torch.no_grad()
def test_moving_a_sound_to_another_place_changes_its_states(tiny_encoder, positions):
    """Without positions the states would only be permuted."""
    model = tiny_encoder(position_embedding=positions)
    patches = model.patches(scenes(1, 80_000))
    states = model.encoder(model.embed_patches(patches), 8, None, None)
    grid = patches.encoder_input.view(1, 8, 8, -1)
    patches.encoder_input = grid.roll(3, dims=2).flatten(1, 2)
    moved = model.encoder(model.embed_patches(patches), 8, None, None).view(1, 8, 8, -1)
    assert (moved.roll(-3, dims=2) - states.view(1, 8, 8, -1)).abs().max() > 1e-3


@torch.no_grad()
def test_audio_longer_than_in_pretraining_is_embedded_with_its_own_positions(tiny_encoder):
    model = tiny_encoder()
    output = model(scenes(1, 240_000))
    assert output.last_hidden_state.shape == (1, 24, 32)


@torch.no_grad()
def test_more_columns_than_learned_positions_are_refused(tiny_encoder):
    model = tiny_encoder(position_embedding="learned", max_columns=9)
    assert model(scenes(1, 90_000)).last_hidden_state.shape == (1, 9, 32)
    with pytest.raises(ValueError, match=r"10 patch columns.*learned for 9 \(max_columns\)"):
        model(scenes(1, 100_000))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0, 1]]), "pad on the right"),
        (torch.tensor([[0, 0, 0, 0]]), "without any sample"),
        (torch.tensor([[1, 1, 1]]), r"shape of input_values \(1, 4\), got \(1, 3\)"),
    ],
)
def test_invalid_attention_masks_are_refused(tiny_encoder, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_encoder()(torch.tensor([[0.1, 0.2, -0.1, 0.3]]), mask)


def test_waveforms_must_be_a_batch(tiny_encoder):
    for given in (torch.ones(100), torch.ones(2, 100, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"floats in \[-1, 1\], \[batch, samples\], got torch\..* of shape"):
            tiny_encoder()(given)


@torch.no_grad()
def test_statistics_of_the_corpus_normalise_each_band(tiny_encoder):
    model = tiny_encoder(input_normalization="dataset")
    clips = scenes(4, 80_000)
    log_mel, _ = model.log_mel(clips)
    log_mel = log_mel[..., :128]
    model.set_statistics(log_mel.mean(dim=(0, 2)), log_mel.std(dim=(0, 2)))
    grid = model.patches(clips).encoder_input.view(4, 8, 8, 16, 16)
    bands = grid.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)
    torch.testing.assert_close(bands.mean(dim=1), torch.zeros(128), atol=1e-4, rtol=0)
    torch.testing.assert_close(bands.std(dim=1), torch.ones(128), atol=1e-3, rtol=0)


@torch.no_grad()
def test_clip_normalisation_takes_out_level_and_spread_of_each_clip(tiny_encoder):
    model = tiny_encoder(input_normalization="clip")
    clips = scenes(2, 80_000)
    values = model.patches(clips).encoder_input
    torch.testing.assert_close(values.mean(dim=(1, 2)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(dim=(1, 2)), torch.ones(2), atol=1e-3, rtol=0)
    quieter = model.patches(0.5 * clips).encoder_input
    assert ((quieter - values).abs() < 1e-3).float().mean() > 0.999  # the rest is at the floor of -100 dB


@torch.no_grad()
def test_the_quantizer_can_see_dataset_statistics_where_the_encoder_sees_decibels(tiny_encoder):
    model = tiny_encoder(quantizer_normalization="dataset")
    model.set_statistics(torch.linspace(-30, -60, 128), torch.linspace(8, 20, 128))
    patches = model.patches(scenes(1, 80_000))
    decibels = patches.encoder_input.view(8, 8, 16, 16).transpose(1, 2).reshape(128, 128)
    expected = (decibels - torch.linspace(-30, -60, 128)[:, None]) / torch.linspace(8, 20, 128)[:, None]
    found = patches.quantizer_input.view(8, 8, 16, 16).transpose(1, 2).reshape(128, 128)
    torch.testing.assert_close(found, expected)
    same = tiny_encoder(input_normalization="dataset", quantizer_normalization="dataset").patches(scenes(1, 80_000))
    assert same.quantizer_input is same.encoder_input
