"""Runs of several processes: how they are started and connected, share the work, and end when one of them dies.

`torchrun` and SLURM start all processes themselves; otherwise Fabric starts them by running the same command again.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from bestrq2.child_processes import end_with_parent
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.train.settings import TrainerConfig

_LOST = ("closed by peer", "connection reset", "broken pipe", "socket", "nccl", "gloo", "timed out", "connect")
# The process that launched this one, in its environment.
_LAUNCHED_BY = "BESTRQ2_LAUNCHED_BY"

State = TypeVar("State")


def cluster_environment() -> ClusterEnvironment:
    """Launcher of this process: torchrun, SLURM, or Fabric itself."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Preemption is answered by our own signal handlers; the batch script asks for the requeue.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def launched_by_first() -> bool:
    """Whether this process was started by the first process of its machine, by running the same command again."""
    return isinstance(cluster_environment(), LightningEnvironment) and int(os.environ.get("LOCAL_RANK", 0)) > 0


def first_process() -> bool:
    """Whether this process is the one that writes; known from the environment before the processes are connected."""
    environment = cluster_environment()
    if isinstance(environment, LightningEnvironment):
        return not launched_by_first() and environment.node_rank() == 0
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


def launch(config: TrainerConfig, device: torch.device | None = None) -> Fabric:
    """Start the other processes of the run where nothing else did, and connect them all.

    Args:
        config: accelerator, devices, machines, strategy and precision.
        device: the one device to use in place of `config.devices`; None for those of the configuration.

    Raises:
        ConfigError: a setting that Fabric does not know, or that does not fit this machine.
    """
    devices, num_nodes = launched_shape(config)
    accelerator, chosen = config.accelerator, devices
    if device is not None:
        accelerator = device.type
        if device.index is not None and devices == num_nodes == 1:
            chosen = [device.index]  # type: ignore[assignment]
    os.environ[_LAUNCHED_BY] = str(os.getpid())
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=chosen,
            num_nodes=num_nodes,
            strategy=_strategy(config, devices, num_nodes),
            precision=config.precision,  # type: ignore[arg-type]
            plugins=[cluster_environment()],
        )
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    fabric.launch()
    return fabric


def follow_launcher() -> None:
    """In a process that the first one of the run launched: end when that one ends."""
    if launched_by_first():
        end_with_parent(int(os.environ.get(_LAUNCHED_BY, os.getppid())))


def _strategy(config: TrainerConfig, devices: int, num_nodes: int) -> Strategy | str:
    """How devices share the work: "auto" for one, replicas (DDP), or one model cut into shards (FSDP)."""
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            parallelize_fn=_shard, data_parallel_size=devices * num_nodes, tensor_parallel_size=1
        )
    several = devices * num_nodes != 1
    return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False) if several else "auto"


def _shard(task: nn.Module, mesh: Any) -> nn.Module:
    """Cut the model of a task along the mesh of devices.

    Every block is gathered when it is needed; what is outside of the blocks is gathered once a step.
    """
    from bestrq2.model.conformer import ConformerBlock
    from bestrq2.model.transformer import Block

    model = task.get_submodule("model")
    for part in model.modules():
        if isinstance(part, Block | ConformerBlock):
            fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False)
    return task


@contextmanager
def usable_parts(model: nn.Module) -> Iterator[None]:
    """In this block parts of a model may be called by themselves, also where it is cut into shards."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def connected() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def disconnect() -> None:
    """Leave the group of processes; each must do so, after the last exchange and when its model is out of scope.

    DDP's reducer, if it outlived the group, would drop the last reference to it while holding Python's lock, and wait
    forever for a thread of Gloo that needs that lock.
    """
    if connected():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


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

    The request travels beside the training step over a group of its own on the CPU, and counts one step later.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if connected() else None
        self._pending: tuple[Any, Tensor] | None = None

    def reached(self, request: bool) -> bool:
        """Add this process's request; returns whether any process made one at the step before.

        In a run of one process the request counts at once.
        """
        if self._group is None:
            return request
        agreed = self._taken()
        flag = torch.tensor([int(request)])
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


@contextmanager
def lost_processes_named(place: Any) -> Iterator[None]:
    """Turn the error of torch after another process of the run or a loader's worker died into one sentence.

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
    """Rewords Fabric's message that a process it launched has ended, after which all others follow."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep that one message, reworded."""
        text = record.getMessage()
        if "terminated with code" not in text:
            return False
        record.msg = (
            "bestrq2: a process of this run was lost (" + text.split(" Forcefully")[0] + "): all others are "
            "stopped; continue with --resume"
        )
        record.args = ()
        return True


@contextmanager
def quiet_fabric() -> Iterator[None]:
    """Keep notices of Fabric (devices, tips) from hiding ours, and ours from coming from several processes."""
    launcher, reword = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script"), ChildEndFilter()
    names = ("lightning_fabric", "lightning_fabric.utilities.rank_zero", launcher.name, "bestrq2")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names[:2]:
        logging.getLogger(name).setLevel(logging.ERROR)
    launcher.setLevel(logging.INFO)
    launcher.addFilter(reword)
    if not first_process():
        logging.getLogger("bestrq2").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning_fabric\..*")
            warnings.filterwarnings("ignore", message=r".*srun.*")
            yield
    finally:
        launcher.removeFilter(reword)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
