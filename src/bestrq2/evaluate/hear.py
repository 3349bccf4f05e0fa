"""The HEAR 2021 API, for `hear-validator` and `heareval`: https://hearbenchmark.com/hear-api.html.

Embeddings at timestamps come from shifted grids of patches ("phases"), enough of them that a timestamp comes at least
every `hop_ms`. The audio is continued by reflection by half a patch at both ends, so that timestamps begin at 0 and
reach the end, and each is the centre of what its embedding sees.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from bestrq2.convert.loading import load_encoder
from bestrq2.errors import AudioError, ConfigError
from bestrq2.evaluate.frozen import FrozenEncoder
from bestrq2.model.log_mel import reflect_index
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

SAMPLE_RATES = (16_000, 22_050, 32_000, 44_100, 48_000)
"""Sampling rates of the benchmark's audio in Hz; a model has to take one of them."""

HOP_MS = 50.0
"""The specification suggests at most this, for the onset tolerance of 50 ms in music transcription."""

MODEL_VARIABLE, HOP_VARIABLE = "BESTRQ2_HEAR_MODEL", "BESTRQ2_HEAR_HOP_MS"


class HearModel(FrozenEncoder):
    """Encoder with the attributes of the HEAR API.

    Args:
        model: the encoder; its readout gives scenes and timestamps.
        hop_ms: largest distance of timestamps in ms; the cost is hop / hop_ms runs of the encoder.

    Attributes:
        sample_rate: sampling rate of the audio it takes, in Hz.
        scene_embedding_size: width of a scene embedding.
        timestamp_embedding_size: width of a timestamp embedding.

    Raises:
        ConfigError: `hop_ms` is shorter than a spectrogram frame.
    """

    def __init__(self, model: BestRQ2Model, hop_ms: float = HOP_MS) -> None:
        config = model.config
        seconds = config.frame_hop_samples / config.sampling_rate
        finest = 1000 * seconds / config.patch_size[1]
        if not finest <= hop_ms < math.inf:
            raise ConfigError(f"hop_ms must be at least {finest:g} ms, a spectrogram frame of this model, got {hop_ms}")
        super().__init__(model, phases=math.ceil(1000 * seconds / hop_ms - 1e-9))
        self.frame_seconds = seconds
        self.sample_rate = next((rate for rate in SAMPLE_RATES if rate >= config.sampling_rate), SAMPLE_RATES[-1])
        self.scene_embedding_size, self.timestamp_embedding_size = self.clip_width, self.frame_width


def load_model(model_file_path: str = "", hop_ms: float | None = None) -> HearModel:
    """Load an encoder for HEAR, on the CPU; the harness moves it.

    Args:
        model_file_path: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub
            id; "" for $BESTRQ2_HEAR_MODEL.
        hop_ms: largest distance of timestamps in ms; None for $BESTRQ2_HEAR_HOP_MS, or 50.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: no model is named, or `hop_ms` is out of range.
    """
    source = model_file_path or os.environ.get(MODEL_VARIABLE, "")
    if not source:
        raise ConfigError(f"no model is named: give load_model (option --model) a path, or set {MODEL_VARIABLE}")
    chosen = os.environ.get(HOP_VARIABLE, HOP_MS) if hop_ms is None else hop_ms
    try:
        hop = float(chosen)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"hop_ms ({HOP_VARIABLE}) must be a number of milliseconds, got {chosen!r}") from error
    return HearModel(load_encoder(source), hop)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Embed every sound to one vector, by default the mean over its frames.

    Args:
        audio: float [n_sounds, n_samples], mono at `model.sample_rate`, in [-1, 1].
        model: encoder from `load_model`.

    Returns:
        float32 [n_sounds, scene_embedding_size], on the device of the audio.

    Raises:
        AudioError: the audio has another shape, or samples that are not finite.
    """
    sounds = _checked(audio)
    return torch.from_numpy(model.embed(list(sounds), model.sample_rate, phases=1).clip).to(audio.device)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embed every sound at regular times; each embedding is centred on its timestamp.

    Args:
        audio: float [n_sounds, n_samples], mono at `model.sample_rate`, in [-1, 1].
        model: encoder from `load_model`.

    Returns:
        Embeddings float32 [n_sounds, n_timestamps, timestamp_embedding_size], and timestamps float32
        [n_sounds, n_timestamps] in ms from the start of the audio, on the device of the audio.

    Raises:
        AudioError: the audio has another shape, or samples that are not finite.
    """
    sounds = _checked(audio)
    samples = sounds.shape[1]
    reach = int(model.frame_seconds * model.sample_rate / 2)
    positions = torch.arange(-reach, samples + reach, device=audio.device)
    found = model.embed(list(sounds[:, reflect_index(positions, samples)]), model.sample_rate)
    seconds = torch.from_numpy(found.timestamps[0]) - reach / model.sample_rate
    inside = (seconds >= 0) & (seconds <= samples / model.sample_rate)
    embeddings = torch.from_numpy(found.frames)[:, inside].to(audio.device)
    timestamps = (1000 * seconds[inside]).float().repeat(len(sounds), 1)
    return embeddings, timestamps.to(audio.device)


def _checked(audio: Tensor) -> Tensor:
    """Return the audio as float32 if it follows the specification."""
    if not isinstance(audio, Tensor) or audio.ndim != 2 or 0 in audio.shape or not audio.is_floating_point():
        shape = f"{tuple(audio.shape)} of {audio.dtype}" if isinstance(audio, Tensor) else type(audio).__name__
        raise AudioError(f"audio must be a float tensor [n_sounds, n_samples] with at least one sample, got {shape}")
    return audio.detach().float()
