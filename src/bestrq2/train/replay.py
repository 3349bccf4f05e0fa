"""`bestrq2 replay`: do a saved step again and find where it stopped being finite."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from torch import Tensor, nn

from bestrq2.convert.weights import quiet_hub
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.model.log_mel import LogMel
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.train.config import resolve
from bestrq2.train.failures import Failure, SavedBatch, load_failure
from bestrq2.train.guard import gradient_norm, marked
from bestrq2.train.module import checkpoint_activations, seed_stochastic_depth, unequal_lengths
from bestrq2.train.settings import PretrainConfig

# Gradients of several processes are added in another order here than they were there.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class ClipCheck:
    """One clip of a replayed step.

    Attributes:
        rank: the process that had it.
        place: in the global batch.
        recording: what its source calls it.
        seconds: its length.
        level: its root mean square, dB below full scale.
        audio_finite: whether all samples are finite.
        log_mel_finite: whether its whole spectrogram is.
    """

    rank: int
    place: int
    recording: str
    seconds: float
    level: float
    audio_finite: bool
    log_mel_finite: bool

    def __str__(self) -> str:
        faults = [name for name, fine in (("audio", self.audio_finite), ("log-mel", self.log_mel_finite)) if not fine]
        fault = f", {' and '.join(faults)} NOT FINITE" if faults else ""
        name = self.recording or "(unnamed)"
        return f"rank {self.rank} place {self.place}: {self.seconds:.2f} s, {self.level:.1f} dBFS{fault}, {name}"


@dataclass(frozen=True)
class ReplayResult:
    """What a step did when it was done again.

    Attributes:
        step: its number, from 1.
        losses: of every replayed batch, nats: rank by rank, accumulated batches in their order.
        recorded_losses: what they were in the run.
        gradient_norm: of all replayed processes together.
        recorded_gradient_norm: what it was; None if only some of the processes were replayed.
        reproduced: every figure is as recorded: the same bits (a norm over several processes: up to rounding), or not
            finite both times.
        first_weight: the first parameter or buffer that was not finite before the step; None if all were.
        first_module: the first module, in the order of the forward pass, whose output was not finite.
        first_gradient: the first parameter, in the order of the backward pass, whose gradient was not finite.
        clips: what the step was trained on.
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
        """For people: one line per finding."""
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


def replay(failure: str | os.PathLike[str], device: str | None = None, rank: int | None = None) -> ReplayResult:
    """Do a step again that a run saved because its loss or gradient was not finite.

    Args:
        failure: folder such as RUN/failures/step-00000123.
        device: where to do it, "cpu" or "cuda:0"; by default a device like the run's if there is one, else the CPU.
        rank: the process whose batches to replay; by default those of all, one after the other.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: there is no such rank or device.
    """
    saved = load_failure(Path(failure))
    if rank is not None and not 0 <= rank < len(saved.ranks):
        raise ConfigError(f"rank {rank} is not there: the step was made by ranks 0 to {len(saved.ranks) - 1}")
    where = _device(device, saved)
    config, model = _model(Path(failure), saved)
    precision = _precision(saved, where)
    precision.convert_module(model)
    model.to(where).train()
    ranks = list(range(len(saved.ranks))) if rank is None else [rank]
    first_weight = _first_not_finite(dict(model.named_parameters()) | dict(model.named_buffers()))
    with _tracing(model) as trace:
        losses = _losses(saved, config, model, precision, ranks)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1.0 / saved.loss_scale)
    recorded = [each.loss for one in ranks for each in saved.ranks[one]]
    norm = float(gradient_norm(model.parameters()))
    reproduced = all(_same(now, before) for now, before in zip(losses, recorded, strict=True))
    recorded_norm = saved.gradient_norm if len(ranks) == len(saved.ranks) else None
    if recorded_norm is not None:
        reproduced &= _same(norm, recorded_norm, 0.0 if len(ranks) == 1 else _ROUNDING)
    return ReplayResult(
        step=saved.step,
        losses=losses,
        recorded_losses=recorded,
        gradient_norm=norm,
        recorded_gradient_norm=recorded_norm,
        reproduced=reproduced,
        first_weight=first_weight,
        first_module=trace.module,
        first_gradient=trace.gradient,
        clips=[clip for one in ranks for each in saved.ranks[one] for clip in _clips(one, each, config)],
    )


def _losses(
    saved: Failure, config: PretrainConfig, model: nn.Module, precision: Precision, ranks: list[int]
) -> list[float]:
    """Forward and backward of every batch, weighted as the run did; gradients add up in the parameters."""
    losses = []
    for rank in ranks:
        for number, each in enumerate(saved.ranks[rank]):
            batch = each.batch.to(next(model.parameters()).device)
            seed_stochastic_depth(config.seed, batch.step, rank, batch.input_values.device)
            with precision.forward_context():
                values = precision.convert_input(batch.input_values)
                lengths = unequal_lengths(batch)
                loss = model(values, hidden_mask=batch.hidden_mask, lengths=lengths, output_logits=False).loss
            share = _patches(each) / sum(_patches(batches[number]) for batches in saved.ranks)
            (marked(loss) * share / len(saved.ranks[rank]) * saved.loss_scale).backward()
            losses.append(float(loss.detach()))
    return losses


def _patches(saved: SavedBatch) -> int:
    """Hidden patches of a batch, in whose proportion processes count."""
    mask = saved.batch.hidden_mask
    return len(saved.batch) if mask is None else int(mask.sum())


def _same(now: float, recorded: float, rounding: float = 0.0) -> bool:
    if not math.isfinite(now) or not math.isfinite(recorded):
        return math.isfinite(now) == math.isfinite(recorded)
    return math.isclose(now, recorded, rel_tol=rounding)


def _device(name: str | None, saved: Failure) -> torch.device:
    if name is None:
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = saved.device.split(":")[0]
        name = kind if there is not None and there.type == kind else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: there is no such device here ({str(error).splitlines()[0]})") from error


def _precision(saved: Failure, device: torch.device) -> Precision:
    """Lightning's own handling of the run's precision."""
    if saved.precision.startswith("32"):
        return Precision()
    if saved.precision.startswith("64"):
        return DoublePrecision()
    if saved.precision in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(saved.precision, device.type)  # type: ignore[arg-type]
    raise CheckpointError(f"precision {saved.precision}: a step made with it cannot be replayed")


def _model(folder: Path, saved: Failure) -> tuple[PretrainConfig, BestRQ2ForPreTraining]:
    """The model before the step."""
    config = resolve(saved.state["bestrq2"]["config"])
    weights = {name.removeprefix("model."): value for name, value in saved.state["state_dict"].items()}
    with quiet_hub():
        model = BestRQ2ForPreTraining(config.model)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / 'state.ckpt'}: its weights do not fit its settings ({error})") from error
    return config, model


class _Trace:
    """Where something was not finite for the first time."""

    def __init__(self) -> None:
        self.module: str | None = None
        self.gradient: str | None = None


@contextmanager
def _tracing(model: nn.Module) -> Iterator[_Trace]:
    """In this block outputs of all modules and gradients of all parameters are looked at as they are made."""
    trace = _Trace()

    def look_at_output(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if trace.module is None and not _finite(output):
                trace.module = name or "the loss"

        return hook

    def look_at_gradient(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            if trace.gradient is None and parameter.grad is not None and not _finite(parameter.grad):
                trace.gradient = name

        return hook

    handles: list[Any] = [part.register_forward_hook(look_at_output(name)) for name, part in model.named_modules()]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(look_at_gradient(name)))
    try:
        yield trace
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


def _clips(rank: int, saved: SavedBatch, config: PretrainConfig) -> Iterator[ClipCheck]:
    spectrogram = LogMel(config.model)
    batch = saved.batch
    names = batch.recordings
    for waveform, length, place, name in zip(batch.input_values, batch.lengths, batch.places, names, strict=True):
        clip = waveform[: int(length)]
        level = 20 * math.log10(max(1e-10, float(clip.double().square().mean().sqrt())))
        yield ClipCheck(
            rank=rank,
            place=int(place),
            recording=name,
            seconds=int(length) / config.model.sampling_rate,
            level=level,
            audio_finite=_finite(clip),
            log_mel_finite=_finite(spectrogram(clip[None])[0]),
        )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
