"""Failed steps: what a run saves when it must stop, and `bestrq2 replay`, which takes such a step again.

`RUN/failures/step-00000123/` holds `state.ckpt` (weights, optimiser, counters, settings), `rank-0.ckpt` with the
batches of each process, each with its checksum, and `failure.json` with the facts for people.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from bestrq2.data.batch import AudioBatch
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.files import disk_errors, write_text
from bestrq2.inference.embedder import checked_device
from bestrq2.model.log_mel import LogMel
from bestrq2.model.packing import Packing
from bestrq2.train.checkpoints import CheckpointStore, read_state, write_state
from bestrq2.train.guard import Guard, gradient_norm, marked
from bestrq2.train.objective import PretrainingTask, build_model, model_config
from bestrq2.train.run_folder import RunFolder, environment
from bestrq2.train.settings import PretrainConfig, resolve
from bestrq2.train.task import Task, seed_noise
from bestrq2.train.teacher import Teacher

# Gradients of several processes are added in another order here than they were there.
_ROUNDING = 1e-4


def save_failure(
    folder: Path, state: dict[str, Any], parts: Sequence[AudioBatch], guard: Guard, task: Task, fabric: Fabric
) -> None:
    """Save a step that was skipped; every process must call it.

    Args:
        folder: folder to write.
        state: state of the run, its weights still as they were before the step; whole in the first process.
        parts: batches of this step in this process.
        guard: knows losses and gradient norm.
        task: knows the terms of a loss.
        fabric: processes, device and precision.

    Raises:
        BestRQ2Error: if the disk is full or refuses.
    """
    batches: list[dict[str, Any]] = [
        {
            "input_values": part.input_values.detach().cpu(),
            "lengths": part.lengths,
            "packing": dict(vars(part.packing)),
            "places": part.places,
            "hidden_mask": part.hidden_mask,
            "recordings": list(part.recordings),
            "number": part.step,
            "loss": float(loss) / task.terms(part),
        }
        for part, loss in zip(parts, guard.losses, strict=True)
    ]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_state(folder / f"rank-{fabric.global_rank}.ckpt", {"batches": batches})
        fabric.barrier()
        if fabric.is_global_zero:
            scaler = getattr(fabric.strategy.precision, "scaler", None)
            facts = {
                "step": state["global_step"],
                "skipped_in_a_row": int(guard.in_a_row),
                "ranks": fabric.world_size,
                "loss": [_to_json(batch["loss"]) for batch in batches],
                "gradient_norm": _to_json(float(guard.norm)),
                # a float16 scaler has reduced its scale since the step
                "loss_scale": 1.0 if scaler is None else float(scaler.get_scale() / scaler.get_backoff_factor()),
                "precision": getattr(fabric.strategy.precision, "precision", "32-true"),
                "device": str(fabric.device),
                "environment": environment(),
            }
            write_state(folder / "state.ckpt", state)
            write_text(folder / "failure.json", json.dumps(facts, indent=2) + "\n")  # last: with it the rest is whole


def _to_json(value: float) -> float | str:
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Failure:
    """A saved step.

    Attributes:
        facts: content of failure.json.
        state: weights and settings, as in a checkpoint.
        ranks: batches of every process; each batch with its recorded loss, nats.
    """

    facts: dict[str, Any]
    state: dict[str, Any]
    ranks: list[list[tuple[AudioBatch, float]]]


def load_failure(folder: Path) -> Failure:
    """Read a saved step; nothing in it can run code.

    Raises:
        CheckpointError: missing, or damaged, naming the file.
    """
    if not (folder / "failure.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no saved step (failure.json is missing); name a folder like RUN/failures/step-00000123"
        )
    file = folder / "failure.json"
    try:
        facts = json.loads(file.read_text())
        facts = {**facts, **{name: float(facts[name]) for name in ("gradient_norm", "loss_scale")}}
        ranks = int(facts["ranks"])
        file = folder / "state.ckpt"
        state = _checked_state(file)
        if not {"state_dict", "bestrq2"} <= state.keys():
            raise CheckpointError(f"{file}: holds no training state")
        loaded = []
        for rank in range(ranks):
            file = folder / f"rank-{rank}.ckpt"
            loaded.append([_batch(saved) for saved in _checked_state(file)["batches"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({' '.join(str(error).split())[:200]})") from error
    return Failure(facts, state, loaded)


def _checked_state(file: Path) -> dict[str, Any]:
    if damage := CheckpointStore(file.parent).damage(file):
        raise CheckpointError(damage)
    return read_state(file)


def _batch(saved: dict[str, Any]) -> tuple[AudioBatch, float]:
    batch = AudioBatch(
        input_values=saved["input_values"],
        lengths=saved["lengths"],
        step=saved["number"],
        places=saved["places"],
        hidden_mask=saved["hidden_mask"],
        recordings=saved["recordings"],
        packing=Packing(**saved["packing"]),
    )
    return batch, float(saved["loss"])


@dataclass(frozen=True)
class ClipCheck:
    """One clip of a replayed step.

    Attributes:
        rank: number of the process that had it.
        place: place of its row in the global batch.
        recording: name of the recording.
        seconds: length, s.
        audio_finite: whether all samples are finite.
        log_mel_finite: whether its whole spectrogram is.
    """

    rank: int
    place: int
    recording: str
    seconds: float
    audio_finite: bool
    log_mel_finite: bool

    def __str__(self) -> str:
        faults = [name for name, fine in (("audio", self.audio_finite), ("log-mel", self.log_mel_finite)) if not fine]
        fault = f", {' and '.join(faults)} NOT FINITE" if faults else ""
        return f"rank {self.rank} place {self.place}: {self.seconds:.2f} s{fault}, {self.recording or '(unnamed)'}"


@dataclass(frozen=True)
class ReplayResult:
    """Outcome of a step that was taken again.

    Attributes:
        step: its number, from 1.
        losses: mean loss of every replayed batch, nats: rank by rank, accumulated batches in their order.
        recorded_losses: those of the run.
        gradient_norm: of all replayed processes together.
        recorded_gradient_norm: that of the run; None if only some of the processes were replayed.
        reproduced: whether every figure is as recorded: the same bits (a norm over several processes: up to rounding),
            or not finite both times.
        first_weight: first parameter or buffer that was not finite before the step; None if all were.
        first_module: first module, in the order of the forward pass, whose output was not finite.
        first_gradient: first parameter, in the order of the backward pass, whose gradient was not finite.
        clips: the clips of the step.
    """

    step: int
    losses: list[float]
    recorded_losses: list[float]
    gradient_norm: float
    recorded_gradient_norm: float | None
    reproduced: bool
    first_weight: str | None
    first_module: str | None
    first_gradient: str | None
    clips: list[ClipCheck]

    def __str__(self) -> str:
        """One line per finding."""
        norm = "" if self.recorded_gradient_norm is None else f" (recorded: {self.recorded_gradient_norm:g})"
        odd = [clip for clip in self.clips if not (clip.audio_finite and clip.log_mel_finite)]
        lines = [
            f"step {self.step}: {'reproduced' if self.reproduced else 'NOT reproduced'}",
            f"loss: {_listed(self.losses)} (recorded: {_listed(self.recorded_losses)})",
            f"gradient norm: {self.gradient_norm:g}{norm}",
            f"first weight that is not finite: {self.first_weight or 'none'}",
            f"first module whose output is not finite: {self.first_module or 'none'}",
            f"first parameter whose gradient is not finite: {self.first_gradient or 'none'}",
            f"clips: {len(self.clips)}, of which {len(odd)} are not finite",
            *(f"  {clip}" for clip in self.clips),
        ]
        return "\n".join(lines)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def replay_step(failure: str | os.PathLike[str], device: str | None = None, rank: int | None = None) -> ReplayResult:
    """Take a step again that a run saved because its loss or gradient was not finite.

    Args:
        failure: folder such as RUN/failures/step-00000123.
        device: device to use, "cpu" or "cuda:0"; by default a device like the run's if there is one, else the CPU.
        rank: process whose batches to replay; by default those of all, one after the other.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: there is no such rank or device.
    """
    saved = load_failure(Path(failure))
    if rank is not None and not 0 <= rank < len(saved.ranks):
        raise ConfigError(f"rank {rank} is not there: the step was made by ranks 0 to {len(saved.ranks) - 1}")
    where = _device(device, saved)
    config, task = _task(Path(failure), saved)
    precision = _precision(saved.facts["precision"], where)
    precision.convert_module(task)
    task.to(where).train()
    ranks = list(range(len(saved.ranks))) if rank is None else [rank]
    first_weight = _first_not_finite(dict(task.model.named_parameters()) | dict(task.model.named_buffers()))
    with _tracing(task.model) as trace:
        losses = _losses(saved, task, precision, ranks, where)
    norm = float(gradient_norm(task.parameters()))
    recorded = [loss for one in ranks for _, loss in saved.ranks[one]]
    reproduced = all(_same(now, before) for now, before in zip(losses, recorded, strict=True))
    recorded_norm = saved.facts["gradient_norm"] if len(ranks) == len(saved.ranks) else None
    if recorded_norm is not None:
        reproduced &= _same(norm, recorded_norm, 0.0 if len(ranks) == 1 else _ROUNDING)
    return ReplayResult(
        step=int(saved.facts["step"]),
        losses=losses,
        recorded_losses=recorded,
        gradient_norm=norm,
        recorded_gradient_norm=recorded_norm,
        reproduced=reproduced,
        first_weight=first_weight,
        first_module=trace.get("module"),
        first_gradient=trace.get("gradient"),
        clips=[clip for one in ranks for batch, _ in saved.ranks[one] for clip in _clips(one, batch, config)],
    )


def _losses(
    saved: Failure, task: PretrainingTask, precision: Precision, ranks: list[int], device: torch.device
) -> list[float]:
    """Forward and backward pass of every batch, weighted as in the run; gradients add up in the parameters."""
    scale, world, losses = saved.facts["loss_scale"], len(saved.ranks), []
    total: Any = sum(task.terms(batch) for batches in saved.ranks for batch, _ in batches)
    if world > 1:
        total = torch.tensor(float(total), device=device)
    weight = world / total
    for rank in ranks:
        for batch, _ in saved.ranks[rank]:
            seed_noise(task.seed, batch.step, rank, device)
            inputs = task.inputs(batch, device)
            with precision.forward_context():
                loss = task(inputs)["loss"]
            (marked(loss) * weight * scale / world).backward()
            losses.append(float(loss.detach()) / task.terms(batch))
    for parameter in task.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1.0 / scale)
    return losses


def _same(now: float, recorded: float, rounding: float = 0.0) -> bool:
    if not math.isfinite(now) or not math.isfinite(recorded):
        return math.isfinite(now) == math.isfinite(recorded)
    return math.isclose(now, recorded, rel_tol=rounding)


def _device(name: str | None, saved: Failure) -> torch.device:
    if name is None:
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = str(saved.facts["device"]).split(":")[0]
        name = kind if there is not None and there.type == kind else "cpu"
    return checked_device(name)


def _precision(name: str, device: torch.device) -> Precision:
    """Fabric's own handling of the run's precision."""
    if name.startswith("32"):
        return Precision()
    if name in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(name, device.type)  # type: ignore[arg-type]
    raise CheckpointError(f"precision {name}: a step made with it cannot be replayed")


def _task(folder: Path, saved: Failure) -> tuple[PretrainConfig, PretrainingTask]:
    """The model before the step."""
    config = resolve(saved.state["bestrq2"]["config"])
    teacher = None if config.teacher is None else Teacher.load(RunFolder(folder.parents[1]).teacher)
    task = PretrainingTask(build_model(config), config.seed, teacher=teacher)
    try:
        task.load_state_dict(saved.state["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(f"{folder / 'state.ckpt'}: its weights do not fit its settings ({error})") from error
    return config, task


@contextmanager
def _tracing(model: nn.Module) -> Iterator[dict[str, str]]:
    """In this block, the first module with an output ("module") and the first parameter with a gradient ("gradient")
    that are not finite are recorded.
    """
    first: dict[str, str] = {}

    def check(kind: str, name: str, value: Any) -> None:
        if kind not in first and not _finite(value):
            first[kind] = name

    handles: list[Any] = []
    for name, part in model.named_modules():
        hook = partial(lambda name, _, inputs, output: check("module", name, output), name or "the loss")
        handles.append(part.register_forward_hook(hook))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = partial(lambda name, parameter: check("gradient", name, parameter.grad), name)
            handles.append(parameter.register_post_accumulate_grad_hook(gradient))
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    """Whether all numbers in tensors, however nested, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return True


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    return next((name for name, value in tensors.items() if not _finite(value)), None)


def _clips(rank: int, batch: AudioBatch, config: PretrainConfig) -> Iterator[ClipCheck]:
    fields, packing, values = config.model, batch.packing, batch.to("cpu").input_values
    log_mel = LogMel(model_config(fields)).packed(values, packing.frames)
    of_columns = log_mel.unflatten(-1, (packing.segments.shape[1], -1)).movedim(2, 1)
    clips = iter(zip(batch.recordings, batch.lengths.tolist(), strict=True))
    for row, numbers in enumerate(packing.segments):
        for number in range(1, int(numbers.max()) + 1):
            own = numbers == number
            first = int(packing.frames[row, own][0]) * fields.hop_length
            last = int(packing.frames[row, own][-1] + fields.patch_size[1] - 1) * fields.hop_length + fields.n_fft
            name, samples = next(clips)
            yield ClipCheck(
                rank=rank,
                place=int(batch.places[row]),
                recording=name,
                seconds=samples / fields.sampling_rate,
                audio_finite=_finite(values[row, first:last]),
                log_mel_finite=_finite(of_columns[row, own]),
            )
