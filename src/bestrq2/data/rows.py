"""Segments of recordings, and rows of a batch that they share, as pure functions of (seed, epoch, row).

Segments of a recording together cover every second once an epoch, with cuts that move every epoch. The widths of the
clips in each row are chosen once and are the same in every epoch. So the number of rows of an epoch and the shapes of
all batches are constants of a corpus; an epoch only draws which segment of a width is where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bestrq2.data.order import EpochOrder, Order, Parts, fits_window
from bestrq2.model.fields import ModelFields
from bestrq2.seeding import generator
from bestrq2.text import counted

# First word of the seed sequence, so that the cuts share no random numbers with others.
CUT = 0x5E6C7


class Segment(NamedTuple):
    """Stretch of a recording that is one clip.

    Attributes:
        recording: number of the recording.
        start: its first sample at the rate of the model; None for a random crop, where the length of the recording is
            not known.
        samples: its length, at most.
    """

    recording: int
    start: int | None
    samples: int


class Segments:
    """Segments of all recordings, numbered recording by recording.

    A recording of L samples has ceil(L / longest) of them: all of `longest` samples but one, which has the rest. Where
    the short one is differs from epoch to epoch; so the cuts move, and the lengths of all segments stay the same. A
    rest of fewer than `shortest` samples is left out.

    Args:
        lengths: int64 [recordings], samples of each at the rate of the model; 0 for those that cannot be used.
        longest: samples of a long segment.
        shortest: samples of the shortest segment that can be used, at most `longest`.
        seed: random seed of the cuts.

    Attributes:
        firsts: int64 [recordings + 1], number of the first segment of each recording, then the number of all segments.
    """

    def __init__(self, lengths: np.ndarray, longest: int, shortest: int, seed: int) -> None:
        self.longest, self.seed = longest, seed
        self._whole = np.maximum(-(-lengths // longest) - 1, 0)
        self._rests = lengths - self._whole * longest
        kept = self._whole + (self._rests >= max(1, shortest))
        self.firsts = np.concatenate([[0], kept.cumsum()])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def recordings(self) -> np.ndarray:
        """The recording of each segment, int64 [segments]."""
        return np.repeat(np.arange(len(self._rests)), np.diff(self.firsts))

    def counts(self) -> np.ndarray:
        """Samples of each segment, int64 [segments]; the rest of a recording is its last one."""
        recordings = self.recordings()
        is_rest = np.arange(len(self)) - self.firsts[recordings] == self._whole[recordings]
        return np.where(is_rest, self._rests[recordings], self.longest)

    def __call__(self, number: int, epoch: int) -> Segment:
        """A segment as it is cut in an epoch."""
        recording = int(self.firsts.searchsorted(number, side="right")) - 1
        whole, rest = int(self._whole[recording]), int(self._rests[recording])
        # How many whole segments come before the rest.
        before = int(generator(CUT, self.seed, epoch, recording).integers(whole + 1)) if whole else 0
        place = number - int(self.firsts[recording])
        if place == whole:
            return Segment(recording, before * self.longest, rest)
        return Segment(recording, place * self.longest + (rest if place >= before else 0), self.longest)


class Crops(Segments):
    """One random crop of each recording, for recordings of unknown length.

    Args:
        recordings: number of recordings.
        longest: samples of a crop, at most.
    """

    def __init__(self, recordings: int, longest: int) -> None:
        super().__init__(np.full(recordings, longest), longest, longest, 0)

    def __call__(self, number: int, epoch: int) -> Segment:
        return Segment(number, None, self.longest)


# First words of the seed sequences, so that these share no random numbers with others.
PLACES, BATCHES = 0x9ACE5, 0xBA7C4
# Batches among which rows are sorted by length.
_WINDOW_BATCHES = 50


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


def buffer_samples(columns: int | np.ndarray, clips: int | np.ndarray, fields: ModelFields) -> Any:
    """Samples that clips take one after the other, with the reflected ends of each and gaps between them.

    Args:
        columns: patch columns of all clips together.
        clips: number of clips, at least one.
        fields: fields of the model.
    """
    frames = columns * fields.patch_size[1] + (clips - 1) * gap_frames(fields)
    return (frames - 1) * fields.hop_length + fields.n_fft


def gap_frames(fields: ModelFields) -> int:
    """Frames of the spectrogram that lie between two clips of a row: they see samples of both."""
    return -(-fields.n_fft // fields.hop_length) - 1


class Rows(ABC):
    """Rows of an endless sequence of epochs.

    Attributes:
        by_length: whether a row holds one clip, since the model cannot tell several apart, and the rows of a batch are
            about equally long, see `SortedOrder`.
        clips: clips of an epoch.
        seconds: audio of an epoch (s); None where the lengths of recordings are not known.
        capacity: patch columns of a row.
        fill: share of the columns of all rows that clips take; None where lengths are not known.
        samples: samples of the longest row, see `buffer_samples`.
        rejected: (name, reason) of recordings of which no segment can be used.
    """

    by_length: bool
    clips: int
    seconds: float | None
    capacity: int
    fill: float | None
    samples: int
    rejected: list[tuple[str, str]]

    @abstractmethod
    def __len__(self) -> int:
        """Rows of an epoch."""

    @abstractmethod
    def order(self) -> Order:
        """Order of the rows in training: an endless sequence with every row once an epoch."""

    @abstractmethod
    def segments(self, epoch: int, row: int) -> list[Segment]:
        """The clips of a row."""

    @abstractmethod
    def widths(self, row: int) -> list[int]:
        """Patch columns of the clips of a row, at most."""

    def of_source(self, row: int) -> range:
        """The rows of the same source as a row, itself included."""
        return range(len(self))


def describe_rows(rows: Rows, recordings: int, step_rows: int, fields: ModelFields) -> dict[str, str]:
    """What a run will hear, in words: facts by name, which together also make a sentence.

    Args:
        rows: rows of the corpus.
        recordings: number of its recordings.
        step_rows: rows per optimiser step.
        fields: fields of the model.
    """
    facts = {"corpus": counted(recordings, "recording")}
    step = counted(step_rows, "row")
    if rows.seconds is None:
        facts["segments"] = f"lengths are not known: a crop of up to {fields.max_seconds:g} s of each, alone in its row"
    else:
        facts["corpus"] += f", {rows.seconds / 3600:.2f} h"
        each = "one in each row" if rows.by_length else f"in {counted(len(rows), 'row')}, {rows.fill:.1%} of them audio"
        facts["segments"] = f"{counted(rows.clips, 'segment')} of up to {fields.max_seconds:g} s, {each}"
        step = f"{rows.seconds * step_rows / len(rows):,.0f} s of audio in {step}"
    return facts | {"step": f"{step} per step", "epoch": f"{len(rows) / step_rows:,.1f} steps per epoch"}


class SegmentRows(Rows):
    """Every segment of a corpus once an epoch, in rows that hold as many as fit.

    A Conformer has one per row, since its convolutions would join them; so have crops of recordings of unknown length.

    Args:
        segments: the segments.
        fields: fields of the model.
        seed: random seed of order and places.
        parts: shards of the recordings, which then have rows of their own, unless all fit into one window.
        rejected: (name, reason) of recordings that cannot be used.
    """

    def __init__(
        self,
        segments: Segments,
        fields: ModelFields,
        seed: int,
        parts: Parts | None = None,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.all, self.seed, self.rejected = segments, seed, list(rejected)
        self.by_length = fields.encoder_type == "conformer"
        self.capacity = fields.columns(fields.max_samples)
        if parts is None or fits_window(parts):
            parts = Parts(np.array([0, len(segments.firsts) - 1]), np.zeros(1, np.int64))
        counts = segments.counts()
        columns = columns_of(counts, fields)
        shards, most = len(parts.sizes), self.capacity + 1
        # Segments of one width in one shard form a group, in which they can change places.
        groups = np.repeat(np.arange(shards), np.diff(segments.firsts[parts.starts])) * most + columns
        self._members = np.argsort(groups, kind="stable")
        self._sizes = np.bincount(groups, minlength=shards * most)
        self._fill_rows(self._places().reshape(shards, most), parts)
        slots = np.diff(self._starts)
        taken = np.add.reduceat(self._slots % most, self._starts[:-1]) if len(slots) else slots
        self.clips = len(self._slots)
        known = not isinstance(segments, Crops)
        self.seconds = float(counts.sum()) / fields.sampling_rate if known else None
        self.fill = float(taken.sum() / max(1, len(self) * self.capacity)) if known else None
        self.samples = int(buffer_samples(taken, slots, fields).max(initial=0))
        # Of two epochs: a batch may reach over the end of one.
        self._drawn: dict[int, np.ndarray] = {}

    def _places(self) -> np.ndarray:
        """Clips of each group in an epoch, int64 [groups]."""
        return self._sizes

    def _fill_rows(self, places: np.ndarray, parts: Parts) -> None:
        """Choose the group of each clip of each row, from the number of clips of each group, int64 [shards, widths]."""
        rows: list[tuple[np.ndarray, int]] = []
        one_per_row = self.by_length or isinstance(self.all, Crops)
        firsts = [0]
        for shard, counts in enumerate(places):
            alone = [((width,), int(count)) for width, count in enumerate(counts) if count]
            templates = alone if one_per_row else row_templates(counts, self.capacity)
            rows += [(np.array(template) + shard * len(counts), number) for template, number in templates]
            firsts.append(firsts[-1] + sum(number for _, number in templates))
        self._parts = Parts(np.array(firsts), parts.sizes)
        nothing = np.zeros(0, np.int64)
        # A slot holds one clip: number of the first one of each row, and the group of each.
        self._starts = np.concatenate([[0], *(np.full(number, len(template)) for template, number in rows)]).cumsum()
        self._slots = np.concatenate([nothing, *(np.tile(template, number) for template, number in rows)])
        # Rank of each slot among all, sorted by group.
        self._ranks = np.empty_like(self._slots)
        self._ranks[np.argsort(self._slots, kind="stable")] = np.arange(len(self._slots))

    def _draw(self, epoch: int) -> np.ndarray:
        """Segments in an epoch, sorted by group: int64 [slots]."""
        shuffled = generator(PLACES, self.seed, epoch).permutation(len(self._members))
        groups = np.repeat(np.arange(len(self._sizes)), self._sizes)
        return self._members[shuffled[np.argsort(groups[shuffled], kind="stable")]]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def order(self) -> EpochOrder:
        return EpochOrder(len(self), self.seed, self._parts)

    def segments(self, epoch: int, row: int) -> list[Segment]:
        drawn = self._drawn.get(epoch)
        if drawn is None:
            drawn = self._draw(epoch)
            self._drawn = {**dict(list(self._drawn.items())[-1:]), epoch: drawn}
        ranks = self._ranks[self._starts[row] : self._starts[row + 1]]
        return [self.all(int(number), epoch) for number in drawn[ranks]]

    def widths(self, row: int) -> list[int]:
        return (self._slots[self._starts[row] : self._starts[row + 1]] % (self.capacity + 1)).tolist()


class BalancedRows(SegmentRows):
    """Segments drawn with replacement by the probability of their recording, as many per epoch as there are.

    The number of clips of each width follows from the probabilities and is the same in every epoch; which segments of
    that width they are is drawn.

    Args:
        probabilities: float64 [recordings]; the segments of a recording share its probability.
        segments: the segments.
        *others: see `SegmentRows`.
        **options: see `SegmentRows`.
    """

    def __init__(self, probabilities: np.ndarray, segments: Segments, *others: Any, **options: Any) -> None:
        recordings = segments.recordings()
        shares = probabilities[recordings] / np.diff(segments.firsts)[recordings]
        self._shares = shares / shares.sum()
        super().__init__(segments, *others, **options)

    def _of_groups(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number and segments of each group that has some."""
        ends = self._sizes.cumsum()
        for group in np.flatnonzero(self._sizes):
            yield int(group), self._members[ends[group] - self._sizes[group] : ends[group]]

    def _places(self) -> np.ndarray:
        """Clips of each group in an epoch, int64 [groups], by the sum of its probabilities."""
        places = np.zeros_like(self._sizes)
        for group, members in self._of_groups():
            places[group] = max(1, round(len(self._shares) * self._shares[members].sum()))
        return places

    def _draw(self, epoch: int) -> np.ndarray:
        rng, places = generator(PLACES, self.seed, epoch), self._places()
        return np.concatenate(
            [
                rng.choice(members, places[group], p=self._shares[members] / self._shares[members].sum())
                for group, members in self._of_groups()
            ]
        )


class SortedOrder:
    """Another order of rows in which those of one batch have about the same length.

    The rows of 50 batches are sorted by length and the batches shuffled.

    Args:
        rows: the rows, with one clip each.
        batch_rows: rows of a batch.
        seed: random seed of the shuffling.
    """

    def __init__(self, rows: Rows, batch_rows: int, seed: int) -> None:
        self.rows, self.batch_rows, self.seed = rows, batch_rows, seed
        self._plain = rows.order()
        self._window: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __call__(self, number: int) -> tuple[int, int]:
        """(epoch, row) at place `number` (from 0) of the sequence."""
        window, place = divmod(number, _WINDOW_BATCHES * self.batch_rows)
        opened, found = self._window
        if opened != window:
            first = number - place
            plain = [self._plain(first + one) for one in range(_WINDOW_BATCHES * self.batch_rows)]
            by_length = np.argsort([self.rows.widths(row)[0] for _, row in plain], kind="stable")
            batches = generator(BATCHES, self.seed, window).permutation(by_length.reshape(_WINDOW_BATCHES, -1))
            found = [plain[one] for one in batches.ravel()]
            self._window = (window, found)
        return found[place]
