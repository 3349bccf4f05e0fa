"""Frozen encoder as a torch module, for benchmark harnesses that move, train and save modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bestrq2.inference.embedder import Embedder, Embeddings, check_phases
from bestrq2.model.modeling_bestrq2 import BestRQ2Model


class FrozenEncoder(nn.Module):
    """Embeds clips as `Embedder` does, on the current device of its parameters; has no gradients.

    Args:
        model: the encoder, with the readout of its frames and clips; it becomes part of this module's state dict.
        phases: number of shifted copies of the patch grid, for finer frames.

    Attributes:
        frame_width: values per frame.
        clip_width: values per clip.

    Raises:
        ConfigError: phases is out of range.
    """

    def __init__(self, model: BestRQ2Model, phases: int = 1) -> None:
        super().__init__()
        check_phases(phases, model.config)
        self.model = model.requires_grad_(False)
        self.phases = phases
        self.frame_width = model.readout.frame_width(model.config)
        self.clip_width = model.readout.clip_width(model.config)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode: trainers switch all modules, and stochastic depth would change the features."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    def embed(self, clips: Sequence[Tensor], sampling_rate: int, phases: int | None = None) -> Embeddings:
        """Embed clips, float [samples] each; see `Embedder.embed`."""
        return Embedder(self.model, self.device).embed(list(clips), sampling_rate, phases or self.phases)
