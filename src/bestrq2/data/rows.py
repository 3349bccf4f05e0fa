"""Rows of clips: which segments share a row of a batch, as a pure function of (seed, epoch, row).

The widths of the clips in each row are chosen once and are the same in every epoch. So the number of rows of an epoch
and the shapes of all batches are constants of a corpus; an epoch only draws which segment of a width is where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from bestrq2.data.order import EpochOrder, Order, Parts, fits_window
from bestrq2.data.segments import Segment, Segments
from bestrq2.model.fields import ModelFields
from bestrq2.seeding import generator

# First word of the seed sequence, so that places share no random numbers with others.
PLACES = 0x9ACE5


def columns_of(samples: np.ndarray, fields: ModelFields) -> np.ndarray:
    """Patch columns of clips, int64 [clips], as by `ModelFields.columns`."""
    return np.maximum(1, (1 + samples // fields.hop_length) // fields.patch_size[1])


def row_templates(counts: Sequence[int] | np.ndarray, capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """Widths of the clips in rows, by best fit decreasing.

    Clips are placed from the widest to the narrowest, each in the row with the least room that suffices. Equal rows are
    filled together, so that the time depends on `capacity`, not on the number of clips.

    Args:
        counts: [capacity + 1], number of clips of each width in columns, from 0 on.
        capacity: columns of a row.

    Returns:
        Widths in a row, falling, and the number of such rows.
    """
    # Rows by the columns that are left in them.
    rows: list[dict[tuple[int, ...], int]] = [{} for _ in range(capacity + 1)]

    def put(template: tuple[int, ...], number: int, room: int) -> None:
        if number:
            rows[room][template] = rows[room].get(template, 0) + number

    for width in range(capacity, 0, -1):
        left = int(counts[width])
        for room in range(width, capacity + 1):
            # A row that takes a clip then has less room than all others that could, and takes as many as it can.
            most = room // width
            if room == capacity:
                put((), -(-left // most), room)
            for template, number in list(rows[room].items()):
                full = min(number, left // most)
                rest = left - full * most if full < number else 0
                left -= full * most + rest
                rows[room][template] -= full + (rest > 0)
                put(template + (width,) * most, full, room - most * width)
                put(template + (width,) * rest, int(rest > 0), room - rest * width)
    return [(template, number) for group in rows for template, number in group.items() if template and number]


class Rows(ABC):
    """Rows of an endless sequence of epochs.

    Attributes:
        capacity: patch columns of a row.
        are_packed: whether a row holds as many clips as fit; otherwise it holds one.
    """

    capacity: int
    are_packed: bool

    @abstractmethod
    def __len__(self) -> int:
        """Rows of an epoch."""

    @abstractmethod
    def order(self) -> Order:
        """Order of the rows in training."""

    @abstractmethod
    def segments(self, epoch: int, row: int) -> list[Segment]:
        """The clips of a row."""

    @abstractmethod
    def widths(self, row: int) -> list[int]:
        """Patch columns of the clips of a row, at most."""


class RecordingRows(Rows):
    """One random crop of each recording once an epoch, one per row, for recordings of unknown length.

    Args:
        recordings: number of recordings.
        fields: fields of the model.
        seed: random seed of the order.
        parts: shards of the recordings; None where there are none.
    """

    are_packed = False

    def __init__(self, recordings: int, fields: ModelFields, seed: int, parts: Parts | None = None) -> None:
        self.recordings, self.seed, self.parts = recordings, seed, parts
        self.longest, self.capacity = fields.max_samples, fields.columns(fields.max_samples)

    def __len__(self) -> int:
        return self.recordings

    def order(self) -> EpochOrder:
        """Every recording once an epoch; see `EpochOrder`."""
        return EpochOrder(self.recordings, self.seed, self.parts)

    def segments(self, epoch: int, row: int) -> list[Segment]:
        """A crop of the recording of that number."""
        return [Segment(row, None, self.longest)]

    def widths(self, row: int) -> list[int]:
        """All columns of the row: the crop may be that long."""
        return [self.capacity]


class SegmentRows(Rows):
    """Every segment of a corpus once an epoch, in rows that hold as many as fit.

    Args:
        segments: the segments.
        fields: fields of the model.
        seed: random seed of order and places.
        parts: shards of the recordings, which then have rows of their own, unless all fit into one window.
        one_per_row: give each segment a row of its own.
    """

    def __init__(
        self, segments: Segments, fields: ModelFields, seed: int, parts: Parts | None = None, one_per_row: bool = False
    ) -> None:
        self.all, self.seed, self.are_packed = segments, seed, not one_per_row
        self.capacity = fields.columns(fields.max_samples)
        if parts is None or fits_window(parts):
            parts = Parts(np.array([0, len(segments.firsts) - 1]), np.zeros(1, np.int64))
        columns = columns_of(segments.counts(), fields)
        shards, most = len(parts.sizes), self.capacity + 1
        # Segments of one width in one shard form a group, in which they can change places.
        groups = np.repeat(np.arange(shards), np.diff(segments.firsts[parts.starts])) * most + columns
        self._members = np.argsort(groups, kind="stable")
        self._sizes = np.bincount(groups, minlength=shards * most)
        self._places = self._places_of(columns)
        templates = []
        firsts = [0]
        for counts in self._places.reshape(shards, most):
            alone = [((width,), int(count)) for width, count in enumerate(counts) if count]
            templates.append(alone if one_per_row else row_templates(counts, self.capacity))
            firsts.append(firsts[-1] + sum(number for _, number in templates[-1]))
        self.parts = Parts(np.array(firsts), parts.sizes)
        rows = [(shard, template, number) for shard in range(shards) for template, number in templates[shard]]
        # Number of the first slot of each row; a slot holds one clip.
        sizes = [np.full(number, len(template)) for _, template, number in rows]
        self.starts = np.concatenate([[0], *sizes]).cumsum()
        slots = [np.tile(np.array(template) + shard * most, number) for shard, template, number in rows]
        self._slots = np.concatenate([np.zeros(0, np.int64), *slots])
        # Rank of each slot among all when they are sorted by group.
        self._ranks = np.empty(len(self._slots), np.int64)
        self._ranks[np.argsort(self._slots, kind="stable")] = np.arange(len(self._slots))
        self._drawn = (-1, self._members)

    def _places_of(self, columns: np.ndarray) -> np.ndarray:
        """Slots of each group, int64 [groups], for segments of these columns."""
        return self._sizes

    def _draw(self, epoch: int) -> np.ndarray:
        """Segments in an epoch, sorted by group: int64 [slots]."""
        shuffled = generator(PLACES, self.seed, epoch).permutation(len(self._members))
        groups = np.repeat(np.arange(len(self._sizes)), self._sizes)
        return self._members[shuffled[np.argsort(groups[shuffled], kind="stable")]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def order(self) -> EpochOrder:
        """Every row once an epoch; see `EpochOrder`."""
        return EpochOrder(len(self), self.seed, self.parts)

    def segments(self, epoch: int, row: int) -> list[Segment]:
        """The segments in the slots of a row."""
        drawn_epoch, drawn = self._drawn
        if drawn_epoch != epoch:
            drawn = self._draw(epoch)
            self._drawn = (epoch, drawn)  # at once: a thread may look, too
        ranks = self._ranks[self.starts[row] : self.starts[row + 1]]
        return [self.all(int(number), epoch) for number in drawn[ranks]]

    def widths(self, row: int) -> list[int]:
        """Patch columns of the segments."""
        return (self._slots[self.starts[row] : self.starts[row + 1]] % (self.capacity + 1)).tolist()
