"""An encoder as the harness of X-ARES wants it (github.com/jimbozhang/xares)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bestrq2.errors import CheckpointError
from bestrq2.evaluate.frozen import FrozenEncoder
from bestrq2.inference.readout import Layers
from bestrq2.model.modeling_bestrq2 import BestRQ2Model


class XaresEncoder(FrozenEncoder):
    """[B, samples] → [B, frames, D], of any length: what is longer than the model's clips goes through it in windows.

    The harness pads the clips of a batch with zeros and does not tell their lengths. For clip-level tasks zeros at the
    end of a row are therefore left out, and frames that only fill up the batch hold the clip's mean, so that the mean
    over all frames, which the harness takes, is that of the audio alone. For frame-level tasks nothing is left out (the
    harness is told to make batches of one clip), and the frames are put in the order and place in time that its labels
    assume: frame i lies between i and i + 1 hops.

    Args:
        model: the encoder.
        phases: shifted copies of the patch grid; the hop becomes so many times smaller.
        frame_level: whether frames or their mean is what counts.
        layers: hidden layer or layers, see `Embedder.embed`.
        on_batch: is told how many clips a batch had, once it is done.
    """

    def __init__(
        self,
        model: BestRQ2Model,
        phases: int = 1,
        frame_level: bool = False,
        layers: Layers = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(model, phases, layers)
        config = model.config
        self.sampling_rate, self.output_dim = config.sampling_rate, config.hidden_size
        self.hop_size_in_ms = 1000 * config.frame_hop_samples / config.sampling_rate / phases
        self._frame_level, self._on_batch = frame_level, on_batch

    def forward(self, audio: Tensor) -> Tensor:
        """Audio float [B, samples] to frames float32 [B, frames, D] on the same device.

        Raises:
            CheckpointError: the model gives values that are not finite.
            AudioError: samples are not finite or far above full scale.
        """
        rows = list(audio.detach().cpu())
        if not self._frame_level:
            shortest = self.model.config.frame_hop_samples
            rows = [without_padding(row, shortest) for row in rows]
        found = self.embed(rows, self.sampling_rate)
        broken = int((~np.isfinite(found.clip).all(axis=1)).sum())
        if broken:
            raise CheckpointError(
                f"the encoder gives NaN or infinite values for {broken} of {len(rows)} clips of a batch; look at the "
                "loss of its training, or take an earlier checkpoint"
            )
        if self._on_batch is not None:
            self._on_batch(len(rows))
        if self._frame_level:
            frames = found.frames[:, _on_time(found.frames.shape[1], self.phases)]
        else:
            frames = np.where(found.frame_mask[..., None], found.frames, found.clip[:, None])
        return torch.from_numpy(frames).to(audio.device)


def without_padding(row: Tensor, shortest: int) -> Tensor:
    """A row [samples] without the zeros at its end, `shortest` samples at least; all of it if all is zero."""
    sounding = row.nonzero()
    if len(sounding) == 0:
        return row
    return row[: max(int(sounding[-1, 0]) + 1, shortest)]


def _on_time(count: int, phases: int) -> np.ndarray:
    """Which of `count` interleaved frames stands at each place of the time axis, so that frame i covers hop i.

    A frame of the first grid covers `phases` hops and stands in their middle; the ends are filled by their neighbours.
    """
    places = np.arange(-(-count // phases) * phases) - (phases - 1) // 2
    return places.clip(0, count - 1)


def encoder_class(identity: str) -> type[XaresEncoder]:
    """A class of its own for every model: the harness files its results under the name of the encoder's class."""
    return type(f"BestRQ2_{identity}_Encoder", (XaresEncoder,), {})
