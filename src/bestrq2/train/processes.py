"""Several processes, one run: who started them, how they share the work, and what happens when one of them dies.

`torchrun` and SLURM start all processes themselves; otherwise Lightning starts them by running the same command again.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.train.settings import TrainerConfig

logger = logging.getLogger(__name__)

# Looked at this often, a parent that died is noticed long before a job's time is wasted.
_WATCH_SECONDS = 1.0
_LOST = ("closed by peer", "connection reset", "broken pipe", "socket", "nccl", "gloo", "timed out", "connect")

State = TypeVar("State")


def cluster_environment() -> ClusterEnvironment:
    """What started this process: torchrun, SLURM, or Lightning itself."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Preemption is answered by our own signal handlers; the batch script asks for the requeue.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def started_by_lightning() -> bool:
    """Whether this process was started by the first process of its machine."""
    return isinstance(cluster_environment(), LightningEnvironment) and int(os.environ.get("LOCAL_RANK", 0)) > 0


def first_process() -> bool:
    """Whether this process is the one that writes; known from the environment before the processes are connected."""
    environment = cluster_environment()
    if isinstance(environment, LightningEnvironment):
        return not started_by_lightning() and environment.node_rank() == 0
    return environment.global_rank() == 0


def launched_shape(config: TrainerConfig) -> tuple[int, int]:
    """Devices on each machine and number of machines: those of the launcher where there is one, else the configured.

    Raises:
        ConfigError: if a launcher started different numbers of processes on its machines.
    """
    environment = cluster_environment()
    if isinstance(environment, TorchElasticEnvironment):
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    elif isinstance(environment, SLURMEnvironment):
        world = int(os.environ["SLURM_NTASKS"])
        nodes = int(os.environ.get("SLURM_NNODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1)
        local = max(1, world // nodes)
    else:
        return config.devices, config.num_nodes
    if world % local:
        raise ConfigError(f"{world} processes cannot be {local} on each machine; start equally many everywhere")
    return local, world // local


def make_strategy(config: TrainerConfig, devices: int, num_nodes: int) -> Strategy | str:
    """How devices share the work: "auto" for one, replicas (DDP), or one model cut into shards (FSDP)."""
    several = devices * num_nodes != 1
    if config.strategy == "fsdp":
        if devices < 1:
            raise ConfigError("trainer.strategy fsdp needs a number in trainer.devices, not -1")
        return ModelParallelStrategy(
            data_parallel_size=devices * num_nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False) if several else "auto"


def connected() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduced(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes; the tensors given stay as they are."""
    totals = {name: value.clone() for name, value in sums.items()}
    if connected():
        for name in sorted(totals):
            dist.all_reduce(totals[name])
    return totals


def gathered(state: State) -> list[State]:
    """The small state of every process, in their order, on all of them."""
    if not connected():
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


class Agreement:
    """Whether any process wants to stop, known to all at the same step without waiting for each other.

    The wish travels beside the training step over a group of its own on the CPU, and counts one step later.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if connected() else None
        self._pending: tuple[Any, Tensor] | None = None

    def reached(self, wish: bool) -> bool:
        """Tell this process's wish; returns whether any process had told its own at the step before.

        Alone, the wish counts at once.
        """
        if self._group is None:
            return wish
        agreed = self._taken()
        flag = torch.tensor([int(wish)])
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag)
        return agreed

    def _taken(self) -> bool:
        if self._pending is None:
            return False
        work, flag = self._pending
        work.wait()
        self._pending = None
        return bool(flag.item())

    def close(self) -> None:
        """Take what is still on its way."""
        self._taken()


def watch_parent() -> None:
    """End this process soon after the one that started it died; without it, it would wait for that one for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        logger.error("the first process of the run is gone: this one ends too")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


@contextmanager
def lost_processes_named(place: Any) -> Iterator[None]:
    """Turn what torch says when another process of the run or a loader's worker died into one sentence.

    Raises:
        BestRQ2Error: which process it was, and how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if "dataloader worker" in text:
            raise BestRQ2Error(
                f"{place}: a process that reads data ended unexpectedly ({str(error).splitlines()[0]}); if memory ran "
                "out set loader.num_workers lower, then continue with --resume"
            ) from error
        if not connected() or not any(word in text for word in _LOST):
            raise
        reason = re.sub(r"\[[^\]]*\.(?:cc|cpp|h):\d+\]\s*", "", " ".join(str(error).split())).split(". ")[0]
        raise BestRQ2Error(
            f"{place}: process {dist.get_rank()} of {dist.get_world_size()} lost another one, which ended or was "
            f"killed ({reason}); continue with --resume"
        ) from error


class ChildEndFilter(logging.Filter):
    """Lets Lightning say in our words that a process it started has ended, and that all others follow."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep that one message, reworded."""
        text = record.getMessage()
        if "terminated with code" not in text:
            return False
        record.msg = (
            "bestrq2 pretrain: a process of this run was lost (" + text.split(" Forcefully")[0] + "): all others are "
            "stopped; continue with --resume"
        )
        record.args = ()
        return True
