"""`bestrq2 replay`: repeat a failed training step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bestrq2 import flags

if TYPE_CHECKING:
    from bestrq2.train.replay import ReplayResult


def replay(failure: str | os.PathLike[str], device: str | None = None, rank: int | None = None) -> ReplayResult:
    """Repeat a training step that was saved because its loss or gradient was not finite, and find where it failed.

    Args:
        failure: folder of the saved step, such as RUN/failures/step-00000123.
        device: device to run on, such as "cpu" or "cuda:0"; by default one like the run's where available, else the
            CPU.
        rank: process whose batches to repeat; those of all processes by default, one after the other.

    Returns:
        Losses and gradient norm beside the recorded ones, and the first module, clip and weight that are not finite.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: there is no such rank or device.
    """
    from bestrq2.train.replay import replay_step

    return replay_step(failure, device=device, rank=rank)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 replay`."""
    print(replay(**flags.parse_command(replay, argv, positional=("failure",))))
