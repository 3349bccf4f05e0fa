"""Time and memory of a training step: measured on a few rows, extrapolated to a batch, and the batch that fits."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from bestrq2.data.batch import AudioBatch, RowWriter
from bestrq2.data.rows import buffer_samples
from bestrq2.errors import ConfigError
from bestrq2.inference.embedder import checked_device
from bestrq2.recipe_book import recipe
from bestrq2.report.scales import time_unit
from bestrq2.text import counted
from bestrq2.train.guard import gradient_norm
from bestrq2.train.objective import MaskDrawer, PretrainingTask, build_model, model_config
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.processes import gathered, launch, launched_shape
from bestrq2.train.settings import LoaderConfig, PretrainConfig, resolve

logger = logging.getLogger(__name__)

# At most: weights, gradients and both moments of AdamW (Muon has one); the average of the weights comes on top.
_STATE_BYTES = 16
# Rows of the two steps whose memory is measured on a GPU; larger ones are on a line with them.
_SIZES = (2, 4)
# The same elsewhere, where the bytes are counted and have no grain.
_COUNTED = (1, 2)
# Shares of the available memory that a step may take: a GPU's allocator leaves gaps between tensors of changing shapes,
# and the memory of a CPU is shared with the loader and other programs.
_GPU_SHARE, _CPU_SHARE = 0.85, 0.5
# Audio of a step (s) above which a CPU gains nothing: that of the recipes of size tiny, which are made for CPUs.
_MOST_ON_CPU = 320.0
# Time (s) after which no larger step is timed.
_MEASURING = 3.0


@dataclass(frozen=True)
class Line:
    """A quantity that grows linearly with the rows of a batch."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Line:
        """The line through two measurements (rows, value), which never falls."""
        if first[0] == second[0]:
            return cls(0.0, first[1] / first[0])
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
        return cls(max(0.0, second[1] - slope * second[0]), slope)

    def at(self, rows: int) -> float:
        """The quantity for so many rows."""
        return self.fixed + self.per_row * rows


class StepMeter:
    """Measures training steps of a run on rows of noise, with its model, precision and optimiser.

    Each process measures its own step without exchanging gradients. Blocks are not compiled.

    Args:
        config: settings of the run.
        fabric: devices and precision, launched.
    """

    def __init__(self, config: PretrainConfig, fabric: Fabric) -> None:
        self.config, self.fabric, self.device = config, fabric, fabric.device
        self.task = PretrainingTask(build_model(config), config.seed).to(self.device).train()
        self.parameters = list(self.task.parameters())
        self.optimizer = make_optimizer(self.task.model, config.optimizer, "32-true")

    def memory(self) -> Line:
        """Bytes at the peak of a step: those that the GPU's allocator had given out; elsewhere those of weights,
        gradients, moments and tensors that are kept for the backward pass.
        """
        on_gpu, values = self.device.type == "cuda", sum(parameter.numel() for parameter in self.parameters)
        peaks = [
            (rows, max(self._peak(rows, share) for share in self._shares()))
            for rows in (_SIZES if on_gpu else _COUNTED)
        ]
        line = Line.through(*peaks)
        extra = 4 * values if self.config.trainer.ema else 0
        return replace(line, fixed=line.fixed + extra + (0 if on_gpu else _STATE_BYTES * values))

    def seconds(self, most_rows: int) -> Line:
        """Seconds of a step of one batch, from two or more numbers of rows up to so many."""
        began, rows = time.monotonic(), 1
        found: list[tuple[int, float]] = []
        self._step(rows)  # sets up what is made once
        while rows <= most_rows and (len(found) < 2 or time.monotonic() - began < _MEASURING):
            found.append((rows, self._timed(rows)))
            rows = 2 * rows if rows == most_rows else min(2 * rows, most_rows)
        return Line.through(found[-2] if len(found) > 1 else found[0], found[-1])

    def _shares(self) -> set[float]:
        """Lowest and highest share of hidden patches: which of them takes more memory depends on the model."""
        return set(self.config.model.mask_ratio)

    def _peak(self, rows: int, share: float) -> float:
        if self.device.type != "cuda":
            with kept_bytes(self.parameters) as kept:
                loss = self._loss(rows, share)
                del loss
            return float(sum(kept.values()))
        self._step(rows, share)  # with it the moments are there
        torch.cuda.reset_peak_memory_stats(self.device)
        self._step(rows, share)
        return float(torch.cuda.max_memory_allocated(self.device))

    def _timed(self, rows: int) -> float:
        self._synchronize()
        began = time.perf_counter()
        self._step(rows)
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def _step(self, rows: int, share: float | None = None) -> None:
        self._loss(rows, share).backward()
        gradient_norm(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, rows: int, share: float | None = None) -> Tensor:
        """Loss per hidden patch of a batch of packed rows, by default at the mean share of hidden patches."""
        batch = self._batch(rows, share)
        with self.fabric.autocast():
            return self.task(self.task.inputs(batch, self.device))["loss"] / max(1, self.task.terms(batch))

    def _batch(self, rows: int, share: float | None) -> AudioBatch:
        """Rows of two clips of noise each, or of one, where the model cannot tell several apart."""
        fields = self.config.model
        capacity = fields.columns(fields.max_samples)
        clips = 1 if fields.encoder_type == "conformer" or capacity < 4 else 2
        noise = np.random.default_rng(0).normal(0, 0.1, fields.max_samples // clips).astype(np.float32)
        writer = RowWriter(fields, rows, capacity, buffer_samples(capacity, clips, fields))
        for row in range(rows):
            for _ in range(clips):
                writer.add(row, noise)
        batch = writer.batch(0, range(rows))
        config, hidden = model_config(fields), sum(fields.mask_ratio) / 2 if share is None else share
        config.mask_ratio = (hidden, hidden)
        batch.hidden_mask = MaskDrawer(config, self.config.seed, 1, rows)(batch.packing.segments, 0, batch.places)
        return batch


@contextmanager
def kept_bytes(parameters: list[Any]) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps for the backward pass in this block, by address, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def available_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of a GPU, or of this machine or its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    limits = []
    with suppress(OSError, ValueError, IndexError):
        limits.append(1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    if not limits:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits)


def fitting_seconds(config: PretrainConfig, fabric: Fabric) -> float:
    """Audio of a step (s) for `loader.batch_seconds auto`, the same in all processes.

    That is the batch of the recipe, on a CPU at most 320 s, or the largest that fits the memory of the devices.

    Args:
        config: settings of the run.
        fabric: devices and processes of the run, launched.

    Raises:
        ConfigError: not even one row fits, or the model is cut into shards.
    """
    if config.trainer.strategy == "fsdp":
        raise ConfigError("loader.batch_seconds auto does not work with trainer.strategy fsdp; give a number")
    longest, batches = config.model.max_seconds, config.trainer.accumulate_grad_batches
    on_gpu = fabric.device.type == "cuda"
    usable = (_GPU_SHARE if on_gpu else _CPU_SHARE) * available_bytes(fabric.device)
    if not on_gpu:
        usable /= max(1, launched_shape(config.trainer)[0])
    line = StepMeter(config, fabric).memory()
    release(fabric.device)
    fitting = min(gathered(int((usable - line.fixed) / max(1.0, line.per_row))))
    if fitting < 1:
        raise ConfigError(
            f"loader.batch_seconds auto: a step of one row of {longest:g} s needs about {gigabytes(line.at(1))}, and "
            f"{gigabytes(usable)} can be used; set trainer.gradient_checkpointing true, or take a smaller model"
        )
    own = recipe(config.recipe).get("loader", {}).get("batch_seconds")
    most = float(own) if isinstance(own, int | float) else float(LoaderConfig.batch_seconds)
    wanted, reason = (
        (most, "the batch of the recipe")
        if on_gpu or most <= _MOST_ON_CPU
        else (_MOST_ON_CPU, f"on a CPU no more, the recipe has {most:g}")
    )
    group = batches * fabric.world_size
    each = max(1, round(wanted / longest) // group)
    if fitting < each:
        each, reason = fitting, f"the recipe has {most:g}: to keep that, give it and raise accumulate_grad_batches"
    seconds = each * group * longest
    logger.info(
        "loader.batch_seconds: %g (%s); a step takes about %s of the %s that can be used",
        seconds, reason, gigabytes(line.at(each)), gigabytes(usable),
    )  # fmt: skip
    return seconds


def release(device: torch.device) -> None:
    """Free the memory of a model that is out of scope."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gigabytes(size: float) -> str:
    """Bytes in words, "17.2 GB"."""
    return f"{size / 1e9:.3g} GB"


def run_estimate(name: str, hours: float | None, device: str | None) -> dict[str, str]:
    """How long a run of a recipe takes on this machine, how much it hears, and its memory, in words.

    Args:
        name: recipe or recipe file.
        hours: audio of the corpus (h); None where it is not known.
        device: the one device that trains; None for CUDA if available, else the CPU.

    Raises:
        ConfigError: `hours` is not above 0, or there is no such device.
    """
    if hours is not None and not 0 < hours < float("inf"):
        raise ConfigError(f"hours must be above 0, got {hours:g}")
    config = resolve({"recipe": name, "data": name, "output": name})
    config = replace(config, trainer=replace(config.trainer, devices=1, num_nodes=1, strategy="auto"))
    fabric = launch(config.trainer, checked_device(device))
    if config.loader.batch_seconds == "auto":
        config = replace(config, loader=replace(config.loader, batch_seconds=fitting_seconds(config, fabric)))
    logger.info("measuring a few steps on %s", fabric.device)
    meter, batches = StepMeter(config, fabric), config.trainer.accumulate_grad_batches
    rows, available = config.step_rows // batches, available_bytes(fabric.device)
    memory = meter.memory()
    fitting = int((_GPU_SHARE * available - memory.fixed) / max(1.0, memory.per_row))
    seconds = batches * meter.seconds(max(1, min(rows, fitting))).at(rows)
    steps, heard = config.trainer.max_steps, float(config.loader.batch_seconds) * config.trainer.max_steps / 3600
    times = "" if hours is None else f", each of the {hours:g} h {_amount(heard / hours)} times"
    words = counted(torch.get_num_threads(), "thread")
    if fabric.device.type == "cuda":
        words = torch.cuda.get_device_name(fabric.device)
    factor, unit = time_unit(seconds * steps)
    short = "; does not fit: raise trainer.accumulate_grad_batches" if fitting < rows else ""
    peak = f"about {gigabytes(memory.at(rows))} for the model and its step, of {gigabytes(available)}"
    return {
        "estimate": f"from a few steps on {fabric.device} ({words}), if reading audio keeps up",
        "time per step": f"{seconds:.3g} s for {counted(config.step_rows, 'row')} of {config.model.max_seconds:g} s",
        "time of the run": f"{_amount(seconds * steps / factor)} {unit} for {counted(steps, 'step')}",
        "hears": f"{_amount(heard)} h{times}",
        "peak memory": peak + short,
    }


def _amount(value: float) -> str:
    """A number in three digits or more, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
