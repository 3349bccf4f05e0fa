"""Frozen random-projection quantizer that provides the targets, and statistics of code usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bestrq2 import BestRQ2Config


class RandomProjectionQuantizer(nn.Module):
    """Random-projection quantizer (paper section 2; arXiv 2202.01855).

    The code of a patch is the codebook row with the largest cosine to its random projection. Projection (Xavier
    uniform) and codebook (Gaussian rows normalized to length 1) are buffers drawn from `quantizer_seed`, never trained
    and saved with the model. All arithmetic is float32.

    Where a patch has the bands of two windows, the first, third, ... codebook codes those of the long one, and the
    second, fourth, ... those of the short one.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.config = config
        books, size, width = config.num_codebooks, config.codebook_size, config.codebook_dim
        self.register_buffer("projection", torch.empty(books, config.patch_values, width))
        self.register_buffer("codebook", torch.empty(books, size, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projection and codebook from `quantizer_seed`."""
        if self.projection.is_meta:  # counting parameters needs no numbers
            return
        generator = torch.Generator().manual_seed(self.config.quantizer_seed)
        for book in range(self.config.num_codebooks):
            parts = self.config.window_values
            drawn = torch.empty(parts[book % len(parts)], self.config.codebook_dim, device="cpu")
            nn.init.xavier_uniform_(drawn, generator=generator)
            projection = torch.zeros(self.projection.shape[1:], device="cpu")
            projection.split(parts)[book % len(parts)].copy_(drawn)
            codes = torch.empty(self.codebook.shape[1:], device="cpu").normal_(generator=generator)
            self.projection[book].copy_(projection)
            self.codebook[book].copy_(F.normalize(codes, dim=-1))

    def _apply(self, fn: Any, recurse: bool = True) -> RandomProjectionQuantizer:
        """Follow `.to()` to another device but keep the precision: rounded buffers would give other codes."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """Return the code of every patch.

        Args:
            patches: float [B, N, patch values].

        Returns:
            int64 [B, N], or [B, N, codebooks] with more than one codebook.
        """
        with torch.autocast(patches.device.type, enabled=False):
            patches = patches.float()
            if self.config.quantizer_normalization == "layernorm":
                parts = patches.split(self.config.window_values, dim=-1)
                patches = torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)
            codes = []
            for projection, codebook in zip(self.projection.float(), self.codebook.float(), strict=True):
                directions = F.normalize(patches @ projection, dim=-1)
                codes.append((directions @ codebook.T).argmax(dim=-1))
        return codes[0] if len(codes) == 1 else torch.stack(codes, dim=-1)


@dataclass(frozen=True)
class CodeUsage:
    """Usage of the codes by a set of targets; scalars, averaged over codebooks.

    Attributes:
        entropy: entropy of the marginal distribution of codes, nats; the best loss without looking at the input.
        perplexity: exp(entropy), the effective number of codes.
        coverage: share of the codebook that occurs.
        top_share: share of the most frequent code.
    """

    entropy: Tensor
    perplexity: Tensor
    coverage: Tensor
    top_share: Tensor


def count_codes(targets: Tensor, weights: Tensor, codebook_size: int) -> Tensor:
    """Count the occurrences of each code, without a host-device synchronization.

    Args:
        targets: int64 [B, H] or [B, H, codebooks].
        weights: bool [B, H], True for targets that count.
        codebook_size: codes per codebook.

    Returns:
        float32 [codebooks, codebook_size].
    """
    flat = targets.flatten(0, 1)
    flat = flat[:, None] if flat.ndim == 1 else flat
    counts = torch.zeros(flat.shape[1], codebook_size, device=targets.device)
    return counts.scatter_add_(1, flat.T, weights.flatten().float().expand(flat.shape[1], -1))


def code_usage(counts: Tensor) -> CodeUsage:
    """Summarize counts from `count_codes`, float [codebooks, codebook_size]."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)
    entropies = torch.special.entr(shares).sum(dim=1)
    return CodeUsage(
        entropy=entropies.mean(),
        perplexity=entropies.exp().mean(),
        coverage=(counts > 0).float().mean(),
        top_share=shares.amax(dim=1).mean(),
    )
