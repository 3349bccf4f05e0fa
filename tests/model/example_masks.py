"""Masks for both objectives on clips of 8 x 8 patches, and changes of what they let through."""

from __future__ import annotations

import dataclasses

import torch

from bestrq2 import BestRQ2ForPreTraining
from bestrq2.model.masking import draw_hidden_mask

OBJECTIVES = ["two_step", "one_stage"]
N, COLUMNS = 64, 8
CONFORMER = {
    "encoder_type": "conformer", "position_embedding": "relative", "objective": "one_stage", "mask_fill": "noise",
    "num_mel_bands": 80, "patch_size": [80, 4], "n_fft": 400, "win_length": 400, "hop_length": 160, "max_seconds": 2.0,
    "mask_ratio": [0.6, 0.6], "input_normalization": "clip", "drop_path_rate": 0.0,
    "quantizer_normalization": "layernorm", "conformer_channels": [8, 4], "conformer_kernel_size": 5,
}  # fmt: skip


def mask_of(*places: int) -> torch.Tensor:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[list(places)] = True
    return mask


def random_mask(model: BestRQ2ForPreTraining, columns: list[int], seed: int = 0) -> torch.Tensor:
    return draw_hidden_mask(model.config, columns, seed, 0, range(len(columns)))


def change_encoder_input(model, monkeypatch, where: torch.Tensor) -> None:
    """From now on, what the encoder gets at the patches `where` [N] is something else; targets stay."""
    original = model.bestrq2.patches

    def changed(*arguments):
        patches = original(*arguments)
        other = torch.where(where[:, None], patches.encoder_input.flip(-1) * 0.5 - 7.0, patches.encoder_input)
        return dataclasses.replace(patches, encoder_input=other)

    monkeypatch.setattr(model.bestrq2, "patches", changed)
