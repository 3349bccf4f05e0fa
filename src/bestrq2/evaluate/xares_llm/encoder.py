"""Encoder by the contract of XARES-LLM (github.com/xiaomi-research/xares-llm), and the check of that contract.

The benchmark imports this module in its own environment, where transformers may have another major version; so weights
are read directly and not by `from_pretrained`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bestrq2.convert.readout import set_readout
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.frozen import FrozenEncoder
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.waveforms import LARGEST_SAMPLE

SAMPLING_RATE = 16_000

# As in the benchmark's own check.
_CLIPS, _SAMPLES = 3, 50_000
_TOLERANCE = 1e-3


class BestRQ2Encoder(FrozenEncoder):
    """Module from audio and its mask to frames and their mask.

    Args:
        folder: folder written by `bestrq2 xares-llm` or `bestrq2 export`, with config.json and model.safetensors.
        phases: number of shifted copies of the patch grid, for finer frames; 2 as in the authors' exports.
        layers: hidden layer instead of the output, see `Embedder.embed`.

    Raises:
        CheckpointError: the folder holds no such encoder.
        ConfigError: another argument is out of range.
    """

    def __init__(self, folder: str, phases: int = 2, layers: int | None = None) -> None:
        model = read_encoder(folder)
        set_readout(model, layers)
        super().__init__(model, phases)
        self.output_dim = self.frame_width

    def forward(self, audio: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed a batch; masked samples do not change the features.

        Samples that are not finite count as silence and far too large ones are limited, so that one broken clip does
        not end days of training.

        Args:
            audio: waveforms at 16 kHz, float [B, S].
            mask: 1 for samples of the clip, 0 for padding on the right, [B, S]; None for no padding.

        Returns:
            Features float32 [B, T, D], zero after the end of a clip, and their mask int64 [B, T], 1 = keep.

        Raises:
            ValueError: a shape is wrong.
        """
        if audio.ndim != 2 or audio.shape[1] == 0 or not audio.is_floating_point():
            raise ValueError(f"audio must be floats [clips, samples], got {audio.dtype} of shape {tuple(audio.shape)}")
        lengths = _lengths(audio, mask)
        clean = torch.nan_to_num(audio.detach().float(), 0.0, 0.0, 0.0).clamp(-LARGEST_SAMPLE, LARGEST_SAMPLE).cpu()
        found = self.embed([clip[:length] for clip, length in zip(clean, lengths, strict=True)], SAMPLING_RATE)
        features = torch.from_numpy(found.frames).to(audio.device)
        return features, torch.from_numpy(found.frame_mask).to(audio.device, torch.int64)


class _Plain(BestRQ2Model):
    """The encoder without a declaration on buffers that transformers 4 applies to parameters, and refuses."""

    _keep_in_fp32_modules_strict = None  # type: ignore[assignment]


def _lengths(audio: Tensor, mask: Tensor | None) -> list[int]:
    """Number of samples of every clip, at least one."""
    if mask is None:
        return [audio.shape[1]] * len(audio)
    if mask.shape != audio.shape:
        raise ValueError(f"the mask must have the shape of the audio {tuple(audio.shape)}, got {tuple(mask.shape)}")
    places = torch.arange(1, audio.shape[1] + 1, device=mask.device)
    lengths: list[int] = (places * (mask > 0)).amax(dim=1).clamp_min(1).tolist()
    return lengths


def read_encoder(folder: str | os.PathLike[str]) -> BestRQ2Model:
    """Read the encoder in a folder; without its values where modules are built on the meta device.

    Raises:
        CheckpointError: there is none, or its weights do not fit.
    """
    place = Path(folder)
    try:
        settings = json.loads((place / "config.json").read_text(encoding="utf-8"))
        model = _Plain(BestRQ2Config.from_dict(settings))
        if not next(model.parameters()).is_meta:  # on meta, the benchmark fills in its checkpoint
            model.load_state_dict(load_file(place / "model.safetensors"))
    except Exception as error:  # foreign settings and bytes raise any kind of error
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{place}: holds no encoder ({reason}); name a folder written by `bestrq2 xares-llm` or `bestrq2 export`"
        ) from error
    return model


def check_contract(encoder: BestRQ2Encoder) -> None:
    """Check on noise that features are finite, and that padding does not change them.

    Raises:
        ConfigError: they are not; the weights are broken.
    """
    audio = torch.randn(_CLIPS, _SAMPLES, generator=torch.Generator().manual_seed(0)).mul(0.1).to(encoder.device)
    lengths = [_SAMPLES, _SAMPLES // 2, _SAMPLES // 5]
    mask = torch.arange(_SAMPLES, device=encoder.device) < torch.tensor(lengths, device=encoder.device)[:, None]
    features, frame_mask = encoder(audio, mask)
    if not bool(features.isfinite().all()):
        raise ConfigError("the encoder returns NaN or infinite features for noise; its weights are broken")
    for clip, length in enumerate(lengths):
        alone, _ = encoder(audio[clip : clip + 1, :length])
        kept = features[clip][frame_mask[clip].bool()]
        scale = max(1.0, float(alone.abs().max()))
        if kept.shape != alone[0].shape or float((kept - alone[0]).abs().max()) > _TOLERANCE * scale:
            raise ConfigError("padding changes the features of a clip, so the encoder breaks the contract of XARES-LLM")
