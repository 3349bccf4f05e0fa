"""Encoder for the harness of X-ARES (github.com/jimbozhang/xares), and the identity that its scores are kept under."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.frozen import FrozenEncoder
from bestrq2.evaluate.provenance import encoder_identity
from bestrq2.evaluate.xares.tasks import INSTALL
from bestrq2.inference.embedder import Embedder, check_phases
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.readout import Readout


class XaresEncoder(FrozenEncoder):
    """Audio [B, samples] of any length to frames [B, frames, D]; audio longer than the model's clips is windowed.

    The harness pads the clips of a batch with zeros and does not pass on their lengths. For clip-level tasks zeros at
    the end of a row are therefore left out, and frames that only fill the batch hold the clip's mean, so that the mean
    over all frames, which the harness takes, is that of the audio alone; with another pooling than the mean, a clip is
    one frame. For frame-level tasks nothing is left out (batches hold one clip), and frames are placed in time as the
    labels assume: frame i is between i and i + 1 hops.

    With `chunks`, frames are those of the fork of X-ARES by the author of BEST-RQ-2 (github.com/LudovicTuncay/xares):
    padding is embedded as sound, and a last chunk of less than a second is padded to one and keeps its share of the
    frames.

    Args:
        model: the encoder, with its readout.
        phases: number of shifted copies of the patch grid, which divides the hop.
        frame_level: whether the task uses single frames; otherwise it uses their mean.
        chunks: embed chunks of the model's `max_seconds` without overlap, padding included.
        on_batch: called with the number of clips of each finished batch.
    """

    def __init__(
        self,
        model: BestRQ2Model,
        phases: int = 1,
        frame_level: bool = False,
        chunks: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(model, phases)
        config = model.config
        self.sampling_rate, self.output_dim = config.sampling_rate, self.frame_width
        self._pools = not frame_level and model.readout.pooling != "mean"
        if self._pools:
            self.output_dim = self.clip_width
        self.hop_size_in_ms = 1000 * config.frame_hop_samples / config.sampling_rate / phases
        self._frame_level, self._in_chunks, self._on_batch = frame_level, chunks, on_batch

    def forward(self, audio: Tensor) -> Tensor:
        """Audio float [B, samples] to frames float32 [B, frames, D] on the same device.

        Raises:
            CheckpointError: the model gives values that are not finite.
            AudioError: samples are not finite or far above full scale.
        """
        waves = audio.detach().cpu()
        frames = self._chunks(waves) if self._in_chunks else self._windows(waves)
        broken = int((~np.isfinite(frames).all(axis=(1, 2))).sum())
        if broken:
            raise CheckpointError(
                f"the encoder gives NaN or infinite values for {broken} of {len(frames)} clips of a batch; look at the "
                "loss of its training, or take an earlier checkpoint"
            )
        if self._on_batch is not None:
            self._on_batch(len(frames))
        return torch.from_numpy(frames).to(audio.device)

    def _windows(self, waves: Tensor) -> np.ndarray:
        if self._frame_level:
            frames = self.embed(list(waves), self.sampling_rate).frames
            return frames[:, _on_time(frames.shape[1], self.phases)]
        shortest = self.model.config.frame_hop_samples
        found = self.embed([without_padding(row, shortest) for row in waves], self.sampling_rate)
        if self._pools:
            return found.clip[:, None]
        return np.where(found.frame_mask[..., None], found.frames, found.clip[:, None])

    def _chunks(self, waves: Tensor) -> np.ndarray:
        second, longest = self.sampling_rate, self.model.config.max_samples
        parts = []
        for chunk in waves.split(longest, dim=1):
            missing = max(0, second - chunk.shape[1]) if waves.shape[1] > longest else 0
            frames = self.embed(list(nn.functional.pad(chunk, (0, missing))), self.sampling_rate).frames
            if missing:
                frames = frames[:, : max(1, int(frames.shape[1] * chunk.shape[1] / second))]
            parts.append(frames)
        return np.concatenate(parts, axis=1)


def without_padding(row: Tensor, shortest: int) -> Tensor:
    """Cut the zeros at the end of a row [samples] down to `shortest` samples; a row of zeros stays as it is."""
    sounding = row.nonzero()
    if len(sounding) == 0:
        return row
    return row[: max(int(sounding[-1, 0]) + 1, shortest)]


def _on_time(count: int, phases: int) -> np.ndarray:
    """Indices into `count` interleaved frames under which frame i covers hop i.

    A frame of the first grid covers `phases` hops and belongs to their middle; the ends repeat their neighbours.
    """
    places = np.arange(-(-count // phases) * phases) - (phases - 1) // 2
    return places.clip(0, count - 1)


def encoder_class(identity: str) -> type[XaresEncoder]:
    """A separate class for every model: the harness files its results under the name of the encoder's class."""
    return type(f"BestRQ2_{identity}_Encoder", (XaresEncoder,), {})


@dataclass(frozen=True)
class Extraction:
    """Options for extracting frames.

    Attributes:
        phases: number of shifted copies of the patch grid for frame-level tasks.
        clip_phases: number of shifted copies of the patch grid for clip-level tasks.
        chunks: embed chunks without overlap, padding included; see `XaresEncoder`.
    """

    phases: int = 2
    clip_phases: int = 1
    chunks: bool = False

    def check(self, config: BestRQ2Config) -> None:
        """Raise a ConfigError that names the option if the model does not allow it."""
        for name in ("phases", "clip_phases"):
            check_phases(getattr(self, name), config, name)
            if self.chunks and getattr(self, name) != 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but chunks have one phase; leave it out")
        if self.chunks and Readout.of(config).pooling != "mean":
            raise ConfigError("pooling must be mean in chunks, whose frames the harness averages; leave it out")


def harness_version() -> str:
    """Version of the installed harness.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.metadata.version("xares")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(INSTALL) from error


def model_identity(embedder: Embedder, extraction: Extraction) -> dict[str, str]:
    """Everything that frames depend on, as texts: weights, architecture, options, and versions of the code.

    Raises:
        ConfigError: the harness is not installed.
    """
    options = {name: str(value) for name, value in asdict(extraction).items()}
    return {**encoder_identity(embedder), **options, "xares": harness_version()}
