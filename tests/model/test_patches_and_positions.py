"""Where patches come from, and what tells them apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq2.model.patches import (
    patch_columns,
    patch_validity,
    patchify,
    rotary_angles,
    rotate,
    sine_cosine_positions,
    unpatchify,
)

CPU = torch.device("cpu")


def test_patches_are_numbered_row_by_row_and_read_band_by_band():
    log_mel = torch.arange(2 * 6 * 8.0).reshape(2, 6, 8)
    patches = patchify(log_mel, (3, 2))
    assert patches.shape == (2, 8, 6)
    for clip in range(2):
        for row in range(2):
            for column in range(4):
                patch = log_mel[clip, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
                assert torch.equal(patches[clip, row * 4 + column], patch.flatten())


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    seed=st.integers(0),
)
@settings(max_examples=30, deadline=None)
def test_unpatchify_undoes_patchify(rows, columns, height, width, seed):
    log_mel = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, rows * height, columns * width)))
    assert torch.equal(unpatchify(patchify(log_mel, (height, width)), (height, width), rows), log_mel)


def test_whole_columns_count_and_there_is_at_least_one():
    frames = torch.tensor([1, 15, 16, 31, 32, 257])
    assert patch_columns(frames, 16).tolist() == [1, 1, 1, 1, 2, 16]


def test_a_patch_is_valid_when_its_column_lies_inside_the_clip():
    valid = patch_validity(torch.tensor([1, 3]), rows=2, total_columns=4)
    assert valid.long().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize(("rows", "columns", "width"), [(8, 16, 64), (1, 50, 16), (5, 3, 768), (8, 1, 4)])
def test_sine_cosine_positions_follow_their_formula(rows, columns, width):
    found = sine_cosine_positions(rows, columns, width, CPU).numpy()
    assert found.shape == (rows * columns, width)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            expected = np.empty(width)
            for k in range(quarter):
                frequency = 1.0 / 10_000.0 ** (k / quarter)
                expected[k] = math.sin(row * frequency)
                expected[quarter + k] = math.sin(column * frequency)
                expected[2 * quarter + k] = math.cos(row * frequency)
                expected[3 * quarter + k] = math.cos(column * frequency)
            np.testing.assert_allclose(found[row * columns + column], expected, atol=1e-6)


def test_positions_of_a_short_clip_are_those_rows_and_columns_of_a_long_one():
    for short, long in ((3, 16), (1, 7), (16, 40)):
        few = sine_cosine_positions(8, short, 64, CPU).view(8, short, 64)
        many = sine_cosine_positions(8, long, 64, CPU).view(8, long, 64)
        assert torch.equal(few, many[:, :short])
        for flat in (True, False):
            few = rotary_angles(8, short, 16, flat, CPU).view(8, short, 16)
            many = rotary_angles(8, long, 16, flat, CPU).view(8, long, 16)
            assert torch.equal(few, many[:, :short])


def test_positions_of_patches_are_distinct():
    positions = sine_cosine_positions(8, 64, 64, CPU)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert distances.min() > 0.1


def turned_by_definition(vector: np.ndarray, row: int, column: int, two_dimensional: bool) -> np.ndarray:
    """Rotary positions in float64: value k and value k + half form one complex number, turned by its angle."""
    parts = [(vector, column)]
    if two_dimensional:
        middle = len(vector) // 2
        parts = [(vector[:middle], row), (vector[middle:], column)]
    turned = []
    for part, position in parts:
        half = len(part) // 2
        numbers = part[:half] + 1j * part[half:]
        angles = position * 10_000.0 ** (-np.arange(half) / half)
        numbers = numbers * np.exp(1j * angles)
        turned += [numbers.real, numbers.imag]
    return np.concatenate(turned)


def rotary(rows: int, columns: int, width: int, two_dimensional: bool) -> tuple[torch.Tensor, torch.Tensor]:
    angles = rotary_angles(rows, columns, width, two_dimensional, CPU)[None, None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("two_dimensional", [True, False])
def test_rotary_embedding_equals_multiplication_of_complex_numbers(two_dimensional):
    rows, columns, width = 4, 9, 16
    states = np.random.default_rng(0).normal(size=(rows * columns, width))
    parts = 2 if two_dimensional else 1
    found = rotate(torch.from_numpy(states).float()[None, None], rotary(rows, columns, width, two_dimensional), parts)
    for row in range(rows):
        for column in range(columns):
            place = row * columns + column
            expected = turned_by_definition(states[place], row, column, two_dimensional)
            np.testing.assert_allclose(found[0, 0, place].numpy(), expected, atol=2e-6)


def test_two_dimensional_rotary_scores_depend_on_the_offsets_only():
    rows, columns, width = 6, 10, 16
    rng = np.random.default_rng(1)
    query, key = (torch.from_numpy(rng.normal(size=width)).float() for _ in range(2))
    positions = rotary(rows, columns, width, True)
    queries, keys = (rotate(one.expand(1, 1, rows * columns, width), positions, 2)[0, 0] for one in (query, key))
    scores = (queries @ keys.T).view(rows, columns, rows, columns)
    shifted = scores[1:, 2:, 1:, 2:]
    torch.testing.assert_close(shifted, scores[:-1, :-2, :-1, :-2], atol=1e-4, rtol=0)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 0.1  # a row is not a column
    assert (scores[0, 0, 0, 1] - scores[0, 1, 0, 0]).abs() > 0.1  # before is not after


def test_rotary_positions_in_time_ignore_the_row():
    positions = rotary(3, 5, 8, False)
    for one in positions:
        grid = one.view(3, 5, 8)
        assert torch.equal(grid[0], grid[1])
        assert torch.equal(grid[0], grid[2])
        assert not torch.equal(grid[:, 0], grid[:, 1])


def test_rotation_keeps_lengths_and_dtype():
    states = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 3, 12, 16))).to(torch.bfloat16)
    turned = rotate(states, rotary(3, 4, 16, True), 2)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), states.float().norm(dim=-1), rtol=0.02, atol=0)
