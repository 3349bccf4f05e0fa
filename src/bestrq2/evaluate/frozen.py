"""Frozen encoder as a torch module, for benchmark harnesses that move, train and save modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bestrq2.errors import ConfigError
from bestrq2.inference.embedder import Embedder, Embeddings
from bestrq2.inference.readout import Layers, layer_indices
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model


class FrozenEncoder(nn.Module):
    """Embeds clips as `Embedder` does, on the current device of its parameters; has no gradients.

    Args:
        model: the encoder; it becomes part of this module's state dict.
        phases: number of shifted copies of the patch grid, for finer frames.
        layers: hidden layer or layers, see `Embedder.embed`.

    Raises:
        ConfigError: phases or layers are out of range.
    """

    def __init__(self, model: BestRQ2Model, phases: int = 1, layers: Layers = None) -> None:
        super().__init__()
        check_phases(phases, model.config)
        layer_indices(layers, model.config.num_hidden_layers)
        self.model = model.requires_grad_(False)
        self.phases = phases
        self.layers = layers
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
        embedder = Embedder(self.model, self.device)
        chosen: dict[str, Any] = {"phases": phases or self.phases, "layers": self.layers}
        return embedder.embed(list(clips), sampling_rate, **chosen)


def check_phases(phases: object, config: BestRQ2Config, name: str = "phases") -> None:
    """Raise a ConfigError unless a number of shifted patch grids is a whole number up to the frames of a patch."""
    most = config.patch_size[1]
    if isinstance(phases, bool) or not isinstance(phases, int) or not 1 <= phases <= most:
        raise ConfigError(f"{name} must be a whole number from 1 to {most}, got {phases!r}")
