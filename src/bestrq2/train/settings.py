"""What a pretraining run can be told: the groups of its settings, and which of them fit together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bestrq2.errors import ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.run_records import flatten

DEFAULT_RECIPE = "best-rq-2"


@dataclass(frozen=True)
class LoaderConfig:
    """Batches of audio.

    Args:
        batch_size: clips per optimiser step, over all devices and accumulated batches.
        num_workers: processes that decode audio; 0 decodes in the training process.
        validation_clips: clips held out for the validation loss; 0 for none.
        statistics_clips: clips from which mean and deviation per mel band are estimated, where the model wants them.
    """

    batch_size: int = 256
    num_workers: int = 1
    validation_clips: int = 64
    statistics_clips: int = 512


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        betas: of AdamW.
        decay_all: decay biases, norms and tokens too, as the paper did.
        warmup_fraction: share of the steps in which the rate rises linearly.
        final_lr_ratio: last rate as a share of the peak.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    decay_all: bool = False
    warmup_fraction: float = 0.05
    final_lr_ratio: float = 0.001


@dataclass(frozen=True)
class TrainerConfig:
    """The Lightning Trainer and what is written when.

    Args:
        max_steps: optimiser steps.
        accelerator: "auto", "cpu", "gpu", ...
        devices: processes on each machine, one a device; -1 for all GPUs. Under torchrun and SLURM theirs counts.
        num_nodes: machines, where neither torchrun nor SLURM says.
        strategy: "auto" (replicas, DDP, where there are several devices), or "fsdp" (weights, gradients and optimiser
            state cut into shards, for models that do not fit one device).
        precision: "32-true", "bf16-mixed", "16-mixed", ...
        accumulate_grad_batches: batches per optimiser step; `loader.batch_size` is shared among them.
        gradient_clip_val: largest gradient norm; null for no clipping.
        ema: keep an exponential moving average of the weights after the warm-up and export it.
        log_every_n_steps: steps between logged values.
        val_every_n_steps: steps between validations; 0 for none.
        checkpoint_every_n_steps: steps between checkpoints.
        keep_last: newest checkpoints to keep; more than one lets a run outlive a damaged file.
        keep_every_n_steps: checkpoints of these steps stay for good; 0 for none. The best by validation loss stays.
        gradient_checkpointing: recompute activations of encoder and predictor in the backward pass to save memory.
        compile: compile front end, encoder and predictor with torch.compile; takes a minute or two at the start.
    """

    max_steps: int = 200_000
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    ema: bool = False
    log_every_n_steps: int = 50
    val_every_n_steps: int = 1000
    checkpoint_every_n_steps: int = 1000
    keep_last: int = 2
    keep_every_n_steps: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class OnlineProbeConfig:
    """A linear probe on labelled data in the course of training.

    Args:
        data: labelled folder or table, tars of X-ARES (the folder of a task or of several), or "soundworld"; null for
            none.
        tasks: names of those tasks in it that are probed, such as esc50 or music/instrument; null for all.
        every_n_steps: steps between probes; a probe comes before the first step and after the last one, too.
        clips: at most this many training clips a task.
        max_share: most of the wall time that probes in between may take. Where they would take more they come at every
            second, third, ... of those steps, as is found out once and kept in online_probe.json.
    """

    data: str | None = None
    tasks: list[str] | None = None
    every_n_steps: int = 5000
    clips: int = 400
    max_share: float = 0.05


@dataclass(frozen=True)
class WatchConfig:
    """When a run stops or warns; nothing here changes what is learned.

    Args:
        max_skipped_in_a_row: steps in a row with a loss or gradient that is not finite after which the run stops.
        min_code_perplexity: effective number of codes below which a warning says that the targets collapse.
        min_code_coverage: share of the codebook in use below which it does, where there are as many targets as codes.
        max_top_code_share: share of the commonest code above which it does.
        max_waiting_share: share of the time spent waiting for data above which a warning says so.
        stall_steps: steps in which the loss must fall while it is above the codes' entropy, else a warning is given.
    """

    max_skipped_in_a_row: int = 10
    min_code_perplexity: float = 2.0
    min_code_coverage: float = 0.004
    max_top_code_share: float = 0.9
    max_waiting_share: float = 0.2
    stall_steps: int = 1000


@dataclass(frozen=True)
class LoggingConfig:
    """Where figures go besides metrics.csv and TensorBoard.

    Args:
        wandb: project at Weights & Biases; null for none.
        mlflow: tracking URI or folder of MLflow; null for none.
        run_name: what the run is called there; null for the name of its folder.
    """

    wandb: str | None = None
    mlflow: str | None = None
    run_name: str | None = None


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run, complete.

    Attributes:
        recipe: name of the recipe it started from.
        data: where the audio comes from.
        output: the run folder.
        seed: of weights, data order, crops and masks.
        model: the architecture.
        loader, optimizer, trainer, probe, watch, logging: the groups.
    """

    data: str
    output: Path
    model: BestRQ2Config
    recipe: str = DEFAULT_RECIPE
    seed: int = 0
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them; `pretrain --config` reads them back."""
        groups = {name: _plain(getattr(self, name)) for name in GROUPS}
        model = {name: getattr(self.model, name) for name in field_names()}
        top = {"recipe": self.recipe, "data": self.data, "output": str(self.output), "seed": self.seed}
        return {**top, "model": model, **groups}


GROUPS: dict[str, type] = {
    "loader": LoaderConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "probe": OnlineProbeConfig,
    "watch": WatchConfig,
    "logging": LoggingConfig,
}


def check_settings(config: PretrainConfig) -> None:
    """Pass if the settings are in range and fit together.

    Raises:
        ConfigError: naming the first that does not.
    """
    loader, optimizer, trainer, watch = config.loader, config.optimizer, config.trainer, config.watch
    rules = [
        (config.seed >= 0, f"seed must not be negative, got {config.seed}"),
        (loader.batch_size >= 1, f"loader.batch_size must be at least 1, got {loader.batch_size}"),
        (loader.num_workers >= 0, f"loader.num_workers must not be negative, got {loader.num_workers}"),
        (loader.validation_clips >= 0, f"loader.validation_clips must not be negative, got {loader.validation_clips}"),
        (loader.statistics_clips >= 1, f"loader.statistics_clips must be at least 1, got {loader.statistics_clips}"),
        (optimizer.lr > 0, f"optimizer.lr must be above 0, got {optimizer.lr}"),
        (optimizer.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {optimizer.weight_decay}"),
        (
            0 <= optimizer.warmup_fraction < 1,
            f"optimizer.warmup_fraction must lie in [0, 1), got {optimizer.warmup_fraction}",
        ),
        (
            0 <= optimizer.final_lr_ratio <= 1,
            f"optimizer.final_lr_ratio must lie in [0, 1], got {optimizer.final_lr_ratio}",
        ),
        (trainer.max_steps >= 1, f"trainer.max_steps must be at least 1, got {trainer.max_steps}"),
        (
            trainer.log_every_n_steps >= 1,
            f"trainer.log_every_n_steps must be at least 1, got {trainer.log_every_n_steps}",
        ),
        (
            trainer.val_every_n_steps >= 0,
            f"trainer.val_every_n_steps must not be negative, got {trainer.val_every_n_steps}",
        ),
        (
            trainer.checkpoint_every_n_steps >= 1,
            f"trainer.checkpoint_every_n_steps must be at least 1, got {trainer.checkpoint_every_n_steps}",
        ),
        (
            trainer.devices >= 1 or trainer.devices == -1,
            f"trainer.devices must be at least 1, or -1 for all GPUs, got {trainer.devices}",
        ),
        (trainer.num_nodes >= 1, f"trainer.num_nodes must be at least 1, got {trainer.num_nodes}"),
        (trainer.strategy in ("auto", "fsdp"), f"trainer.strategy must be auto or fsdp, got {trainer.strategy}"),
        (
            not (trainer.strategy == "fsdp" and trainer.ema),
            "trainer.ema does not work with trainer.strategy fsdp: the average would not fit one device; turn one off",
        ),
        (trainer.keep_last >= 1, f"trainer.keep_last must be at least 1, got {trainer.keep_last}"),
        (
            trainer.keep_every_n_steps >= 0,
            f"trainer.keep_every_n_steps must not be negative, got {trainer.keep_every_n_steps}",
        ),
        (
            not trainer.precision.endswith("-true") or trainer.precision.startswith(("32", "64")),
            f"trainer.precision must keep weights and targets in float32; use bf16-mixed, got {trainer.precision}",
        ),
        (
            all(0 <= beta < 1 for beta in optimizer.betas),
            f"optimizer.betas must lie in [0, 1), got {list(optimizer.betas)}",
        ),
        (
            trainer.gradient_clip_val is None or trainer.gradient_clip_val > 0,
            f"trainer.gradient_clip_val must be above 0 or null, got {trainer.gradient_clip_val}",
        ),
        (
            watch.max_skipped_in_a_row >= 1,
            f"watch.max_skipped_in_a_row must be at least 1, got {watch.max_skipped_in_a_row}",
        ),
        (watch.stall_steps >= 1, f"watch.stall_steps must be at least 1, got {watch.stall_steps}"),
        (config.probe.clips >= 2, f"probe.clips must be at least 2, got {config.probe.clips}"),
        (config.probe.every_n_steps >= 1, f"probe.every_n_steps must be at least 1, got {config.probe.every_n_steps}"),
        (0 < config.probe.max_share <= 1, f"probe.max_share must lie in (0, 1], got {config.probe.max_share}"),
        (
            trainer.accumulate_grad_batches >= 1 and loader.batch_size % trainer.accumulate_grad_batches == 0,
            f"loader.batch_size ({loader.batch_size}) must be a multiple of trainer.accumulate_grad_batches "
            f"({trainer.accumulate_grad_batches})",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Sentences on what differs between two configurations, as `to_dict` gives them, and matters to a resumed run.

    More steps than before are allowed: the learning rate then follows the curve of the longer run.
    """
    old = _with_defaults(old)
    free = {"output", "data", "probe", *(f"trainer.{f.name}" for f in fields(TrainerConfig) if f.name not in _FIXED)}
    free |= {"loader.num_workers", "watch", "logging"}
    flat_old, flat_new = flatten(old), flatten(new)
    if flat_new["trainer.max_steps"] > flat_old.get("trainer.max_steps", 0):
        free |= {"trainer.max_steps"}
    keys = [key for key in flat_old.keys() | flat_new.keys() if key not in free and key.split(".")[0] not in free]
    return _differences(flat_old, flat_new, keys)


def changed_rounding(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Sentences on what differs and lets a resumed run end where another would have, but not to the bit.

    Such settings are the machine's business, and a run must be able to move; so they may change.
    """
    return _differences(flatten(_with_defaults(old)), flatten(new), [f"trainer.{name}" for name in _ROUNDING])


def _differences(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> list[str]:
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(keys)
        if old.get(key) != new.get(key)
    ]


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version with what it did not know yet at its default, which is what it did."""
    model = BestRQ2Config(**settings["model"])
    groups = {name: {**_plain(kind()), **settings.get(name, {})} for name, kind in GROUPS.items()}
    return {**settings, "model": {name: getattr(model, name) for name in field_names()}, **groups}


def _plain(group: Any) -> dict[str, Any]:
    """A group of settings as config.yaml holds it."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(group)))
    return values


_FIXED = ("precision", "gradient_clip_val", "ema", "accumulate_grad_batches", "max_steps")
_ROUNDING = ("accelerator", "compile", "devices", "gradient_checkpointing", "num_nodes", "strategy")
