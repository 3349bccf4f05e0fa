"""Windows of long audio on the grid of patches, and their frames joined by cross-fading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bestrq2.data.batch import RowWriter
from bestrq2.data.rows import buffer_samples, row_templates
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.packing import Packing

# Share of the columns of all rows that is worth no search for a better width of the rows.
_GOOD_FILL = 0.97
# Blocks of a clip that are kept apart: an array of few samples takes more memory than they do.
_MOST_PIECES = 256


@dataclass(frozen=True)
class Window:
    """A stretch of one clip that fits the model.

    Attributes:
        phase: index of its shifted grid.
        first: first column on that grid.
        columns: number of columns, of one frame each.
        is_last: whether it is the last window on its grid.
        waveform: samples, float32 [samples].
    """

    phase: int
    first: int
    columns: int
    is_last: bool
    waveform: np.ndarray


class WindowGrid:
    """Division of audio of any length into windows of the length the model was trained for.

    A clip that fits into one window is one window. Otherwise windows start every `stride` columns, and the last one is
    moved forward so that it is full and ends with the clip. Windows of a shifted grid start an offset later.

    Args:
        config: architecture; a window has as many patch columns as a clip of `max_seconds`.
        phases: number of grids, each shifted by 1/phases of a column.
        overlap: share of a window that the next one covers again, 0 to 0.5.
    """

    def __init__(self, config: BestRQ2Config, phases: int, overlap: float) -> None:
        self.config = config
        self.hop = config.frame_hop_samples
        self.columns = config.columns(config.max_samples)
        self.overlap = int(overlap * self.columns)
        self.stride = self.columns - self.overlap  # whole columns, so that windows share one grid of patches
        self.offsets = [round(phase * self.hop / phases) for phase in range(phases)]
        """First sample of each grid."""

    def cut(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        """Windows of one clip, from float32 [samples] blocks; those of one phase come in order."""
        cutter = WindowCutter(self)
        for block in blocks:
            yield from cutter.add(block)
        yield from cutter.finish()

    def moments(self, numbers: np.ndarray) -> np.ndarray:
        """Centres of frames in seconds, float64 [n].

        Args:
            numbers: int64 [n], places of the frames among those of all grids in order of time.
        """
        columns, phases = np.divmod(numbers, len(self.offsets))
        samples = np.asarray(self.offsets)[phases] + (columns + 0.5) * self.hop
        return np.asarray(samples / self.config.sampling_rate)

    def weights(self, window: Window) -> np.ndarray:
        """Weight of each frame of a window in the cross-fade with its neighbours, float32 [columns].

        Weights fall linearly over the overlap, because frames near a border have less context.
        """
        rising = np.arange(1, window.columns + 1, dtype=np.float32) / np.float32(self.overlap + 1)
        weights = np.ones(window.columns, np.float32)
        if window.first:
            weights = np.minimum(weights, rising)
        if not window.is_last:
            weights = np.minimum(weights, rising[::-1])
        return weights


class WindowCutter:
    """Windows of one clip, cut while its samples arrive.

    Little more than a window and a block of the clip is in memory at a time.
    """

    def __init__(self, grid: WindowGrid) -> None:
        self.grid = grid
        self._held = _Buffer()
        self._firsts = [0] * len(grid.offsets)

    def add(self, block: np.ndarray) -> list[Window]:
        """Windows that float32 [samples] complete, except the last one of the clip on each grid."""
        grid, held, windows = self.grid, self._held, []
        held.add(block)
        ends = []
        for phase, offset in enumerate(grid.offsets):
            settled = self.settled(phase)
            # One more column than the window has tells that it is not the last one.
            while settled > (first := self._firsts[phase]):
                start = offset + first * grid.hop
                samples = held[start : start + grid.config.max_samples]
                windows.append(Window(phase, first, grid.columns, False, samples))
                self._firsts[phase] += grid.stride
            ends.append(offset + settled * grid.hop)  # where a window that ends with the clip would begin
        held.drop(min(ends))
        return windows

    def finish(self) -> list[Window]:
        """Last window on each grid."""
        windows = []
        for phase, offset in enumerate(self.grid.offsets):
            if total := self._columns(phase):
                first = self.settled(phase)
                start = offset + first * self.grid.hop
                windows.append(Window(phase, first, total - first, True, self._held[start : self._held.end]))
        return windows

    def settled(self, phase: int) -> int:
        """Columns of a grid that only windows cut so far can cover."""
        return max(0, self._columns(phase) - self.grid.columns)

    def _columns(self, phase: int) -> int:
        """Columns of a grid in the samples so far; only the first grid has a column on less than a patch."""
        config, samples = self.grid.config, self._held.end - self.grid.offsets[phase]
        return 0 if phase and samples < max(1, self.grid.hop - config.hop_length) else config.columns(samples)


class _Buffer:
    """Samples of a clip that are still needed, addressed by their place in the clip."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self._pieces: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        self._pieces.append(block)
        self.end += len(block)
        if len(self._pieces) > _MOST_PIECES:
            self._join()

    def drop(self, end: int) -> None:
        """Discard the samples before `end`."""
        while self.start < end:
            piece = self._pieces[0]
            count = min(len(piece), end - self.start)
            self._pieces[:1] = [piece[count:]] if count < len(piece) else []
            self.start += count

    def __getitem__(self, span: slice) -> np.ndarray:
        if len(self._pieces) > 1:
            self._join()
        return self._pieces[0][span.start - self.start : span.stop - self.start]

    def _join(self) -> None:
        self._pieces = [np.concatenate(self._pieces)]


class JoinedFrames:
    """Frames of one clip on one grid, joined from its windows as they come."""

    def __init__(self) -> None:
        self.count = 0
        """Number of frames that no later window changes."""
        self._done: list[np.ndarray] = []
        self._sum: np.ndarray | None = None
        self._weights = np.zeros(0, np.float32)

    def add(self, window: Window, states: np.ndarray, weights: np.ndarray) -> None:
        """Add float32 [columns, D] with weights [columns]; windows come in order."""
        if window.first == 0 and window.is_last:
            self._finish(states)
            return
        weighted = states * weights[:, None]
        self.settle(window.first)
        if self._sum is not None:
            shared = len(self._sum)
            weighted[:shared] += self._sum
            weights = weights.copy()  # the caller keeps its array
            weights[:shared] += self._weights
        self._sum, self._weights = weighted, weights
        if window.is_last:
            self.settle(window.first + window.columns)

    def settle(self, end: int) -> None:
        """Finish the frames before column `end`, which no later window covers."""
        if self._sum is not None and (frames := end - self.count) > 0:
            self._finish(self._sum[:frames] / self._weights[:frames, None])
            self._sum, self._weights = self._sum[frames:], self._weights[frames:]

    def _finish(self, frames: np.ndarray) -> None:
        self._done.append(frames)
        self.count += len(frames)

    def move_to(self, target: np.ndarray) -> None:
        """Move the frames that were not moved yet to `target` [n, D].

        They go there piece by piece, so that they are not in memory twice.
        """
        end = len(target)
        while self._done:
            piece = self._done.pop()
            target[end - len(piece) : end] = piece
            end -= len(piece)


def padded(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """Batch of waveforms, padded with zeros.

    Args:
        waveforms: float32 [samples] each.

    Returns:
        float32 [B, S], and a bool mask [B, S] of the samples that are not padding; None if there is no padding.
    """
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = np.zeros((len(waveforms), int(lengths.max())), np.float32)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    # Without a mask the model may use faster attention kernels.
    mask = torch.arange(batch.shape[1]) < lengths[:, None] if lengths.min() < lengths.max() else None
    return torch.from_numpy(batch), mask


def packed(config: BestRQ2Config, rows: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, Packing]:
    """Batch of rows of waveforms, each reflected at its own ends: float32 [R, S], and where the waveforms are.

    Args:
        config: architecture.
        rows: waveforms float32 [samples] in each row.
    """
    columns = [sum(config.columns(len(waveform)) for waveform in row) for row in rows]
    samples = max(buffer_samples(count, len(row), config) for count, row in zip(columns, rows, strict=True))
    writer = RowWriter(config, len(rows), max(columns), samples)
    for number, row in enumerate(rows):
        for waveform in row:
            writer.add(number, waveform)
    batch = writer.batch(0, range(len(rows)))
    return batch.input_values, batch.packing


def plan_batches(lengths: Sequence[int], budget: int, most_padding: int) -> list[list[int]]:
    """Batches of windows of similar length, longest first.

    Args:
        lengths: length of every window, in samples or patches.
        budget: largest size of a batch, padding included; a longer window is a batch of its own.
        most_padding: largest amount of padding in a batch, worth the overhead of one more batch.

    Returns:
        Indices of the windows of every batch.
    """
    batches: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        added = longest - lengths[index]
        if batches and (len(batches[-1]) + 1) * longest <= budget and padding + added <= most_padding:
            batches[-1].append(index)
            padding += added
        else:
            batches.append([index])
            longest, padding = lengths[index], 0
    return batches


def plan_rows(columns: Sequence[int], config: BestRQ2Config, widest: int) -> tuple[list[list[int]], int]:
    """Rows of several windows each, as wide as costs the encoder least.

    Args:
        columns: patch columns of every window.
        config: architecture.
        widest: most columns of a row, unless a window has more.

    Returns:
        Indices of the windows in every row, and the columns of a row.
    """
    counts = np.bincount(columns)
    longest = len(counts) - 1
    plans = []
    for capacity in range(longest, max(longest, min(2 * longest, widest)) + 1, -(-longest // 16)):
        templates = row_templates(np.pad(counts, (0, capacity - longest)), capacity)
        size = capacity * sum(number for _, number in templates)
        # A block's products for a token take as long as its attention to 6 times as many tokens as it has values.
        plans.append((size * (6 * config.hidden_size + config.patch_rows * capacity), capacity, templates))
        if sum(columns) >= _GOOD_FILL * size:
            break
    _, capacity, templates = min(plans)
    waiting: list[list[int]] = [[] for _ in counts]
    for index in reversed(range(len(columns))):
        waiting[columns[index]].append(index)
    return [[waiting[width].pop() for width in widths] for widths, number in templates for _ in range(number)], capacity
