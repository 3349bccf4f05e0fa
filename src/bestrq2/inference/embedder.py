"""Embedder: a frozen encoder that turns audio of any form and length into vectors."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bestrq2.convert.loading import load_encoder
from bestrq2.convert.numpy_front_end import pool
from bestrq2.convert.readout import choose_readout
from bestrq2.convert.shipped import ENCODERS
from bestrq2.convert.weights import first_line
from bestrq2.errors import ConfigError
from bestrq2.inference.compiling import BLOCKS, compile_parts
from bestrq2.inference.inputs import Audio, checked_rate, chunk_blocks, mono_blocks, named_items
from bestrq2.inference.windows import (
    JoinedFrames,
    Window,
    WindowCutter,
    WindowGrid,
    packed,
    padded,
    plan_batches,
    plan_rows,
)
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.readout import Layers, Readout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Batches of windows that are read before they are sorted by length.
_BUFFERED_BATCHES = 8
# Overhead of a batch, as seconds of audio embedded in the same time: measured at base size on a CPU; on a GPU the calls
# that start its kernels take far longer than the kernels.
_BATCH_COST_SECONDS, _GPU_BATCH_COST_SECONDS = {"cpu": 1.5}, 60.0


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of B clips, as numpy arrays; rows follow the order of the input.

    Attributes:
        clip: float32 [B, D], the pooled valid frames of each clip; wider than frames with a pooling such as "mean+std".
        frames: float32 [B, T, D], zero where `frame_mask` is False.
        frame_mask: bool [B, T], True for frames inside the clip.
        timestamps: float64 [B, T], centre of each frame in seconds (NaN outside the clip).
    """

    clip: np.ndarray
    frames: np.ndarray
    frame_mask: np.ndarray
    timestamps: np.ndarray

    def __repr__(self) -> str:
        return f"Embeddings(clip {list(self.clip.shape)}, frames {list(self.frames.shape)})"

    def __len__(self) -> int:
        return len(self.clip)


class Frames(NamedTuple):
    """Consecutive frames of a stream, as numpy arrays.

    Attributes:
        frames: float32 [T, D].
        timestamps: float64 [T], centre of each frame in seconds from the start of the stream.
    """

    frames: np.ndarray
    timestamps: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """A window with the index of its clip and the weights of its frames in the cross-fade."""

    clip: int
    window: Window
    weights: np.ndarray


class Embedder:
    """Frozen encoder that embeds audio.

    Args:
        model: the encoder; it is put into evaluation mode.
        device: device to run on; None for CUDA if available, else the CPU.
        name: name of the features in results.
        dtype: "bfloat16" or "float16" to run under autocast; None or "float32" for the precision of the weights.
            Spectrogram, patch embedding and results are float32 in any case.
        compile: compile the encoder's blocks by `torch.compile` when they first run, once for all batch sizes and
            lengths.
        batch_seconds: audio that goes through the model at once, padding included; less needs less memory.

    Raises:
        ConfigError: unknown device, a dtype other than that of 16-bit weights, or `batch_seconds` is not above 0.
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
        if not isinstance(batch_seconds, int | float) or not 0 < batch_seconds < math.inf:
            raise ConfigError(f"batch_seconds must be a number above 0, got {batch_seconds!r}")
        self.dtype = _checked_dtype(dtype)
        if {self.dtype, model.dtype} == {torch.bfloat16, torch.float16}:  # autocast leaves norms in that of the weights
            raise ConfigError(
                f"dtype is {dtype}, but the weights are {model.dtype}; leave it out, or load them as float32"
            )
        self.device = checked_device(device)
        self.model = model.eval().to(self.device)
        self.name = name
        self.batch_seconds = batch_seconds
        if compile:
            compile_parts(self.model, BLOCKS)

    @property
    def config(self) -> BestRQ2Config:
        """The architecture."""
        return self.model.config

    @property
    def hop_seconds(self) -> float:
        """Seconds between frames (one phase)."""
        return self.config.frame_hop_samples / self.config.sampling_rate

    @property
    def latency_seconds(self) -> float:
        """Seconds of audio after the centre of a frame that `stream` needs before the frame is final."""
        config = self.config
        # The last window is full and ends with the clip: it covers a frame unless as many columns follow it.
        columns = config.columns(config.max_samples)
        return ((columns + 0.5) * config.frame_hop_samples - config.hop_length) / config.sampling_rate

    def __repr__(self) -> str:
        return (
            f"Embedder({self.name!r}, {self.device}, {self.model.readout.frame_width(self.config)} values per frame, "
            f"{1 / self.hop_seconds:.4g} frames per second)"
        )

    def embed(
        self,
        audio: Audio | Sequence[Audio],
        sampling_rate: float | None = None,
        phases: int = 1,
        *,
        layers: Layers | None = None,
        frequency: str | None = None,
        pooling: str | None = None,
        normalize: bool = False,
        overlap: float = 0.5,
    ) -> Embeddings:
        """Embed one clip or a list of clips of unequal length.

        Frames and clips are made of what `layers`, `frequency` and `pooling` say; None stands for the model's own
        readout, which is "output", "mean" and "mean" unless it was exported with another one (see `Readout`).

        Clips longer than the model's `max_seconds` are read and embedded in overlapping windows of that length, whose
        frames are cross-faded. Only whole patches are embedded, as in pretraining; a clip shorter than one patch is
        extended by reflection. The result of a clip does not depend on the other clips.

        Args:
            audio: a waveform, the path of an audio file, a file opened in binary mode (read from its start), the bytes
                of a file, a dictionary of `datasets` ("array" and "sampling_rate", or "bytes" or "path"), or a list of
                these. A waveform is a numpy array or torch tensor [samples] or [channels, samples], of float type in
                [-1, 1], or int8, int16, int32 or uint8, or a list of floats.
                Pass a batch [clips, samples] as a list, because 2-D means channels.
            sampling_rate: rate of waveforms in Hz; None for the model's. Files and dictionaries carry their own.
            phases: number of shifted copies of the patch grid, each by 1/phases of the hop, for finer frames.
            layers: "output" of the encoder, a hidden layer (0 is the input of the first block, n the output of block n,
                -1 the output of the last block before the final norm), "mean" of all blocks, or several layers:
                averaged as a list or "3,6", with weights "3:0.2,6:0.8", or concatenated "3+6".
            frequency: what a frame holds of the rows of patches along frequency: their "mean", or "concat", all of them
                one after the other.
            pooling: what a clip holds of its frames: "mean", "std", "max", "quarters" (means of the four quarters of
                the clip), "attention", or several concatenated, such as "mean+std".
            normalize: scale clips and frames to Euclidean length 1, so that dot products are cosines.
            overlap: share of a window that the next one covers again, 0 to 0.5; 0 takes half the time for long clips.

        Returns:
            One row per clip, in the order of the input.

        Raises:
            AudioError: a file or waveform is unusable; named by its path or its place in the list.
            ConfigError: an argument is out of range.
        """
        readout = self.check_options(phases, layers, frequency, pooling, normalize, overlap)
        rate = checked_rate(sampling_rate, self.config.sampling_rate)
        items = named_items(audio)
        grid = WindowGrid(self.config, phases, overlap)
        joined = [[JoinedFrames() for _ in range(phases)] for _ in items]
        for pieces in self._buffers(items, rate, grid):
            for piece, states in zip(pieces, self._states(pieces, readout), strict=True):
                joined[piece.clip][piece.window.phase].add(piece.window, states, piece.weights)
        return self._assemble(joined, grid, readout, normalize)

    def stream(
        self,
        chunks: Iterable[Audio],
        sampling_rate: float | None = None,
        phases: int = 1,
        *,
        layers: Layers | None = None,
        frequency: str | None = None,
        normalize: bool = False,
        overlap: float = 0.5,
    ) -> Iterator[Frames]:
        """Embed audio that arrives in chunks, such as from a microphone or a socket, in constant memory.

        The frames are those of `embed` for the whole, within 1e-5. They come in order, each as soon as it is final:
        when `latency_seconds` of audio after its centre have arrived, about the `max_seconds` of the model, because a
        window may cover it until then. At the end of the chunks all frames are final. Resampling adds up to 0.12 s,
        and the model the time that it takes for a window.

        Args:
            chunks: waveforms [samples] or [channels, samples], arrays or tensors of the types that `embed` takes, each
                of any length, even 0. The first chunk sets the number of channels, and needs at least as many samples.
                The same array may be filled again for every chunk.
            sampling_rate: rate of the chunks in Hz; None for the model's.
            phases: number of shifted copies of the patch grid, as in `embed`.
            layers: layers that frames are made of, as in `embed`.
            frequency: "mean" or "concat" of the rows of patches, as in `embed`.
            normalize: scale frames to Euclidean length 1.
            overlap: share of a window that the next one covers again, 0 to 0.5; it does not change the latency.

        Returns:
            Frames that became final, whenever a chunk makes some final, and the last ones after the end of the chunks.

        Raises:
            AudioError: a chunk is unusable, named by its place, or no chunk has samples; raised by the iterator.
            ConfigError: an argument is out of range.
        """
        readout = self.check_options(phases, layers, frequency, None, normalize, overlap)
        rate = checked_rate(sampling_rate, self.config.sampling_rate)
        grid = WindowGrid(self.config, phases, overlap)
        return self._stream(chunk_blocks(chunks, rate, self.config.sampling_rate), grid, readout, normalize)

    def _stream(
        self, blocks: Iterator[np.ndarray], grid: WindowGrid, readout: Readout, normalize: bool
    ) -> Iterator[Frames]:
        cutter, given = WindowCutter(grid), 0
        tracks = [JoinedFrames() for _ in grid.offsets]
        for windows in _cut(cutter, blocks):
            pieces = [_Piece(0, window, grid.weights(window)) for window in windows]
            for piece, states in zip(pieces, self._states(pieces, readout), strict=True):
                tracks[piece.window.phase].add(piece.window, states, piece.weights)
            for phase, track in enumerate(tracks):
                track.settle(cutter.settled(phase))
            count = sum(track.count for track in tracks)
            if count > given:
                frames = np.empty((count - given, readout.frame_width(self.config)), np.float32)
                _interleave(tracks, frames, given)
                if normalize:
                    _unit_length(frames)
                yield Frames(frames, grid.moments(np.arange(given, count)))
                given = count

    def check_options(
        self,
        phases: int = 1,
        layers: Layers | None = None,
        frequency: str | None = None,
        pooling: str | None = None,
        normalize: bool = False,
        overlap: float = 0.5,
    ) -> Readout:
        """Check options of `embed`; returns the readout that they choose.

        Raises:
            ConfigError: an option is out of range.
        """
        check_phases(phases, self.config)
        if not isinstance(overlap, int | float) or not 0 <= overlap <= 0.5:
            raise ConfigError(f"overlap must be from 0 to 0.5, got {overlap!r}")
        return choose_readout(self.config, layers, frequency, pooling)

    @property
    def _budget(self) -> int:
        """Samples in a batch."""
        return max(1, int(self.batch_seconds * self.config.sampling_rate))

    def _buffers(self, items: list[tuple[str, Any]], rate: float, grid: WindowGrid) -> Iterator[list[_Piece]]:
        """Windows of all clips in order, a few batches at a time."""
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

    def _states(self, pieces: list[_Piece], readout: Readout) -> list[np.ndarray]:
        """Frames of every window, float32 [columns, D] each."""
        if not pieces:
            return []
        states: list[np.ndarray] = [np.empty(0)] * len(pieces)
        for batch in self._batches([piece.window for piece in pieces]):
            frames = self._run([[pieces[index].window.waveform for index in row] for row in batch], readout)
            for row, own in zip(batch, frames, strict=True):
                column = 0
                for index in row:
                    end = column + pieces[index].window.columns
                    # A copy, so that a short clip does not keep its whole batch in memory.
                    states[index] = own[column:end].copy()
                    column = end
        return states

    def _batches(self, windows: list[Window]) -> list[list[list[int]]]:
        """Indices of the windows in each row of each batch."""
        config, hop = self.config, self.config.frame_hop_samples
        budget = max(1, self._budget // hop)
        if config.encoder_type != "conformer" and config._attn_implementation in (None, "eager", "sdpa"):
            widest = config.max_columns if config.position_embedding == "learned" else budget
            rows, columns = plan_rows([window.columns for window in windows], config, widest)
            size = max(1, budget // columns)
            return [rows[first : first + size] for first in range(0, len(rows), size)]
        # In hops: the encoder hardly sees smaller differences.
        hops = [-(-len(window.waveform) // hop) for window in windows]
        most_padding = round(_BATCH_COST_SECONDS.get(self.device.type, _GPU_BATCH_COST_SECONDS) / self.hop_seconds)
        return [[[index] for index in batch] for batch in plan_batches(hops, budget, most_padding)]

    @torch.inference_mode()
    def _run(self, rows: list[list[np.ndarray]], readout: Readout) -> np.ndarray:
        """One batch of rows of windows through the model: float32 [B, T', D]."""
        mask = packing = None
        if max(map(len, rows)) == 1:
            batch, mask = padded([row[0] for row in rows])
        else:
            batch, packing = packed(self.config, rows)
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with autocast:
            output = self.model(
                batch.to(self.device), mask, packing=packing, output_hidden_states=readout.needs_hidden_states
            )
        frames = readout.frames(output.patch_hidden_states, output.hidden_states, self.config.patch_rows)
        return np.asarray(frames.float().cpu().numpy())

    def _assemble(
        self, joined: list[list[JoinedFrames]], grid: WindowGrid, readout: Readout, normalize: bool
    ) -> Embeddings:
        """Frames of all phases of each clip in order of time, padded to one array."""
        config = self.config
        counts = [sum(track.count for track in tracks) for tracks in joined]
        # Untouched pages of zeros take no memory, so one long clip among short ones costs little.
        frames = np.zeros((len(joined), max(counts), readout.frame_width(config)), dtype=np.float32)
        clip = np.empty((len(joined), readout.clip_width(config)), dtype=np.float32)
        for index, (tracks, count) in enumerate(zip(joined, counts, strict=True)):
            own = frames[index, :count]
            _interleave(tracks, own)
            clip[index] = pool(own, readout.pooling)
            if normalize:
                _unit_length(own)
        if normalize:
            _unit_length(clip)
        numbers = np.arange(frames.shape[1])
        frame_mask = numbers < np.asarray(counts)[:, None]
        return Embeddings(clip, frames, frame_mask, np.where(frame_mask, grid.moments(numbers), np.nan))


def _cut(cutter: WindowCutter, blocks: Iterator[np.ndarray]) -> Iterator[list[Window]]:
    """Windows that each block completes, and at last those that the end does."""
    for block in blocks:
        yield cutter.add(block)
    yield cutter.finish()


def _interleave(tracks: list[JoinedFrames], target: np.ndarray, given: int = 0) -> None:
    """Move finished frames of all grids of a clip to `target` [n, D], in order of time, after `given` earlier ones."""
    # Frames of shifted grids alternate. Later grids start later, so only their last columns can be missing.
    for phase, track in enumerate(tracks):
        track.move_to(target[(phase - given) % len(tracks) :: len(tracks)])


def _unit_length(vectors: np.ndarray) -> None:
    """Scale [..., D] in place to Euclidean length 1; zero vectors stay zero."""
    # einsum, because an array of squares would double the memory of hours of frames.
    norms = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
    vectors /= np.maximum(norms, 1e-12)[..., None]


def check_phases(phases: object, config: BestRQ2Config, name: str = "phases") -> None:
    """Raise a ConfigError unless a number of shifted patch grids is a whole number up to the frames of a patch."""
    most = config.patch_size[1]
    if isinstance(phases, bool) or not isinstance(phases, int) or not 1 <= phases <= most:
        raise ConfigError(f"{name} must be a whole number from 1 to {most}, got {phases!r}")


def checked_device(device: str | torch.device | None) -> torch.device:
    """Device to run on; None for CUDA if available, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=found).tolist()  # the device "meta" makes tensors, but without values
        except Exception as error:  # of any kind, by backend
            raise ConfigError(
                f"device {device!r}: this machine has none, or torch cannot use it ({first_line(error)})"
            ) from error
    return found


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Precision to run in; None for float32."""
    known = torch.float32 if dtype is None else _DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return known


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(
    source: str | os.PathLike[str] = ENCODERS[0],
    device: str | torch.device | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    batch_seconds: float = 160.0,
) -> Embedder:
    """Load an encoder for embedding.

    Args:
        source: "bestrq2-tiny", the encoder that comes with the package, a run folder of `bestrq2 pretrain`, an exported
            model folder, a reference checkpoint (`.ckpt` or `.safetensors` with its configuration beside it as `.json`
            or `.yaml` of the same name), a recipe or a YAML file that extends one (random weights from seed 0), or a
            hub id.
        device: device such as "cpu" or "cuda:0"; None for CUDA if available, else the CPU.
        dtype: "bfloat16" or "float16" to run under autocast, None for the precision of the weights.
        compile: compile the encoder's blocks by `torch.compile` when they first run.
        batch_seconds: audio that goes through the model at once, padding included; less needs less memory.

    Raises:
        CheckpointError: no such model, or its weights are damaged or of another architecture.
        ConfigError: another argument is out of range.
    """
    encoder = load_encoder(source)
    name = Path(source).name or str(source)
    return Embedder(encoder, device, name=name, dtype=dtype, compile=compile, batch_seconds=batch_seconds)
