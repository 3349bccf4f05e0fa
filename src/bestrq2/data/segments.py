"""Segments: stretches of recordings that together cover every second once an epoch, with cuts that move every epoch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bestrq2.seeding import generator

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
