"""What a pretraining run can be told, and how a recipe, files and flags become one validated configuration."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from bestrq2.errors import ConfigError
from bestrq2.flags import make_parser, parse_flags, parse_settings
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.recipe_book import recipe, recipes

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
        devices: number of devices; only 1 so far.
        precision: "32-true", "bf16-mixed", "16-mixed", ...
        accumulate_grad_batches: batches per optimiser step; `loader.batch_size` is shared among them.
        gradient_clip_val: largest gradient norm; null for no clipping.
        ema: keep an exponential moving average of the weights after the warm-up and export it.
        log_every_n_steps: steps between logged values.
        val_every_n_steps: steps between validations; 0 for none.
        checkpoint_every_n_steps: steps between checkpoints.
        gradient_checkpointing: recompute activations of encoder and predictor in the backward pass to save memory.
    """

    max_steps: int = 200_000
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    ema: bool = False
    log_every_n_steps: int = 50
    val_every_n_steps: int = 1000
    checkpoint_every_n_steps: int = 1000
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class OnlineProbeConfig:
    """A linear probe on labelled data in the course of training.

    Args:
        data: labelled folder or table, or "soundworld"; null for none.
        every_n_steps: steps between probes.
        clips: at most this many training clips a task.
    """

    data: str | None = None
    every_n_steps: int = 5000
    clips: int = 400


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run, complete.

    Attributes:
        recipe: name of the recipe it started from.
        data: where the audio comes from.
        output: the run folder.
        seed: of weights, data order, crops and masks.
        model: the architecture.
        loader, optimizer, trainer, probe: the groups.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them; `pretrain --config` reads them back."""
        groups = {name: json.loads(json.dumps(asdict(getattr(self, name)))) for name in GROUPS}
        model = {name: getattr(self.model, name) for name in field_names()}
        top = {"recipe": self.recipe, "data": self.data, "output": str(self.output), "seed": self.seed}
        return {**top, "model": model, **groups}


GROUPS: dict[str, type] = {
    "loader": LoaderConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "probe": OnlineProbeConfig,
}


def pretrain_parser(name: str = DEFAULT_RECIPE) -> ArgumentParser:
    """A parser of everything a run can be told, with the values of a recipe as defaults."""
    parser = make_parser("pretrain", "Pretrain an encoder on unlabelled audio.")
    parser.add_argument("--recipe", default=name, help=f"one of {', '.join(recipes())}")
    parser.add_argument(
        "--data", type=str | None, help='folder, audio file, list (.txt, .csv, .jsonl), or "soundworld"'
    )
    parser.add_argument("--output", type=str | None, help="run folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order, crops and masks")
    _add_model_arguments(parser)
    for group, kind in GROUPS.items():
        parser.add_class_arguments(kind, group)
    settings = recipe(name)
    settings.pop("description", None)
    parser.set_defaults(
        {f"{group}.{key}": value for group, values in settings.items() for key, value in values.items()}
    )
    return parser


def _add_model_arguments(parser: ArgumentParser) -> None:
    """One flag per field of `BestRQ2Config`, with its type and the help of its docstring."""
    group = parser.add_argument_group("The architecture")
    hints = get_type_hints(BestRQ2Config.__init__)
    entries = re.findall(
        r"^        (\w+): (.*?)(?=^        \w+: |^\s*Raises:)", BestRQ2Config.__doc__ or "", re.M | re.S
    )
    helps = {name: " ".join(text.split()) for name, text in entries}
    for name, parameter in inspect.signature(BestRQ2Config.__init__).parameters.items():
        if name in field_names():
            group.add_argument(f"--model.{name}", type=hints[name], default=parameter.default, help=helps[name])


def parse_arguments(argv: Sequence[str]) -> tuple[PretrainConfig, bool]:
    """Flags (and the files they name) to a configuration, and whether to resume.

    Raises:
        ConfigError: for unknown flags, wrong values, or values at odds with each other.
    """
    parser = pretrain_parser(_recipe_of(argv))
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    parsed = parse_flags(parser, argv)
    resume = parsed.pop("resume")
    return build_config(parsed), resume


def resolve(settings: dict[str, Any]) -> PretrainConfig:
    """Nested settings, such as those of `config.yaml` or of a notebook, laid over their recipe.

    Raises:
        ConfigError: as `parse_arguments`.
    """
    return build_config(parse_settings(pretrain_parser(settings.get("recipe") or DEFAULT_RECIPE), settings))


def _recipe_of(argv: Sequence[str]) -> str:
    """The recipe the flags (or the YAML file they name) ask for: its values are the defaults of all others."""
    found: dict[str, str] = {}
    for flag in ("--recipe", "--config"):
        for index, argument in enumerate(argv):
            if argument == flag and index + 1 < len(argv):
                found[flag] = argv[index + 1]
            elif argument.startswith(f"{flag}="):
                found[flag] = argument.split("=", 1)[1]
    if "--recipe" not in found and "--config" in found:
        path = Path(found["--config"])
        try:
            loaded = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
        if isinstance(loaded, dict) and loaded.get("recipe"):
            return str(loaded["recipe"])
    return found.get("--recipe", DEFAULT_RECIPE)


def build_config(parsed: Namespace) -> PretrainConfig:
    """Validate parsed settings as a whole.

    Raises:
        ConfigError: for values out of range or at odds with each other.
    """
    settings = parsed.as_dict()
    for name in ("data", "output"):
        if not settings.get(name):
            raise ConfigError(f"--{name} is missing: say {_MISSING[name]}")
    groups = {name: kind(**settings[name]) for name, kind in GROUPS.items()}
    try:
        model = BestRQ2Config(**settings["model"])
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    config = PretrainConfig(
        recipe=settings["recipe"],
        data=settings["data"],
        output=Path(settings["output"]),
        seed=settings["seed"],
        model=model,
        **groups,
    )
    _check(config)
    return config


_MISSING = {
    "data": "where the audio is, a folder for instance",
    "output": "which folder the run shall be written to",
}


def _check(config: PretrainConfig) -> None:
    loader, optimizer, trainer = config.loader, config.optimizer, config.trainer
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
            trainer.devices == 1,
            f"trainer.devices must be 1: several devices are not supported yet, got {trainer.devices}",
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
        (config.probe.clips >= 2, f"probe.clips must be at least 2, got {config.probe.clips}"),
        (config.probe.every_n_steps >= 1, f"probe.every_n_steps must be at least 1, got {config.probe.every_n_steps}"),
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
    """Sentences on what differs between two configurations, as `to_dict` gives them, and matters to a resumed run."""
    free = {"output", "data", "probe", *(f"trainer.{f.name}" for f in fields(TrainerConfig) if f.name not in _FIXED)}
    free |= {"loader.num_workers"}
    flat_old, flat_new = _flatten(old), _flatten(new)
    return [
        f"{key} was {flat_old.get(key)!r} and is now {flat_new.get(key)!r}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if key not in free and key.split(".")[0] not in free and flat_old.get(key) != flat_new.get(key)
    ]


_FIXED = ("precision", "gradient_clip_val", "ema", "accumulate_grad_batches", "max_steps")


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    return flat
