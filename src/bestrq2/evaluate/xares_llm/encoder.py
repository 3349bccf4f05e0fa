"""The encoder by the contract of XARES-LLM (github.com/xiaomi-research/xares-llm).

The benchmark imports this module in its own environment, where transformers may be of another major version; so the
weights are read directly and not by `from_pretrained`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bestrq2.convert.weights import quiet_hub
from bestrq2.errors import CheckpointError
from bestrq2.evaluate.frozen import FrozenEncoder
from bestrq2.inference.inputs import LOUDEST
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

SAMPLING_RATE = 16_000


class BestRQ2Encoder(FrozenEncoder):
    """Audio and its mask in, frames and their mask out.

    Args:
        folder: encoder as written by `bestrq2 xares-llm`, or by `bestrq2 export`: config.json and model.safetensors.
        phases: how often the patch grid is shifted, for finer frames; 2 as the authors' exports do.
        layers: a hidden layer instead of the output, see `Embedder.embed`.

    Raises:
        CheckpointError: the folder holds no such encoder.
        ConfigError: another argument is out of range.
    """

    def __init__(self, folder: str, phases: int = 2, layers: int | None = None) -> None:
        super().__init__(read_encoder(folder), phases, layers)
        self.output_dim = self.model.config.hidden_size

    def forward(self, audio: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed a batch; what the mask hides changes nothing.

        Samples that are not finite count as silence, so that one broken clip does not end days of training.

        Args:
            audio: float [B, S] at 16 kHz.
            mask: [B, S], 1 for samples of the clip, 0 for padding on the right; None for none.

        Returns:
            Features float32 [B, T, D], zero behind the end of a clip, and their mask int64 [B, T], 1 = keep.

        Raises:
            ValueError: a shape is wrong.
        """
        if audio.ndim != 2 or audio.shape[1] == 0:
            raise ValueError(f"audio must be [clips, samples], got shape {tuple(audio.shape)}")
        lengths = _lengths(audio, mask)
        clean = torch.nan_to_num(audio.detach().float(), 0.0, 0.0, 0.0).clamp(-LOUDEST, LOUDEST).cpu()
        found = self.embed([clip[:length] for clip, length in zip(clean, lengths, strict=True)], SAMPLING_RATE)
        features = torch.from_numpy(found.frames).to(audio.device)
        return features, torch.from_numpy(found.frame_mask).to(audio.device, torch.int64)


class _Plain(BestRQ2Model):
    """The encoder without a promise on buffers that transformers 4 takes for one on parameters, and refuses."""

    _keep_in_fp32_modules_strict = None  # type: ignore[assignment]


def _lengths(audio: Tensor, mask: Tensor | None) -> list[int]:
    """Samples of every clip, at least one."""
    if mask is None:
        return [audio.shape[1]] * len(audio)
    if mask.shape != audio.shape:
        raise ValueError(f"the mask must have the shape of the audio {tuple(audio.shape)}, got {tuple(mask.shape)}")
    places = torch.arange(1, audio.shape[1] + 1, device=mask.device)
    lengths: list[int] = (places * (mask > 0)).amax(dim=1).clamp_min(1).tolist()
    return lengths


def write_encoder(model: BestRQ2Model, folder: Path) -> None:
    """Write an encoder so that `BestRQ2Encoder` reads it: config.json and model.safetensors."""
    with quiet_hub():
        model.save_pretrained(folder)


def read_encoder(folder: str | os.PathLike[str]) -> BestRQ2Model:
    """The encoder in a folder; without its values where modules are being built on the meta device.

    Raises:
        CheckpointError: there is none, or its weights do not fit.
    """
    place = Path(folder)
    try:
        settings = json.loads((place / "config.json").read_text(encoding="utf-8"))
        model = _Plain(BestRQ2Config.from_dict(settings))
        if not next(model.parameters()).is_meta:  # else the benchmark fills in the values of its own checkpoint
            model.load_state_dict(load_file(place / "model.safetensors"))
    except Exception as error:  # foreign settings and bytes make readers stumble in any way there is
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{place}: holds no encoder ({reason}); name a folder written by `bestrq2 xares-llm` or `bestrq2 export`"
        ) from error
    return model
