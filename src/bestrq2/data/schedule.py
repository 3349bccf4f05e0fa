"""What belongs into each batch: the keys of its items, as a pure function of the step and the place in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from bestrq2.data.order import Order
from bestrq2.errors import ConfigError


class CropKey(NamedTuple):
    """Names one item of one batch.

    Attributes:
        epoch: passes over the source before this one.
        recording: its number in the source.
        step: the batch.
        place: position in the global batch.
    """

    epoch: int
    recording: int
    step: int
    place: int


def check_share(batch_size: int, start_step: int, rank: int, world_size: int) -> None:
    """Pass if the processes can share batches of this size; see `BatchSchedule`.

    Raises:
        ConfigError: sizes that are not positive, a rank out of range, or a batch that cannot be shared equally.
    """
    if batch_size < 1 or start_step < 0:
        raise ConfigError(
            f"A schedule of batches of {batch_size} from step {start_step} on is impossible; give a batch size of "
            "at least 1 and a step of at least 0."
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size} processes does not exist; expected 0 to {world_size - 1}.")
    if batch_size % world_size:
        raise ConfigError(
            f"The global batch size {batch_size} is not divisible by the {world_size} processes; "
            f"use {batch_size + world_size - batch_size % world_size}."
        )


class BatchSchedule(Sampler[list[CropKey]]):
    """The keys of every batch, for one of several processes.

    Place q of step s is item number s * batch_size + q of the order; a batch may reach over the end of an epoch.

    Args:
        order: which recording comes when; the dataset's.
        batch_size: of the global batch, over all processes.
        start_step: first step; a resumed run gives the number of steps done.
        max_steps: step before which to stop; None for never.
        rank: number of this process; it gets the places that leave this remainder when divided by `world_size`.
        world_size: number of processes.

    Raises:
        ConfigError: sizes that are not positive, a rank out of range, or a batch that cannot be shared equally.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        start_step: int = 0,
        max_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, start_step, rank, world_size)
        self.order = order
        self.batch_size = batch_size
        self.start_step = start_step
        self.max_steps = max_steps
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Steps left.

        Raises:
            TypeError: the schedule is endless.
        """
        if self.max_steps is None:
            raise TypeError("an endless schedule has no length")
        return max(0, self.max_steps - self.start_step)

    def __iter__(self) -> Iterator[list[CropKey]]:
        step = self.start_step
        while self.max_steps is None or step < self.max_steps:
            places = range(self.rank, self.batch_size, self.world_size)
            yield [CropKey(*self.order(step * self.batch_size + place), step, place) for place in places]
            step += 1
