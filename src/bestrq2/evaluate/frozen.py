"""Frozen encoder as a torch module, for benchmark harnesses that move, train and save modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bestrq2.errors import ConfigError
from bestrq2.inference.embedder import Embedder, Embeddings
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
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


def check_phases(phases: object, config: BestRQ2Config, name: str = "phases") -> None:
    """Raise a ConfigError unless a number of shifted patch grids is a whole number up to the frames of a patch."""
    most = config.patch_size[1]
    if isinstance(phases, bool) or not isinstance(phases, int) or not 1 <= phases <= most:
        raise ConfigError(f"{name} must be a whole number from 1 to {most}, got {phases!r}")
