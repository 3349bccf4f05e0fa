"""What XARES-LLM asks of an encoder, checked before days of training begin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bestrq2.errors import ConfigError

# As the benchmark's own check.
_CLIPS, _SAMPLES = 3, 50_000
_TOLERANCE = 1e-3


def check_encoder(encoder: nn.Module) -> None:
    """Pass if an encoder keeps the contract, and if padding changes none of its features.

    Args:
        encoder: called with audio float [B, S] at 16 kHz and a mask [B, S] or None; returns features [B, T, D] and
            their mask [B, T] or None.

    Raises:
        ConfigError: it does not; one sentence says in what.
    """
    width = getattr(encoder, "output_dim", None)
    if not isinstance(width, int):
        raise _broken(f"its output_dim must be a whole number, got {width!r}")
    parameters = list(encoder.parameters())
    if not parameters:
        raise _broken("it has no parameters")
    if any(parameter.requires_grad for parameter in parameters):
        raise _broken("some of its parameters would be trained; it has to be frozen")
    audio = torch.randn(_CLIPS, _SAMPLES, generator=torch.Generator().manual_seed(0)).mul(0.1)
    audio = audio.to(parameters[0].device)
    _check_output(encoder, audio, None)
    lengths = [_SAMPLES, _SAMPLES // 2, _SAMPLES // 5]
    mask = torch.arange(_SAMPLES, device=audio.device) < torch.tensor(lengths, device=audio.device)[:, None]
    features, frame_mask = _check_output(encoder, audio, mask.int())
    for clip, length in enumerate(lengths):
        alone, _ = _check_output(encoder, audio[clip : clip + 1, :length], None)
        kept = features[clip] if frame_mask is None else features[clip][frame_mask[clip].bool()]
        scale = max(1.0, float(alone.abs().max()))
        if kept.shape != alone[0].shape or float((kept - alone[0]).abs().max()) > _TOLERANCE * scale:
            raise _broken("padding changes the features of a clip")


def _check_output(encoder: nn.Module, audio: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    found = encoder(audio, mask)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise _broken("it must return features and their mask")
    features, frame_mask = found
    width = encoder.output_dim
    if features.ndim != 3 or features.shape[0] != len(audio) or features.shape[1] == 0 or features.shape[2] != width:
        raise _broken(f"features must be [{len(audio)}, frames, {width}], got {list(features.shape)}")
    if frame_mask is not None and frame_mask.shape != features.shape[:2]:
        raise _broken(f"the mask must be {list(features.shape[:2])}, got {list(frame_mask.shape)}")
    if features.requires_grad:
        raise _broken("its features carry gradients")
    if not bool(features.isfinite().all()):
        raise _broken("it returns NaN or infinite features for noise; the weights are broken")
    return features, frame_mask


def _broken(reason: str) -> ConfigError:
    return ConfigError(f"the encoder breaks the contract of XARES-LLM: {reason}")
