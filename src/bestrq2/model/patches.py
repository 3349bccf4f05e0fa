"""Patches of a spectrogram: cutting, validity, sine-cosine and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Rotation, cached, traced


@dataclass
class Patches:
    """A batch of spectrograms as patches.

    Attributes:
        encoder_input: float32 [B, N, patch values], input of the encoder.
        quantizer_input: float32 [B, N, patch values], input of the quantizer.
        columns: number of columns of the grid; N = rows * columns.
        clip_columns: int64 [B], columns inside each clip; inside all clips of a packed row.
        valid: bool [B, N], True for patches inside their clip; None if all are.
        segments: int64 [B, N], number of the clip of each patch in a packed row, 0 for empty patches; None for rows of
            one clip.
        positions: int64 [B, N], place of each patch in the grid of its clip; None if that is its place in the row.
    """

    encoder_input: Tensor
    quantizer_input: Tensor
    columns: int
    clip_columns: Tensor
    valid: Tensor | None
    segments: Tensor | None = None
    positions: Tensor | None = None


def patchify(log_mel: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut a spectrogram into patches.

    Args:
        log_mel: [B, rows * height, columns * width].
        patch_size: (height in mel bands, width in frames).

    Returns:
        [B, rows * columns, height * width]: frequency-major (index = row * columns + column), the values of a patch
        band by band.
    """
    height, width = patch_size
    batch, bands, frames = log_mel.shape
    grid = log_mel.reshape(batch, bands // height, height, frames // width, width)
    return grid.transpose(2, 3).reshape(batch, -1, height * width)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], rows: int) -> Tensor:
    """Inverse of `patchify`: [B, N, height * width] to [B, rows * height, N / rows * width]."""
    height, width = patch_size
    batch, count, _ = patches.shape
    grid = patches.reshape(batch, rows, count // rows, height, width)
    return grid.transpose(2, 3).reshape(batch, rows * height, count // rows * width)


def patch_columns(frames: Tensor, width: int) -> Tensor:
    """Return the whole patch columns in clips of `frames` frames, at least one; int64 [B] to int64 [B]."""
    return (frames // width).clamp_min(1)


def patch_validity(columns: Tensor, rows: int, total_columns: int) -> Tensor:
    """Return which patches are inside their clip: columns of each clip, int [B], to bool [B, rows * total_columns]."""
    inside = torch.arange(total_columns, device=columns.device) < columns[:, None]
    return inside.repeat(1, rows)


@cached
def sine_cosine_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """2-D sine-cosine position embeddings, float32 [rows * columns, width] (paper section 3).

    Half of the width encodes the row, half the column, with temperature 10000. The quarters are sine of the row, sine
    of the column, cosine of the row, cosine of the column, as in the released checkpoints.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def angles(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequencies

    by_row = angles(rows)[:, None].expand(rows, columns, -1)
    by_column = angles(columns)[None].expand(rows, columns, -1)
    both = torch.cat([by_row, by_column], dim=-1).reshape(rows * columns, width // 2)
    positions = torch.cat([both.sin(), both.cos()], dim=-1)
    return positions.to(device=device, dtype=torch.float32)


@cached
def rotary_angles(rows: int, columns: int, head_width: int, two_dimensional: bool, device: torch.device) -> Tensor:
    """Rotary angles of queries and keys, float32 [rows * columns, head_width], base 10000, for `rotate`.

    In two dimensions the first half of a head encodes the row and the second half the column; otherwise the whole head
    encodes the column.
    """

    def angles(count: int, width: int) -> Tensor:
        inverse = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        half = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * inverse
        return torch.cat([half, half], dim=1)

    if two_dimensional:
        by_row = angles(rows, head_width // 2)[:, None].expand(rows, columns, -1)
        by_column = angles(columns, head_width // 2)[None].expand(rows, columns, -1)
        both = torch.cat([by_row, by_column], dim=-1)
    else:
        both = angles(columns, head_width)[None].expand(rows, columns, -1)
    return both.reshape(rows * columns, head_width).to(device=device, dtype=torch.float32)


@cached
def rotary_tables(
    rows: int, columns: int, head_width: int, two_dimensional: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rotary_angles`, float32 [rows * columns, head_width] each."""
    angles = rotary_angles(rows, columns, head_width, two_dimensional, torch.device("cpu"))
    return angles.cos().to(device), angles.sin().to(device)


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor], parts: int) -> Tensor:
    """Apply the rotary embedding to queries or keys ("rotate-half" form).

    Args:
        states: [B, heads, N, head_width].
        rotary: cosines and sines of the angles, float32 [1 or B, 1, N, head_width].
        parts: number of independently rotated parts of a head: 2 for two-dimensional positions, else 1.

    Returns:
        The rotated states in their own dtype.
    """
    cosine, sine = rotary
    if not traced():
        wide = torch.promote_types(states.dtype, cosine.dtype)
        return Rotation.apply(states.to(wide), cosine.to(wide), sine.to(wide), parts).to(states.dtype)
    grouped = states.float().unflatten(-1, (parts, -1))
    first, second = grouped.chunk(2, dim=-1)
    half_turned = torch.cat([-second, first], dim=-1).flatten(-2)
    return (states * cosine + half_turned * sine).to(states.dtype)
