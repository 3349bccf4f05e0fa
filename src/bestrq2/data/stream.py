"""Streams: remote shards that are opened by URL and read from beginning to end, as batches for training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from bestrq2.data.batch import AudioBatch, Crop, DrawMask, collate
from bestrq2.data.lanes import CropMaker, Lane, LaneCrops, Lanes, UnreachableError
from bestrq2.data.order import CropKey
from bestrq2.data.remote import StreamSource
from bestrq2.data.transfer import Shard
from bestrq2.errors import AudioError
from bestrq2.seeding import generator


class StreamDataset(IterableDataset[AudioBatch]):
    """Finished batches of a stream; worker w of n makes every n-th step from the w-th on, as a DataLoader asks for.

    Args:
        source: the shards.
        make: makes the crops.
        seed: of orders and crops.
        batch_size: of the global batch, over all processes.
        steps: the steps to make; a resumed run starts where it stopped.
        draw_mask: draws the hidden patches; None leaves that to the model.
        rank: number of this process; it gets the places that leave this remainder when divided by `world_size`.
        world_size: number of processes.
    """

    def __init__(
        self,
        source: StreamSource,
        make: CropMaker,
        seed: int,
        batch_size: int,
        steps: range,
        draw_mask: DrawMask | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source, self.make, self.seed, self.steps = source, make, seed, steps
        self.places = range(rank, batch_size, world_size)
        self.lanes = Lanes.of(len(source.urls), batch_size)
        self.draw_mask = draw_mask

    def __iter__(self) -> Iterator[AudioBatch]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        crops: dict[int, LaneCrops] = {}
        reported: dict[str, int] = dict(self.source.counts)
        for step in self.steps[first::every]:
            items = [self._item(crops, step, place) for place in self.places]
            batch = collate(items, self.draw_mask)
            for reader in crops.values():
                batch.rejected += reader.lane.problems
                reader.lane.problems = []
                batch.shard_counts |= {k: v for k, v in reader.lane.learned.items() if reported.get(k) != v}
            reported |= batch.shard_counts
            yield batch

    def _item(self, crops: dict[int, LaneCrops], step: int, place: int) -> Crop:
        lane, number = self.lanes.item(step, place)
        if lane not in crops:
            crops[lane] = LaneCrops(Lane(self.source, self.seed, lane, len(self.lanes)), self.make)
        waveform, name, rejected = crops[lane](number)
        return Crop(CropKey(0, number, step, place), waveform, tuple(rejected), name)


def stream_crops(
    source: StreamSource, count: int, seed: int, make: CropMaker, rejected: list[tuple[str, str]] | None = None
) -> list[np.ndarray]:
    """Crops for a validation loss: of the first usable samples, always the same ones; see `fixed_crops`."""
    crops: list[np.ndarray] = []
    rejected = [] if rejected is None else rejected
    for url in source.urls:
        shard, number = Shard(url, source.patience), 0
        while len(crops) < count and (samples := shard.window(number, 1)[1]):
            (sample,) = samples
            try:
                crops.append(make(sample, generator("stream", "fixed", seed, number)))
            except AudioError as error:
                rejected.append((sample.name, str(error).removeprefix(f"{sample.name}: ")))
            number += 1
        shard.close()
        if shard.failure is not None:
            raise UnreachableError(f"{url} cannot be fetched: {shard.failure}.")
        if shard.damage is not None:
            rejected.append((url, shard.damage))
        if len(crops) == count:
            break
    return crops
