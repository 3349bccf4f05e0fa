"""Which patches are hidden: the right number, in the right places, from (seed, step, place) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from bestrq2.model.masking import draw_hidden_mask, order_by_mask

ROWS = 8


def drawn(config, columns, seed=0, step=0, places=None) -> np.ndarray:
    """bool [B, rows, columns] of the widest clip."""
    places = range(len(columns)) if places is None else places
    return draw_hidden_mask(config, columns, seed, step, places).view(len(columns), ROWS, -1).numpy()


def test_every_clip_hides_the_same_share_of_its_patches(tiny_config):
    config = tiny_config(mask_ratio=[0.55, 0.55])
    columns = [8, 1, 3, 5, 8]
    masks = drawn(config, columns)
    assert masks.shape == (5, ROWS, 8)
    for mask, own in zip(masks, columns, strict=True):
        assert mask.sum() == int(0.55 * ROWS * own)
        assert not mask[:, own:].any()


def test_the_ratio_is_drawn_once_a_step_over_its_whole_range(tiny_config):
    config = tiny_config(mask_ratio=[0.4, 0.6])
    shares = []
    for step in range(400):
        masks = drawn(config, [8, 8], step=step)
        counts = masks.sum(axis=(1, 2))
        assert counts[0] == counts[1]
        shares.append(counts[0] / 64)
    # floor(r * 64) / 64 for r from 0.4 to 0.6 goes from 25/64 to 38/64, on average half a patch below r.
    assert min(shares) == 25 / 64
    assert max(shares) == 38 / 64
    assert np.mean(shares) == pytest.approx(0.5 - 0.5 / 64, abs=0.01)


def test_extreme_ratios_hide_at_least_one_patch_and_show_at_least_one(tiny_config):
    few = drawn(tiny_config(mask_ratio=[0.001, 0.001]), [1, 8])
    assert few.sum(axis=(1, 2)).tolist() == [1, 1]
    many = drawn(tiny_config(mask_ratio=[0.999, 0.999]), [1, 8])
    assert many.sum(axis=(1, 2)).tolist() == [7, 63]


def test_every_patch_is_hidden_equally_often(tiny_config):
    config = tiny_config(mask_ratio=[0.5, 0.5])
    clips, steps = 40, 50
    hidden = sum(drawn(config, [8] * clips, step=step).sum(axis=0) for step in range(steps)).flatten()
    total = clips * steps
    assert hidden.sum() == total * 32
    # Without replacement a place is hidden with variance r (1 - r), negatively correlated with the others.
    statistic = ((hidden - total / 2) ** 2 / (total / 4) * 63 / 64).sum()
    assert chi2.ppf(0.0005, 63) < statistic < chi2.ppf(0.9995, 63)


def test_clips_steps_and_seeds_have_different_masks(tiny_config):
    config = tiny_config(mask_ratio=[0.5, 0.5])
    masks = [
        mask.tobytes()
        for seed in range(3)
        for step in range(5)
        for mask in drawn(config, [8] * 6, seed=seed, step=step)
    ]
    assert len(set(masks)) == 90


def test_a_mask_depends_on_seed_step_and_place_only(tiny_config):
    config = tiny_config()
    whole = drawn(config, [8, 5, 8, 2], seed=11, step=7, places=[40, 41, 42, 43])
    for index, (place, own) in enumerate([(40, 8), (41, 5), (42, 8), (43, 2)]):
        alone = drawn(config, [own], seed=11, step=7, places=[place])
        assert np.array_equal(alone[0], whole[index, :, :own])
    halves = [drawn(config, [8, 8], 11, 7, places) for places in ([42, 40], [99, 42])]
    assert np.array_equal(halves[0][0], halves[1][1])
    assert np.array_equal(halves[0][1], whole[0])


@settings(max_examples=60, deadline=None)
@given(
    columns=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    ratios=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).map(sorted),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 2**31),
    first=st.integers(0, 2**31),
)
def test_any_mask_hides_some_patches_inside_every_clip(tiny_config, columns, ratios, seed, step, first):
    config = tiny_config(mask_ratio=list(ratios))
    places = range(first, first + len(columns))
    masks = drawn(config, columns, seed, step, places)
    assert np.array_equal(masks, drawn(config, columns, seed, step, places))
    for mask, own in zip(masks, columns, strict=True):
        count, patches = int(mask.sum()), ROWS * own
        assert not mask[:, own:].any()
        assert max(1, int(ratios[0] * patches)) <= count <= max(1, int(ratios[1] * patches))
        assert count < patches


def test_a_clip_of_one_patch_cannot_be_masked(tiny_config):
    config = tiny_config(patch_size=[128, 16])
    with pytest.raises(ValueError, match="one patch"):
        draw_hidden_mask(config, [4, 1], 0, 0, [0, 1])


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 5), patches=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0))
def test_order_by_mask_lists_the_selected_patches_in_grid_order(batch, patches, share, seed):
    selected = np.random.default_rng(seed).random((batch, patches)) < share
    index, real = order_by_mask(torch.from_numpy(selected))
    most = selected.sum(axis=1).max()
    assert index.shape == real.shape == (batch, most)
    for row in range(batch):
        expected = [place for place in range(patches) if selected[row, place]]
        assert index[row][real[row]].tolist() == expected
        assert real[row].tolist() == [place < len(expected) for place in range(most)]
        surplus = index[row][~real[row]].tolist()
        assert not any(selected[row, place] for place in surplus)
