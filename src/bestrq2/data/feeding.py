"""Batches and validation crops of any kind of source: the one place where the kinds are told apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from bestrq2.data.batches import (
    AudioBatch,
    CropDataset,
    DrawMask,
    check_length,
    check_seed,
    make_loader,
    rejection,
    worker_settings,
)
from bestrq2.data.decoding import to_float32
from bestrq2.data.lanes import CropMaker
from bestrq2.data.remote import StreamSource
from bestrq2.data.schedule import BatchSchedule, check_share
from bestrq2.data.sources import Source, split_source
from bestrq2.data.stream import StreamDataset, stream_crops
from bestrq2.errors import AudioError
from bestrq2.seeding import generator

# First word of the seed sequence of validation crops.
FIXED = 0xF18ED


class Share(NamedTuple):
    """Which batches a process makes, and its part of them; see `Feed.loader`."""

    batch_size: int
    start_step: int
    max_steps: int | None
    rank: int
    world_size: int


class Feed(ABC):
    """Audio on its way to training.

    `recordings` is their number in one epoch; None where only reading all of it would tell.
    """

    recordings: int | None = None

    def loader(
        self,
        batch_size: int,
        start_step: int = 0,
        num_workers: int = 0,
        draw_mask: DrawMask | None = None,
        max_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterable[AudioBatch]:
        """The batches of a run; any number of workers and processes makes the same ones.

        Args:
            batch_size: of the global batch, over all processes.
            start_step: first step; a resumed run gives the number of steps done.
            num_workers: processes that decode; 0 decodes in this one.
            draw_mask: draws the hidden patches; None leaves that to the model.
            max_steps: step before which to stop; None for never.
            rank: number of this process.
            world_size: number of processes.

        Raises:
            ConfigError: sizes or numbers that are impossible together.
        """
        return self._loader(Share(batch_size, start_step, max_steps, rank, world_size), num_workers, draw_mask)

    @abstractmethod
    def _loader(self, share: Share, num_workers: int, draw_mask: DrawMask | None) -> Iterable[AudioBatch]:
        """The batches of a process."""


class SourceFeed(Feed):
    """Batches of a source with numbered recordings.

    Args:
        source: where the audio comes from.
        sampling_rate: Hz.
        max_seconds: longest crop.
        seed: of order and crops.
        min_samples: shorter recordings are rejected.

    Raises:
        ConfigError: a crop of no length, or a negative seed.
        DataError: there are no recordings.
    """

    def __init__(self, source: Source, sampling_rate: int, max_seconds: float, seed: int, min_samples: int = 1) -> None:
        self.recordings = len(source)
        self._dataset = CropDataset(source, sampling_rate, max_seconds, seed, min_samples)

    def _loader(self, share: Share, num_workers: int, draw_mask: DrawMask | None) -> Iterable[AudioBatch]:
        return make_loader(self._dataset, BatchSchedule(self._dataset.order, *share), num_workers, draw_mask)


class StreamFeed(Feed):
    """Batches of a stream.

    Args:
        source: where the audio comes from.
        make: makes the crops.
        seed: of order and crops.
    """

    def __init__(self, source: StreamSource, make: CropMaker, seed: int) -> None:
        self.source, self.make, self.seed = source, make, seed

    def _loader(self, share: Share, num_workers: int, draw_mask: DrawMask | None) -> Iterable[AudioBatch]:
        batch_size, start_step, max_steps, rank, world_size = share
        check_share(batch_size, start_step, rank, world_size)
        steps = range(start_step, 1 << 62 if max_steps is None else max_steps)
        dataset = StreamDataset(self.source, self.make, self.seed, batch_size, steps, draw_mask, rank, world_size)
        longest = max(1, round(self.make.max_seconds * self.make.sampling_rate))
        settings = worker_settings(num_workers, batch_samples=batch_size // world_size * longest)
        pin = torch.cuda.is_available()
        return DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, pin_memory=pin, **settings)


def _as_it_is(batch: Any) -> Any:
    return batch


def make_feed(
    source: Source | StreamSource, sampling_rate: int, max_seconds: float, seed: int, min_samples: int = 1
) -> Feed:
    """The feed of any source.

    Args:
        source: where the audio comes from.
        sampling_rate: Hz.
        max_seconds: longest crop.
        seed: of order and crops, 0 or more.
        min_samples: shorter recordings are rejected.

    Raises:
        ConfigError: a crop of no length, or a negative seed.
        DataError: there are no recordings.
    """
    if isinstance(source, StreamSource):
        check_seed(seed)
        return StreamFeed(source, CropMaker(sampling_rate, max_seconds, min_samples), seed)
    return SourceFeed(source, sampling_rate, max_seconds, seed, min_samples)


def split_any(
    source: Source | StreamSource, num_validation: int, seed: int
) -> tuple[Source | StreamSource, Source | StreamSource | None]:
    """Two disjoint parts of any source, for training and validation; see `split_source` and `StreamSource.split`."""
    if isinstance(source, StreamSource):
        return source.split(num_validation, seed)
    return split_source(source, num_validation, seed)


def fixed_crops(
    source: Source | StreamSource,
    count: int,
    seed: int,
    sampling_rate: int,
    max_seconds: float,
    min_samples: int = 1,
    rejected: list[tuple[str, str]] | None = None,
) -> list[np.ndarray]:
    """Crops for a validation loss: always the same ones.

    Args:
        source: where the audio comes from.
        count: wanted crops, each from another recording.
        seed: of choice and position.
        sampling_rate: Hz.
        max_seconds: longest crop.
        min_samples: shorter recordings are rejected.
        rejected: recordings that cannot be used are added to it, each with the reason.

    Returns:
        Waveforms float32 [samples]; fewer than `count`, even none, where the source holds fewer usable recordings.
    """
    if isinstance(source, StreamSource):
        return stream_crops(source, count, seed, CropMaker(sampling_rate, max_seconds, min_samples), rejected)
    crops: list[np.ndarray] = []
    for index in map(int, generator(FIXED, seed).permutation(len(source))):
        if len(crops) == count:
            break
        try:
            crop = source.read(index, sampling_rate, generator(FIXED, seed, index), max_seconds)
            check_length(crop, min_samples, sampling_rate)
            crops.append(to_float32(crop))
        except AudioError as error:
            if rejected is not None:
                rejected.append((source.describe(index), rejection(source, index, error)))
    return crops


def count_recordings(source: Source | StreamSource | None) -> int | None:
    """Recordings of any source; None where only reading all of it would tell, 0 for no source."""
    if isinstance(source, StreamSource):
        return None
    return len(source) if source is not None else 0
