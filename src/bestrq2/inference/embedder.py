"""Embeddings of audio in any form and of any length, from any source of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestrq2.convert.loading import load_encoder
from bestrq2.errors import ConfigError
from bestrq2.inference.compiling import compile_blocks
from bestrq2.inference.inputs import Audio, checked_rate, mono_blocks, named_items
from bestrq2.inference.readout import (
    Layers,
    check_pooling,
    layer_indices,
    mean_frames,
    pool,
    pooled_width,
    unit_length,
)
from bestrq2.inference.windows import JoinedFrames, Window, WindowGrid, plan_batches
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# So many batches' worth of windows is read before it is sorted by length.
_BUFFERED_BATCHES = 8
# Audio that could be embedded in the time that a batch takes beside its windows: measured at base size on a CPU; a GPU
# is far quicker than the calls that start its kernels.
_BATCH_COST_SECONDS, _GPU_BATCH_COST_SECONDS = {"cpu": 1.5}, 60.0


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of B clips, as numpy arrays; rows follow the order of the input.

    Attributes:
        clip: float32 [B, D], the valid frames of each clip pooled; [B, 2 D] with pooling "mean+max".
        frames: float32 [B, T, D], zero where `frame_mask` is False.
        frame_mask: bool [B, T], True for frames that lie inside the clip.
        timestamps: float64 [B, T], seconds, the centre of each frame (NaN outside the clip).
    """

    clip: np.ndarray
    frames: np.ndarray
    frame_mask: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.clip)


@dataclass(frozen=True)
class _Piece:
    """A window, the clip it belongs to, and what its frames weigh."""

    clip: int
    window: Window
    weights: np.ndarray


class Embedder:
    """Turns audio into embeddings with a frozen encoder.

    Args:
        model: the encoder; it is put into evaluation mode.
        device: where it runs; None for CUDA where there is one, else the CPU.
        name: how results name these features.
        dtype: "bfloat16" or "float16" to run under autocast; None or "float32" for the precision of the weights. The
            spectrogram and the patch embedding stay in float32, and so do the results.
        compile: compile the encoder's blocks by `torch.compile` when they first run, once for any batch and length.
        batch_seconds: audio that goes through the model at once, padding included; less needs less memory.

    Raises:
        ConfigError: there is no such device or dtype, or `batch_seconds` is not above 0.
    """

    def __init__(
        self,
        model: BestRQ2Model,
        device: str | torch.device | None = None,
        name: str = "encoder",
        *,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        batch_seconds: float = 160.0,
    ) -> None:
        if not batch_seconds > 0:
            raise ConfigError(f"batch_seconds must be above 0, got {batch_seconds}")
        self.dtype = _checked_dtype(dtype)
        self.device = _checked_device(device)
        self.model = model.eval().to(self.device)
        self.name = name
        self.batch_seconds = batch_seconds
        if compile:
            compile_blocks(self.model)

    @property
    def config(self) -> BestRQ2Config:
        """The architecture."""
        return self.model.config

    @property
    def hop_seconds(self) -> float:
        """Seconds between frames (one phase)."""
        return self.config.frame_hop_samples / self.config.sampling_rate

    def embed(
        self,
        audio: Audio | Sequence[Audio],
        sampling_rate: float | None = None,
        phases: int = 1,
        *,
        layers: Layers = None,
        pooling: str = "mean",
        normalize: bool = False,
        overlap: float = 0.5,
    ) -> Embeddings:
        """Embed one clip or a list of clips of unequal length.

        Clips longer than the model's `max_seconds` are read and embedded in overlapping windows of that length, whose
        frames are cross-faded. Only whole patches are embedded, as in pretraining; a clip shorter than one patch is
        continued by reflection. No clip's result depends on the others.

        Args:
            audio: a waveform, the path of an audio file, a file opened in binary mode (read from its start), the bytes
                of a file, or a list of these. A waveform is a numpy array or torch tensor [samples] or
                [channels, samples], of float type in [-1, 1], or int8, int16, int32 or uint8; a list of numbers is one
                too. A batch [clips, samples] is to be given as a list, since 2-D means channels.
            sampling_rate: Hz of waveforms; None trusts that it is the model's. Files carry their own.
            phases: how often the patch grid is shifted, each time by 1/phases of the hop, to get finer frames.
            layers: a hidden layer (0 enters the first block, n leaves block n, -1 the last one, before the final norm),
                several for their mean, "mean" for that of all blocks; None for the model's output.
            pooling: how frames become the vector of a clip: "mean", "mean+max" (both, one behind the other), or
                "attention" (see `bestrq2.inference.pooling.pool`).
            normalize: scale clips and frames to Euclidean length 1, so that dot products are cosines.
            overlap: share of a window that the next one covers again, 0 to 0.5; 0 takes half the time for long clips.

        Returns:
            One row per clip, in the order of the input.

        Raises:
            AudioError: a file or waveform is unusable; it is named by its path or its place in the list.
            ConfigError: an argument is out of range.
        """
        if isinstance(phases, bool) or not isinstance(phases, int) or not 1 <= phases <= self.config.patch_size[1]:
            raise ConfigError(f"phases must be a whole number from 1 to {self.config.patch_size[1]}, got {phases!r}")
        if not isinstance(overlap, int | float) or not 0 <= overlap <= 0.5:
            raise ConfigError(f"overlap must be from 0 to 0.5, got {overlap!r}")
        check_pooling(pooling)
        hidden = layer_indices(layers, self.config.num_hidden_layers)
        rate = checked_rate(sampling_rate, self.config.sampling_rate)
        items = named_items(audio)
        grid = WindowGrid(self.config, phases, overlap)
        joined = [[JoinedFrames() for _ in range(phases)] for _ in items]
        for pieces in self._buffers(items, rate, grid):
            for piece, states in zip(pieces, self._states(pieces, hidden), strict=True):
                joined[piece.clip][piece.window.phase].add(piece.window, states, piece.weights)
        return self._assemble(joined, grid, pooling, normalize)

    @property
    def _budget(self) -> int:
        """Samples in a batch."""
        return max(1, int(self.batch_seconds * self.config.sampling_rate))

    def _buffers(self, items: list[tuple[str, Any]], rate: float, grid: WindowGrid) -> Iterator[list[_Piece]]:
        """The windows of all clips in order, a few batches' worth at a time."""
        pieces: list[_Piece] = []
        samples = 0
        for clip, (name, audio) in enumerate(items):
            for window in grid.cut(mono_blocks(name, audio, rate, self.config.sampling_rate)):
                pieces.append(_Piece(clip, window, grid.weights(window)))
                samples += len(window.waveform)
                if samples >= _BUFFERED_BATCHES * self._budget:
                    yield pieces
                    pieces, samples = [], 0
        if pieces:
            yield pieces

    def _states(self, pieces: list[_Piece], layers: list[int] | None) -> list[np.ndarray]:
        """Frames of every window, float32 [columns, D] each."""
        states: list[np.ndarray] = [np.empty(0)] * len(pieces)
        # In hops: windows that differ by less are as long as each other to the encoder, or nearly so.
        hop = self.config.frame_hop_samples
        hops = [-(-len(piece.window.waveform) // hop) for piece in pieces]
        most_padding = round(_BATCH_COST_SECONDS.get(self.device.type, _GPU_BATCH_COST_SECONDS) / self.hop_seconds)
        for batch in plan_batches(hops, max(1, self._budget // hop), most_padding):
            frames = self._run([pieces[index].window.waveform for index in batch], layers)
            for index, clip in zip(batch, frames, strict=True):
                # A copy, so that a short clip does not keep its whole batch in memory.
                states[index] = clip[: pieces[index].window.columns].copy()
        return states

    @torch.inference_mode()
    def _run(self, waveforms: list[np.ndarray], layers: list[int] | None) -> np.ndarray:
        """One batch through the model: float32 [B, T', D]."""
        lengths = [len(waveform) for waveform in waveforms]
        padded = np.zeros((len(waveforms), max(lengths)), dtype=np.float32)
        for row, waveform in zip(padded, waveforms, strict=True):
            row[: len(waveform)] = waveform
        mask = None
        if len(set(lengths)) > 1:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with autocast:
            batch = torch.from_numpy(padded).to(self.device)
            output = self.model(batch, mask, output_hidden_states=layers is not None)
        if layers is None:
            return output.last_hidden_state.float().cpu().numpy()
        return mean_frames(output.hidden_states, layers, self.config.patch_rows).cpu().numpy()

    def _assemble(
        self, joined: list[list[JoinedFrames]], grid: WindowGrid, pooling: str, normalize: bool
    ) -> Embeddings:
        """Frames of all phases of each clip, in order of time, padded to one array."""
        config = self.config
        counts = [sum(track.count for track in tracks) for tracks in joined]
        # Zeros that are never touched take no memory, so one long clip among short ones costs little.
        frames = np.zeros((len(joined), max(counts), config.hidden_size), dtype=np.float32)
        clip = np.empty((len(joined), pooled_width(config.hidden_size, pooling)), dtype=np.float32)
        for index, (tracks, count) in enumerate(zip(joined, counts, strict=True)):
            own = frames[index, :count]
            for phase, track in enumerate(tracks):
                # Grids begin one after the other, so the last columns are missing in the last grids at most.
                track.move_to(own[phase :: len(tracks)])
            clip[index] = pool(own, pooling)
            if normalize:
                unit_length(own)
        if normalize:
            unit_length(clip)
        columns, phases = np.divmod(np.arange(frames.shape[1]), len(grid.offsets))
        starts = np.asarray(grid.offsets)[phases] / config.sampling_rate
        moments = starts + (columns + 0.5) * self.hop_seconds
        frame_mask = np.arange(frames.shape[1]) < np.asarray(counts)[:, None]
        return Embeddings(clip, frames, frame_mask, np.where(frame_mask, moments, np.nan))


def _checked_device(device: str | torch.device | None) -> torch.device:
    """Where the encoder runs: CUDA where there is one, unless told otherwise."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The precision in which the encoder runs."""
    known = torch.float32 if dtype is None else _DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return known


def weights_hash(embedder: Embedder) -> str:
    """SHA-256 over names and values of all tensors: the identity of an encoder, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(embedder.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    batch_seconds: float = 160.0,
) -> Embedder:
    """Load an encoder for embedding.

    Args:
        source: a run folder of `bestrq2 pretrain`, an exported model folder, a reference checkpoint (`.ckpt` or
            `.safetensors` with its configuration beside it as `.json` or `.yaml` of the same name), a recipe or a YAML
            file that extends one (random weights from seed 0), or a hub id.
        device: such as "cpu" or "cuda:0"; None for CUDA where there is one, else the CPU.
        dtype: "bfloat16" or "float16" to run under autocast, None for the precision of the weights.
        compile: compile the encoder's blocks by `torch.compile` when they first run.
        batch_seconds: audio that goes through the model at once, padding included; less needs less memory.

    Raises:
        CheckpointError: if there is nothing of the kind, or the weights are damaged or of another architecture.
        ConfigError: if another argument is out of range.
    """
    encoder = load_encoder(source)
    name = Path(source).name or str(source)
    return Embedder(encoder, device, name=name, dtype=dtype, compile=compile, batch_seconds=batch_seconds)
