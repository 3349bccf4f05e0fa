"""Lanes: remote shards as endless rows in which every item is a pure function of seed, lane and number.

Place q of step s belongs to lane (s mod A, q mod B). In every epoch a lane reads its part of all shards, shuffled anew,
and inside a shard it shuffles windows of neighbouring samples. So processes and workers can each follow the lanes they
need, and none needs to know what another one did.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bestrq2.data.audio import open_audio, random_crop
from bestrq2.data.decoders import AudioBytes, UnreadableAudioError
from bestrq2.data.loader import AllRejectedError, LoaderError, check_length
from bestrq2.data.remote import StreamSource
from bestrq2.data.transfer import Sample, Shard
from bestrq2.errors import AudioError
from bestrq2.seeding import generator
from bestrq2.text import counted

logger = logging.getLogger(__name__)

# Neighbouring samples of a shard that are shuffled together, and the bytes that end a window before: a lane's memory.
WINDOW, WINDOW_BYTES = 64, 16 << 20
MOST_LANES = (4, 8)
# Samples in a row that may be unusable, and shards in a row that may fail, before the run is stopped.
MAX_TRIES, MAX_FAILURES = 1000, 3


class UnreachableError(LoaderError):
    """Shards cannot be fetched."""


@dataclass(frozen=True)
class Lanes:
    """Which lane an item comes from.

    Attributes:
        by_step: lanes taken in turn by successive steps (A).
        by_place: lanes taken in turn by successive places of a batch (B).
        batch_size: of the global batch.
    """

    by_step: int
    by_place: int
    batch_size: int

    @classmethod
    def of(cls, shards: int, batch_size: int) -> Lanes:
        """As many lanes as shards and batch size allow, at most 4 by 8."""
        by_place = min(MOST_LANES[1], 1 << (min(shards, batch_size).bit_length() - 1))
        return cls(max(1, min(MOST_LANES[0], shards // by_place)), by_place, batch_size)

    def __len__(self) -> int:
        return self.by_step * self.by_place

    def item(self, step: int, place: int) -> tuple[int, int]:
        """(lane, number of the item in it) at a place of a step."""
        column = place % self.by_place
        per_step = len(range(column, self.batch_size, self.by_place))
        number = step // self.by_step * per_step + place // self.by_place
        return step % self.by_step * self.by_place + column, number


@dataclass
class _Window:
    """Neighbouring samples of a shard in the order in which they come, the first being item `first` of the lane.

    Places in `bad` are known to be unusable, each with the reason.
    """

    first: int
    samples: Sequence[Sample]
    bad: dict[int, str] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return self.first <= number < self.end

    @property
    def end(self) -> int:
        """Number of the item behind the last."""
        return self.first + len(self.samples)

    def empty_if_bad(self) -> None:
        """Let go of the audio if none of it can be used."""
        if len(self.bad) == len(self.samples):
            self.samples = [Sample(sample.name, b"") for sample in self.samples]


class Lane:
    """An endless row of samples, read forwards (going back means reading anew).

    Args:
        source: the shards.
        seed: of all orders and crops.
        lane: number of this lane.
        lanes: number of all lanes, at most that of the shards.

    Attributes:
        learned: samples of the shards that it read to their ends.
        problems: (URL, reason) of shards that could not be read to their ends, until someone takes them.
    """

    def __init__(self, source: StreamSource, seed: int, lane: int, lanes: int) -> None:
        self.source, self.seed, self.lane, self.lanes = source, seed, lane, lanes
        self.learned: dict[str, int] = {}
        self.problems: list[tuple[str, str]] = []
        self._restart()

    def _restart(self) -> None:
        self._epoch, self._turn, self._start = 0, 0, 0
        self._empty = self._failed = 0
        self._window: _Window | None = None
        self._enter()

    def _enter(self) -> None:
        """Take up the shard of the present turn; it is contacted when a sample is wanted."""
        order = generator("stream", self.seed, self._epoch).permutation(len(self.source.urls))[self.lane :: self.lanes]
        if self._turn == len(order):
            self._epoch, self._turn = self._epoch + 1, 0
            return self._enter()
        self._shard_number = int(order[self._turn])
        self._shard = Shard(self.source.urls[self._shard_number], self.source.patience)

    def window(self, number: int) -> _Window:
        """The window that holds the item of this number.

        Raises:
            UnreachableError: shard after shard cannot be fetched.
            AllRejectedError: there is no audio in any shard.
        """
        if number < (self._window.first if self._window else self._start):
            self._shard.close()
            self._restart()
        while self._window is None or number not in self._window:
            url = self._shard.url
            count = self.learned.get(url, self.source.counts.get(url))
            if count is not None and number >= self._start + count:
                self._leave(count)
                continue
            first, samples = self._shard.window(number - self._start, WINDOW, WINDOW_BYTES)
            if samples:
                self._window = self._shuffled(first, samples)
            else:
                self._finish()
        return self._window

    def _shuffled(self, first: int, samples: list[Sample]) -> _Window:
        rng = generator("stream", self.seed, self._epoch, self._shard_number, first)
        return _Window(self._start + first, [samples[place] for place in rng.permutation(len(samples))])

    def _leave(self, count: int) -> None:
        """Go on to the next shard, `count` samples further in the row."""
        self._shard.close()
        self._empty = 0 if count else self._empty + 1
        if self._empty >= len(self.source.urls) + self.lanes:
            reasons = "".join(f"; last: {url} {reason}" for url, reason in self.problems[-1:])
            raise AllRejectedError(
                f"{self.source.name}: there is no audio in {counted(self._empty, 'shard')} in a row{reasons}"
            )
        self._start += count
        self._turn += 1
        self._enter()

    def _finish(self) -> None:
        """Draw the conclusions from a shard that ended, and leave it."""
        shard = self._shard
        if shard.failure is None:
            self._failed = 0
            self.learned[shard.url] = shard.whole
            if shard.damage is not None:
                self.problems.append((shard.url, shard.damage))
        else:
            self.problems.append((shard.url, f"could not be fetched: {shard.failure}"))
            logger.warning(
                "%s: %s; skipped after %d of its recordings: what follows differs from a run that can fetch all of it",
                shard.url, shard.failure, shard.whole,
            )  # fmt: skip
            self._failed += not shard.failure.lasting
            if self._failed >= MAX_FAILURES:
                raise UnreachableError(
                    f"{self.source.name}: {self._failed} shards in a row could not be fetched, the last was "
                    f"{shard.url} ({shard.failure}); see to the network and resume the run."
                )
        self._leave(shard.whole)


@dataclass(frozen=True)
class CropMaker:
    """Makes crops of encoded audio.

    Attributes:
        sampling_rate: Hz.
        max_seconds: longest crop.
        min_samples: shorter recordings are rejected.
    """

    sampling_rate: int
    max_seconds: float
    min_samples: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> np.ndarray:
        """A random crop: float32 [samples].

        Raises:
            AudioError: it cannot be used.
        """
        if sample.problem:
            raise UnreadableAudioError(f"{sample.name}: {sample.problem}")
        with open_audio(AudioBytes(sample.name, sample.content)) as decoder:
            waveform = random_crop(decoder, rng, self.sampling_rate, self.max_seconds)
            check_length(waveform, self.min_samples, self.sampling_rate)
            return waveform


class LaneCrops:
    """Crops of the items of one lane; an unusable sample is replaced by the next usable one of its window.

    If a whole window is unusable, the window that follows stands in for it. So the windows read ahead are kept until
    the items have passed them.

    Args:
        lane: where the samples come from.
        make: makes the crops.
    """

    def __init__(self, lane: Lane, make: CropMaker) -> None:
        self.lane, self.make = lane, make
        self._kept: deque[_Window] = deque()

    def __call__(self, number: int) -> tuple[np.ndarray, str, list[tuple[str, str]]]:
        """The crop float32 [samples] of item `number`, the name of its sample, and what was rejected on the way.

        Raises:
            AllRejectedError: 1000 samples in a row are unusable.
            UnreachableError: shard after shard cannot be fetched.
        """
        rejected: list[tuple[str, str]] = []
        for window in self._windows(number):
            for offset in range(len(window.samples)):
                place = (number - window.first + offset) % len(window.samples)
                name = window.samples[place].name
                crop = self._crop(window, place, (number, len(rejected)))
                if isinstance(crop, np.ndarray):
                    return crop, name, rejected
                rejected.append((name, crop))
                if len(rejected) == MAX_TRIES:
                    name, reason = rejected[0]
                    where = f"{self.lane.source.name}: {MAX_TRIES} recordings in a row"
                    raise AllRejectedError(f"{where} were rejected; first: {name}: {reason}")
        raise AssertionError("the row of windows has no end")

    def _windows(self, number: int) -> Iterator[_Window]:
        """The window of item `number` and those that follow it."""
        if self._kept and number < self._kept[0].first:
            self._kept.clear()
        while self._kept and number >= self._kept[0].end:
            self._kept.popleft()
        for ahead in itertools.count():
            if ahead == len(self._kept):
                self._kept.append(self.lane.window(self._kept[-1].end if self._kept else number))
            yield self._kept[ahead]
            self._kept[ahead].empty_if_bad()

    def _crop(self, window: _Window, place: int, item: tuple[int, int]) -> np.ndarray | str:
        """A crop, or the reason why there is none."""
        if place in window.bad:
            return window.bad[place]
        sample = window.samples[place]
        try:
            return self.make(sample, generator("stream", "crop", self.lane.seed, self.lane.lane, *item))
        except AudioError as error:
            reason = str(error).removeprefix(f"{sample.name}: ")
            if isinstance(error, UnreadableAudioError):
                window.bad[place] = reason  # it holds for every crop, so it need not be tried again
            return reason
