"""Embeddings of arrays and files of any length, from any source of weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bestrq2.convert.loading import load_encoder
from bestrq2.data.audio import as_mono, audio_info, read_audio
from bestrq2.errors import AudioError, ConfigError
from bestrq2.inference.embeddings import Embeddings
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

Audio: TypeAlias = "np.ndarray | Tensor | str | os.PathLike[str]"

# Windows that go through the model at once hold at most this much audio.
_BATCH_SECONDS = 160.0


@dataclass(frozen=True)
class _Window:
    """A stretch of one clip that fits the model: where it starts and its samples."""

    clip: int
    start: int
    waveform: np.ndarray


class Embedder:
    """Turns audio into embeddings with a frozen encoder.

    Args:
        model: the encoder; it is put into evaluation mode.
        device: where it runs; None for CUDA where there is one, else the CPU.
        name: how results name these features.
    """

    def __init__(self, model: BestRQ2Model, device: str | torch.device | None = None, name: str = "encoder") -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device)
        self.name = name

    @property
    def config(self) -> BestRQ2Config:
        """The architecture."""
        return self.model.config

    @property
    def hop_seconds(self) -> float:
        """Seconds between frames (one phase)."""
        return self.config.frame_hop_samples / self.config.sampling_rate

    @property
    def _shortest(self) -> int:
        """Samples of one whole patch, at least one."""
        return max(1, self.config.frame_hop_samples - self.config.hop_length)

    def embed(self, audio: Audio | Sequence[Audio], sampling_rate: int | None = None, phases: int = 1) -> Embeddings:
        """Embed one clip or a list of clips of unequal length.

        Clips longer than the model's `max_seconds` are embedded window by window. Only whole patches are embedded, as
        in pretraining; a clip shorter than one patch is continued by reflection.

        Args:
            audio: waveform [samples] or [channels, samples] (float in [-1, 1] or integer), path, or a list of these.
            sampling_rate: Hz of waveforms; None trusts that it is the model's. Files carry their own.
            phases: how often the patch grid is shifted, each time by 1/phases of the hop, to get finer frames.

        Returns:
            One row per clip, in the order of the input.

        Raises:
            AudioError: if a file or waveform is unusable.
            ConfigError: if `phases` is not a whole number from 1 to the frames of a patch.
        """
        if not isinstance(phases, int) or not 1 <= phases <= self.config.patch_size[1]:
            raise ConfigError(f"phases must be a whole number from 1 to {self.config.patch_size[1]}, got {phases!r}")
        if sampling_rate is not None and sampling_rate <= 0:
            raise ConfigError(f"sampling_rate must be above 0 Hz, got {sampling_rate}")
        clips = _as_list(audio)
        if not clips:
            raise AudioError("there is no audio to embed: the list is empty")
        frames: list[list[np.ndarray]] = [[] for _ in clips]
        times: list[list[np.ndarray]] = [[] for _ in clips]
        for batch in self._batches(clips, sampling_rate, phases):
            for window, states in zip(batch, self._embed_windows(batch), strict=True):
                frames[window.clip].append(states)
                start = window.start / self.config.sampling_rate
                times[window.clip].append(start + (np.arange(len(states)) + 0.5) * self.hop_seconds)
        return self._assemble(frames, times)

    def _batches(self, clips: list[Audio], sampling_rate: int | None, phases: int) -> Iterator[list[_Window]]:
        budget = max(1, int(_BATCH_SECONDS * self.config.sampling_rate))
        batch: list[_Window] = []
        for index, clip in enumerate(clips):
            for window in self._windows(index, clip, sampling_rate, phases):
                # The cost is that of the padded batch.
                longest = max([len(window.waveform), *(len(other.waveform) for other in batch)])
                if batch and longest * (len(batch) + 1) > budget:
                    yield batch
                    batch = []
                batch.append(window)
        if batch:
            yield batch

    def _windows(self, index: int, clip: Audio, sampling_rate: int | None, phases: int) -> Iterator[_Window]:
        """Windows of one clip, for every phase, each a whole number of frames apart."""
        config = self.config
        hop = config.frame_hop_samples
        length = config.columns(config.max_samples) * hop
        # With patches of one frame, a last frame at the very end would be the first one of the next window.
        samples = length - 1 if config.patch_size[1] == 1 else length
        for stretch_start, stretch, last in self._stretches(clip, sampling_rate, length):
            for phase in range(phases):
                offset = round(phase * hop / phases)
                for start in range(offset, len(stretch), length):
                    piece = stretch[start : start + samples]
                    only = stretch_start + start == 0
                    if len(piece) < self._shortest and not only:
                        continue
                    if start >= length and not last:
                        continue  # belongs to the next stretch
                    yield _Window(index, stretch_start + start, piece)

    def _stretches(self, clip: Audio, sampling_rate: int | None, length: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Parts of a clip at the model's rate: (first sample, samples, whether it is the last).

        Short clips and waveforms are one part. A long file is read window by window, each with the following hop, so
        that shifted grids find their samples.
        """
        rate = self.config.sampling_rate
        if not isinstance(clip, str | os.PathLike):
            waveform = clip.detach().cpu().numpy() if isinstance(clip, Tensor) else np.asarray(clip)
            yield 0, as_mono(waveform, sampling_rate or rate, rate), True
            return
        path = Path(clip)
        seconds = audio_info(path).seconds
        if seconds is None or seconds * rate <= 2 * length:
            yield 0, read_audio(path, rate), True
            return
        total = round(seconds * rate)
        reach = length + self.config.frame_hop_samples
        # A rest of less than a patch is left out, so that a header which promises a little too much does no harm.
        for start in range(0, total - self._shortest + 1, length):
            waveform = read_audio(path, rate, start / rate, min(reach, total - start) / rate)
            yield start, waveform, start + length >= total

    @torch.inference_mode()
    def _embed_windows(self, batch: list[_Window]) -> list[np.ndarray]:
        """Frames of every window, float32 [T, D] each, behind which nothing of the padding stands."""
        lengths = [len(window.waveform) for window in batch]
        padded = np.zeros((len(batch), max(lengths)), dtype=np.float32)
        for row, window in zip(padded, batch, strict=True):
            row[: len(window.waveform)] = window.waveform
        mask = None
        if len(set(lengths)) > 1:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        output = self.model(torch.from_numpy(padded).to(self.device), mask)
        states = output.last_hidden_state.float().cpu().numpy()
        counts = output.frame_attention_mask.sum(dim=1).tolist()
        return [clip[:count] for clip, count in zip(states, counts, strict=True)]

    def _assemble(self, frames: list[list[np.ndarray]], times: list[list[np.ndarray]]) -> Embeddings:
        """Frames of all windows and phases of each clip, in order of time, padded to one array."""
        counts = [sum(map(len, parts)) for parts in frames]
        shape = (len(frames), max(counts))
        joined = np.zeros((*shape, self.config.hidden_size), dtype=np.float32)
        timestamps = np.full(shape, np.nan)
        for index, count in enumerate(counts):
            moments = np.concatenate(times[index])
            order = np.argsort(moments, kind="stable")
            joined[index, :count] = np.concatenate(frames[index])[order]
            timestamps[index, :count] = moments[order]
        frame_mask = ~np.isnan(timestamps)
        clip = joined.sum(axis=1, dtype=np.float64) / np.asarray(counts)[:, None]
        return Embeddings(clip.astype(np.float32), joined, frame_mask, timestamps)


def _as_list(audio: Audio | Sequence[Audio]) -> list[Audio]:
    if isinstance(audio, str | os.PathLike | np.ndarray | Tensor):
        return [audio]
    items = list(audio)
    if items and all(isinstance(item, int | float) for item in items):
        return [np.asarray(items, dtype=np.float32)]
    return items


def load(source: str | os.PathLike[str], device: str | torch.device | None = None) -> Embedder:
    """Load an encoder for embedding.

    Args:
        source: a run folder of `bestrq2 pretrain`, an exported model folder, a reference checkpoint (`.ckpt` or
            `.safetensors` with its configuration beside it as `.json` or `.yaml` of the same name), a recipe or a YAML
            file that extends one (random weights from seed 0), or a hub id.
        device: such as "cpu" or "cuda:0"; None for CUDA where there is one, else the CPU.

    Raises:
        CheckpointError: if there is nothing of the kind, or the weights are damaged or of another architecture.
    """
    return Embedder(load_encoder(source), device, name=Path(source).name or str(source))
