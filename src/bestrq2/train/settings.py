"""Settings of pretraining and fine-tuning runs: groups of typed fields, and how recipes, files and flags fill them.

Ranges of single values are types; what is checked by hand are pairs of settings. Nothing here imports torch, so that a
command line is refused, or its help printed, without loading it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import restricted_number_type

from bestrq2.convert.shipped import shipped_training
from bestrq2.errors import CheckpointError, ConfigError, DataError
from bestrq2.files import regular_file
from bestrq2.flags import (
    add_argument,
    add_arguments,
    document,
    make_parser,
    parse_flags,
    parse_settings,
    range_in_words,
)
from bestrq2.model.fields import FIELD_TYPES, ModelFields
from bestrq2.recipe_book import is_recipe_file, recipe, recipe_names, recipes
from bestrq2.text import counted, nearest

if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    AtLeastTwo: TypeAlias = int
    Devices: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    UnitInterval: TypeAlias = float
    BelowOne: TypeAlias = float
    PositiveShare: TypeAlias = float
else:
    from jsonargparse.typing import ClosedUnitInterval as UnitInterval
    from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

    BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
    PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
    AtLeastTwo = restricted_number_type("AtLeastTwo", int, (">=", 2))
    Devices = restricted_number_type("Devices", int, [(">", 0), ("==", -1)], join="or")

DEFAULT_RECIPE = "best-rq-2"
MODES = ("linear", "partial", "full")


class Checked:
    """Base of groups of settings: checks every value against the range of its type, wherever it came from."""

    GROUP: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: naming the first field that is out of range.
        """
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is not ClassVar and name != "GROUP":
                value = _in_range(f"{self.GROUP}.{name}".lstrip("."), getattr(self, name), hint)
                object.__setattr__(self, name, value)


def _in_range(name: str, value: Any, hint: Any) -> Any:
    """The value as a plain number, once it is known to be in range."""
    if get_origin(hint) is tuple:
        return tuple(_in_range(name, one, kind) for one, kind in zip(value, get_args(hint), strict=True))
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ConfigError(
            f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}{nearest(value, get_args(hint))}"
        )
    if isinstance(value, str) and any(value in get_args(kind) for kind in get_args(hint)):
        return value
    kinds = [kind for kind in (hint, *get_args(hint)) if hasattr(kind, "_restrictions")]
    if not kinds or (value is None and type(None) in get_args(hint)):
        return value
    base = float if issubclass(kinds[0], float) else int
    try:
        kinds[0](value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} must be {range_in_words(str(error)) or f'a number ({base.__name__})'}, got {value!r}"
        ) from error
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value!r}")
    return base(value)


@dataclass(frozen=True)
class LoaderConfig(Checked):
    """Batches of audio.

    Args:
        batch_seconds: audio per optimiser step (s), over all devices and accumulated batches: rows of `max_seconds`, in
            which as many clips share a row as fit; "auto" for that of the recipe, or as much as fits the memory.
        num_workers: processes that decode audio; 0 decodes in the training process.
        validation_clips: clips held out for the validation loss; 0 for none.
        statistics_clips: clips from which mean and deviation per mel band are estimated, where the model uses them; 0
            keeps those of the model in `init`.
    """

    GROUP: ClassVar[str] = "loader"
    batch_seconds: PositiveFloat | Literal["auto"] = 2560.0
    num_workers: NonNegativeInt = 1
    validation_clips: NonNegativeInt = 64
    statistics_clips: NonNegativeInt = 512


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW or Muon with linear warm-up and decay of the learning rate.

    Args:
        algorithm: "adamw", or "muon" for the matrices of linear layers and AdamW for the head and everything else.
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        betas: decay rates of AdamW's first and second moment.
        eps: AdamW's epsilon.
        decay_all: weight decay for biases, norms and tokens too, as in the paper.
        warmup_fraction: share of the steps in which the learning rate rises linearly.
        schedule: decay after the warm-up: "cosine" (to `final_lr_ratio` at the last step) or "noam" (with the inverse
            root of the step, which leaves `final_lr_ratio` without effect).
        final_lr_ratio: last learning rate as a share of the peak.
    """

    GROUP: ClassVar[str] = "optimizer"
    algorithm: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    decay_all: bool = False
    warmup_fraction: BelowOne = 0.05
    schedule: Literal["cosine", "noam"] = "cosine"
    final_lr_ratio: UnitInterval = 0.001


@dataclass(frozen=True)
class TrainerConfig(Checked):
    """The training loop: length, devices, precision, and what is written when.

    Args:
        max_steps: number of optimiser steps.
        accelerator: "auto", "cpu", "gpu", ...
        devices: processes on each machine, one per device; -1 for all GPUs. torchrun and SLURM override it.
        num_nodes: number of machines; torchrun and SLURM override it.
        strategy: "auto" (replicas, DDP, on several devices) or "fsdp" (weights, gradients and optimiser state in
            shards, for models that do not fit one device).
        precision: "32-true", "bf16-mixed", "16-mixed", ...
        accumulate_grad_batches: batches per optimiser step, among which the rows of `loader.batch_seconds` are divided;
            the gradient is that of the undivided batch.
        gradient_clip_val: largest gradient norm; null for no clipping.
        ema: exponential moving average of the weights after the warm-up, which is then the exported model.
        log_every_n_steps: steps between logged values.
        val_every_n_steps: steps between validations; 0 for none.
        checkpoint_every_n_steps: steps between checkpoints.
        keep_last: number of newest checkpoints to keep; with more than one a run survives a damaged file.
        keep_every_n_steps: checkpoints of multiples of this step are never deleted, and load as models by
            their file names; 0 for none. The best by validation loss is always kept.
        gradient_checkpointing: recompute activations of encoder and predictor in the backward pass to save memory.
        compile: compile front end, encoder and predictor with torch.compile; takes a minute or two at the start.
        report: write report.html at the end.
    """

    GROUP: ClassVar[str] = "trainer"
    max_steps: PositiveInt = 200_000
    accelerator: str = "auto"
    devices: Devices = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "fsdp"] = "auto"
    precision: str = "32-true"
    accumulate_grad_batches: PositiveInt = 1
    gradient_clip_val: PositiveFloat | None = None
    ema: bool = False
    log_every_n_steps: PositiveInt = 50
    val_every_n_steps: NonNegativeInt = 1000
    checkpoint_every_n_steps: PositiveInt = 1000
    keep_last: PositiveInt = 2
    keep_every_n_steps: NonNegativeInt = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    report: bool = True


@dataclass(frozen=True)
class OnlineProbeConfig(Checked):
    """Linear probe on labelled data during training: before the first step, at intervals, and after the last step.

    Args:
        data: labelled folder or table, X-ARES tars (the folder of a task or of several), or "soundworld"; null for
            none.
        tasks: names of the tasks to probe, such as esc50 or music/instrument; null for all.
        every_n_steps: steps between probes.
        clips: most training clips per task.
    """

    GROUP: ClassVar[str] = "probe"
    data: str | None = None
    tasks: list[str] | None = None
    every_n_steps: PositiveInt = 5000
    clips: AtLeastTwo = 400


@dataclass(frozen=True)
class WatchConfig(Checked):
    """When a run stops or warns; nothing here changes what is learned.

    Args:
        max_skipped_in_a_row: steps in a row with a loss or gradient that is not finite after which the run stops.
        min_code_perplexity: effective number of codes below which a warning reports collapsing targets.
        min_code_coverage: share of the codebook in use below which it does, given as many targets as codes.
        max_top_code_share: share of the most frequent code above which it does.
        max_waiting_share: share of the time spent waiting for data above which a warning reports it.
        stall_steps: steps within which the loss must fall while it is above the entropy of the codes.
    """

    GROUP: ClassVar[str] = "watch"
    max_skipped_in_a_row: PositiveInt = 10
    min_code_perplexity: NonNegativeFloat = 2.0
    min_code_coverage: UnitInterval = 0.004
    max_top_code_share: UnitInterval = 0.9
    max_waiting_share: NonNegativeFloat = 0.2
    stall_steps: PositiveInt = 1000


@dataclass(frozen=True)
class LoggingConfig(Checked):
    """Logging beside metrics.csv and TensorBoard.

    Args:
        wandb: project at Weights & Biases; null for none.
        run_name: name of the run there; null for the name of its folder.
    """

    GROUP: ClassVar[str] = "logging"
    wandb: str | None = None
    run_name: str | None = None


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """One pretraining run, complete.

    Attributes:
        data: --data argument.
        output: run folder.
        model: architecture.
        recipe: recipe from which the settings start.
        init: model whose weights the run starts from; None for random weights.
        teacher: encoder whose clustered states are half of the targets; None for random codebooks alone.
        seed: random seed for weights, data order, crops and masks.
        loader, optimizer, trainer, probe, watch, logging: groups of settings.
    """

    data: str
    output: Path
    model: ModelFields
    recipe: str = DEFAULT_RECIPE
    init: str | None = None
    teacher: str | None = None
    seed: NonNegativeInt = 0
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        """Check the values, and pairs of settings.

        Raises:
            ConfigError: naming the first that is out of range, or two that do not fit together.
        """
        super().__post_init__()
        trainer = self.trainer
        if trainer.strategy == "fsdp" and self.optimizer.algorithm == "muon":
            raise ConfigError(
                "optimizer.algorithm muon does not work with trainer.strategy fsdp: it needs whole matrices; "
                "choose adamw, or trainer.strategy auto"
            )
        if trainer.strategy == "fsdp" and trainer.ema:
            raise ConfigError(
                "trainer.ema does not work with trainer.strategy fsdp: the average would not fit one device; turn "
                "one off"
            )
        if trainer.strategy == "fsdp" and trainer.devices < 1:
            raise ConfigError("trainer.strategy fsdp needs a number in trainer.devices, not -1")
        if trainer.precision.endswith("-true") and not trainer.precision.startswith("32"):
            raise ConfigError(
                f"trainer.precision must keep weights and targets in float32; use bf16-mixed, got {trainer.precision}"
            )
        if not self.loader.statistics_clips and self.model.uses_dataset_statistics and self.init is None:
            raise ConfigError(
                "loader.statistics_clips 0 keeps the statistics of the model in --init; name one, or a number of clips"
            )
        if self.teacher is not None and self.model.num_codebooks < 2:
            raise ConfigError(
                "--teacher gives the codes of half of the codebooks; set model.num_codebooks to 2 or more"
            )
        if self.loader.batch_seconds != "auto" and self.step_rows % trainer.accumulate_grad_batches:
            raise ConfigError(
                f"{self.rows_in_words}, which must be a multiple of trainer.accumulate_grad_batches "
                f"({trainer.accumulate_grad_batches})"
            )

    @property
    def step_rows(self) -> int:
        """Rows of `max_seconds` per optimiser step, over all devices and accumulated batches."""
        return max(1, round(float(self.loader.batch_seconds) / self.model.max_seconds))

    @property
    def rows_in_words(self) -> str:
        """The rows of a step, as the beginning of a sentence."""
        return (
            f"loader.batch_seconds ({float(self.loader.batch_seconds):g}) makes {counted(self.step_rows, 'row')} of "
            f"{self.model.max_seconds:g} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them; `pretrain --config` reads them back."""
        groups = {name: _plain(getattr(self, name)) for name in GROUPS}
        model = {name: _list(getattr(self.model, name)) for name in FIELD_TYPES}
        top = {"recipe": self.recipe, "data": self.data, "output": str(self.output), "seed": self.seed}
        top |= {name: value for name in ("init", "teacher") if (value := getattr(self, name)) is not None}
        return {**top, "model": model, **groups}


@dataclass(frozen=True)
class FinetuneConfig(Checked):
    """One fine-tuning run, complete; `bestrq2.finetune` describes the fields."""

    model: str
    labelled: str
    output: Path
    mode: str = "full"
    layers: PositiveInt | None = None
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 32
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.05
    warmup_fraction: BelowOne = 0.1
    layer_decay: PositiveShare = 1.0
    balanced: bool = False
    max_seconds: PositiveFloat | None = None
    seed: NonNegativeInt = 0
    num_workers: NonNegativeInt = 1
    device: str | None = None
    devices: Devices = 1

    def __post_init__(self) -> None:
        """Check the values, and pairs of settings.

        Raises:
            ConfigError: naming the first that is out of range, or two that do not fit together.
        """
        if self.mode not in MODES:
            raise ConfigError(f"there is no mode '{self.mode}'{nearest(self.mode, MODES)}; use {', '.join(MODES)}")
        super().__post_init__()
        if (self.mode == "partial") != (self.layers is not None):
            raise ConfigError("layers belongs to mode partial, which needs it: the number of last blocks to train")
        if self.layer_decay != 1 and self.mode == "linear":
            raise ConfigError("layer_decay means nothing in mode linear, which trains no layer; leave it out")

    def with_rate(self, hidden_size: int) -> FinetuneConfig:
        """These settings with a learning rate, where they have none, for an encoder of this width.

        A head alone needs larger steps than pretrained weights. For those 1e-3 was best at a width of 192
        (docs/finetuning.md), and the best rate of Adam falls as one over the width (muP, Yang et al. 2022).
        """
        rate = 1e-2 if self.mode == "linear" else 0.2 / hidden_size
        return self if self.lr is not None else replace(self, lr=rate)

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW and the course of the learning rate."""
        assert self.lr is not None
        return OptimizerConfig(lr=self.lr, weight_decay=self.weight_decay, warmup_fraction=self.warmup_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them."""
        return {**_plain(self), "output": str(self.output)}

    def changes_from(self, old: dict[str, Any]) -> list[str]:
        """Settings that make this another run than the one whose `config.yaml` held `old`."""
        free = {"output", "num_workers", "device", "devices"}  # where it runs, not what it computes
        return _differences(old, self.to_dict(), [one.name for one in fields(self) if one.name not in free])


def finetune_config(settings: dict[str, Any], resume: bool) -> FinetuneConfig:
    """The configuration of a fine-tuning run; one that is resumed keeps the settings that are left at their defaults.

    Args:
        settings: values by field of `FinetuneConfig`, None for those that are not given.
        resume: whether to continue the run in `output`.

    Raises:
        ConfigError: model, labelled or output is missing, or a value is out of range.
        CheckpointError: config.yaml of the run cannot be read.
    """
    stored = _stored(Path(settings["output"])) if resume and settings["output"] else None
    if stored is not None and "labelled" not in stored:
        raise ConfigError(f"{settings['output']}: holds another kind of run; name a new folder with --output")
    values = {}
    for one in fields(FinetuneConfig):
        given = settings[one.name]
        values[one.name] = (stored or {}).get(one.name, given) if given in (None, one.default) else given
        if values[one.name] is None and one.default is MISSING:
            missing = f"--{one.name}" if one.name == "output" else one.name.upper()
            if resume and one.name != "output":
                raise ConfigError(f"{settings['output']}: holds no run to resume; to start one, give {missing}")
            raise ConfigError(f"{missing} is missing; write bestrq2 finetune MODEL LABELLED --output OUTPUT [settings]")
    return FinetuneConfig(**{**values, "output": Path(values["output"])})


GROUPS: dict[str, type] = {
    "loader": LoaderConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "probe": OnlineProbeConfig,
    "watch": WatchConfig,
    "logging": LoggingConfig,
}
# Fields of `TrainerConfig` that decide what is learned, and those that decide it up to rounding; all others are free.
_FIXED = ("precision", "gradient_clip_val", "ema", "accumulate_grad_batches", "max_steps")
_ROUNDING = ("accelerator", "compile", "devices", "gradient_checkpointing", "num_nodes", "strategy")
# Fields of earlier versions that a config.yaml may still hold; apart from those that `earlier_setting` checks, none of
# them changed what was learned.
_REMOVED = {
    "model": (
        "mask_shape",
        "mask_block_size",
        "mask_span_probability",
        "masks_per_clip",
        "predictor_context_positions",
    ),
    "probe": ("max_share",),
    "logging": ("mlflow",),
}


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences between two configurations, as `to_dict` gives them, that forbid to resume one as the other.

    More steps than before are allowed: the learning rate then follows the curve of the longer run.
    """
    from bestrq2.run_records import flatten  # imports numpy

    free = {"output", "data", "init", "probe", "watch", "logging", "loader.num_workers"}
    free |= {f"trainer.{one.name}" for one in fields(TrainerConfig) if one.name not in _FIXED}
    flat_old, flat_new = flatten(_with_defaults(old)), flatten(new)
    if flat_new["trainer.max_steps"] > flat_old.get("trainer.max_steps", 0):
        free |= {"trainer.max_steps"}
    keys = [key for key in flat_old.keys() | flat_new.keys() if key not in free and key.split(".")[0] not in free]
    return _differences(flat_old, flat_new, keys)


def changed_rounding(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences that let a resumed run end where another would have, but not to the bit.

    Such settings belong to the machine, and a run must be able to move; so they may change.
    """
    from bestrq2.run_records import flatten

    return _differences(flatten(_with_defaults(old)), flatten(new), [f"trainer.{name}" for name in _ROUNDING])


def _differences(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> list[str]:
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(keys)
        if old.get(key) != new.get(key)
    ]


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, fields that it did not have yet at their defaults, which is what it did."""
    model = {name: settings["model"].get(name, _list(getattr(ModelFields, name))) for name in FIELD_TYPES}
    groups = {name: {**_plain(kind()), **settings.get(name, {})} for name, kind in GROUPS.items()}
    return {**settings, "model": model, **groups}


def _plain(group: Any) -> dict[str, Any]:
    """A group of settings as config.yaml holds it: lists instead of tuples, text instead of paths."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(group), default=str))
    return values


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_DATA = (
    'folder of audio or of tars, file, list (.txt, .csv, .jsonl), pattern ("shards/*.tar"), mixture (.yaml), HDF5 '
    '(.h5), Hub dataset ("hub:NAME"), remote tars ("https://host/shard-{000..099}.tar"), or "soundworld"'
)

_INIT = (
    'model whose weights and architecture the run starts from: "bestrq2-tiny", run folder, exported folder, reference '
    "checkpoint or hub id; what it lacks is initialised from the seed"
)

_TEACHER = (
    'trained encoder of the same patches, such as "bestrq2-tiny": its clustered states are the targets of half of the '
    "codebooks (a second round)"
)


def pretrain_parser(
    name: str = DEFAULT_RECIPE, stored: dict[str, Any] | None = None, init: str | None = None
) -> ArgumentParser:
    """A parser of all settings of a pretraining run.

    Args:
        name: recipe whose values are the defaults.
        stored: values of a stored run, which are the defaults instead.
        init: model whose architecture replaces that of the recipe.
    """
    parser = make_parser("pretrain", _DESCRIPTION, "bestrq2 pretrain --data DATA --output FOLDER [settings]")
    most_used = parser.add_argument_group("settings that most runs need")
    add_argument(most_used, "data", str | None, None, _DATA)
    add_argument(most_used, "output", str | None, None, "run folder to write")
    add_argument(most_used, "recipe", str, name, f"recipe to start from: {recipe_names()}, or a YAML file")
    add_arguments(most_used, TrainerConfig, group="trainer", only=_MOST_USED["trainer"])
    add_arguments(most_used, LoaderConfig, group="loader", only=_MOST_USED["loader"])
    parser.add_argument_group("example", _EXAMPLE)
    run = parser.add_argument_group("run")
    add_argument(run, "seed", NonNegativeInt, 0, "random seed of weights, data order, crops and masks")
    add_argument(run, "init", str | None, None, _INIT)
    add_argument(run, "teacher", str | None, None, _TEACHER)
    add_argument(run, "resume", bool, False, _RESUME)
    for group, kind in {"model": ModelFields, **GROUPS}.items():
        title = document(kind)[0].splitlines()[0].rstrip(".")
        heading = parser.add_argument_group(f"settings of {group}: {title}")
        add_arguments(heading, kind, group=group, skip=_MOST_USED.get(group, ()))
    parser.set_defaults(_defaults(parser, name) if stored is None else stored)
    if init is not None:
        from bestrq2.train.initial import initial_fields  # imports torch

        parser.set_defaults({f"model.{field}": value for field, value in initial_fields(init).items()})
    return parser


_DESCRIPTION = "Pretrain an encoder on unlabelled audio and write a run folder."
_EXAMPLE = "  bestrq2 pretrain --data recordings/ --output run --recipe best-rq-2-tiny --trainer.max_steps 2000"
_RESUME = (
    "continue the run in --output with its own data and settings, or start it if there is none; a larger "
    "--trainer.max_steps extends it"
)
_MOST_USED = {"trainer": ("max_steps",), "loader": ("batch_seconds",)}


def _defaults(parser: ArgumentParser, name: str) -> dict[str, Any]:
    """The settings of a recipe by dotted name, their names and types checked."""
    settings = recipe(name)
    settings.pop("description", None)
    try:
        parse_settings(parser, settings)
    except ConfigError as error:
        raise ConfigError(f"recipe {name}: {error}") from error
    return {f"{group}.{key}": value for group, values in settings.items() for key, value in values.items()}


def stored_settings(output: Path) -> dict[str, Any] | None:
    """All settings of the pretraining run in a folder by dotted name, for `--resume`; None where there is no run.

    Raises:
        CheckpointError: its config.yaml cannot be read, or another version of the package began the run.
        ConfigError: the folder holds a run of another kind.
    """
    from bestrq2.run_records import earlier_setting, flatten  # imports numpy

    if (settings := _stored(output)) is None:
        return None
    if not all(isinstance(settings.get(group), dict) for group in ("model", "loader", "trainer")):
        raise ConfigError(f"{output}: holds another kind of run; name a new folder with --output")
    if "batch_seconds" not in settings["loader"]:
        raise earlier_order(output)
    if found := earlier_setting(settings):
        raise CheckpointError(
            f"{output}: has {found}, which this version of bestrq2 no longer knows; finish the run with the version "
            "that began it, or name a new folder with --output"
        )
    return flatten(_without_removed({**_with_defaults(settings), "output": str(output)}))


def _stored(output: Path) -> dict[str, Any] | None:
    """What config.yaml of a folder holds; None where there is no such file."""
    from bestrq2.run_records import read_settings

    path = output / "config.yaml"
    try:
        return read_settings(path) if path.exists() else None
    except DataError as error:
        raise CheckpointError(str(error)) from error


def earlier_order(path: Path) -> CheckpointError:
    """The error for a run, or a state of one, that another version of the package began."""
    return CheckpointError(
        f"{path}: was begun by another version of bestrq2, which drew its batches in another order; finish the run "
        "with that version, or name a new folder with --output"
    )


def parse_arguments(argv: Sequence[str]) -> tuple[PretrainConfig, bool]:
    """Flags (and the files they name) to a configuration, and whether to resume.

    A run that is resumed keeps the settings that are not given.

    Raises:
        ConfigError: for unknown flags, wrong values, or values at odds with each other.
    """
    parser = pretrain_parser(_recipe_of(argv))
    parsed = parse_flags(parser, [word for word in argv if not word.startswith("--print")])
    stored = stored_settings(Path(parsed.output)) if parsed.resume and parsed.output else None
    if stored is not None:
        parser = pretrain_parser(stored=stored)
    elif parsed.init:
        parser = pretrain_parser(_recipe_of(argv, parsed.init), init=parsed.init)
    return build_config(parse_flags(parser, argv)), parsed.resume


def resolve(settings: dict[str, Any]) -> PretrainConfig:
    """Nested settings, such as those of `config.yaml` or of a notebook, laid over their recipe or the resumed run.

    Raises:
        ConfigError: as `parse_arguments`.
    """
    kept = _without_removed(settings)
    stored = stored_settings(Path(kept["output"])) if kept.get("resume") else None
    # Settings of a run, which hold an architecture, do not need the model that it started from.
    whole = isinstance(kept.get("model"), dict) and kept["model"].keys() >= FIELD_TYPES.keys()
    init = None if stored is not None else kept.get("init")
    parser = pretrain_parser(
        _base_of(kept, init) if stored is None else DEFAULT_RECIPE, stored, None if whole else init
    )
    return build_config(parse_settings(parser, kept))


def _without_removed(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        group: {key: value for key, value in values.items() if key not in _REMOVED.get(group, ())}
        if isinstance(values, dict)
        else values
        for group, values in settings.items()
    }


def _recipe_of(argv: Sequence[str], init: str | None = None) -> str:
    """The recipe that the flags, or the YAML file they name, start from: its values are the defaults of all others."""
    found = _values_of(argv, "--recipe", "--config")
    if "--recipe" in found:
        return found["--recipe"]
    return _base_of(_read_config(found["--config"]) if "--config" in found else {}, init)


def _values_of(argv: Sequence[str], *names: str) -> dict[str, str]:
    """Last values of some flags on a command line."""
    found: dict[str, str] = {}
    for flag in names:
        for index, argument in enumerate(argv):
            if argument == flag and index + 1 < len(argv):
                found[flag] = argv[index + 1]
            elif argument.startswith(f"{flag}="):
                found[flag] = argument.split("=", 1)[1]
    return found


def _read_config(path: str) -> dict[str, Any]:
    """Settings in the YAML file of --config; empty where it holds something else."""
    try:
        loaded = yaml.safe_load(regular_file(Path(path)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML ({reason}); name a file of settings") from error
    return loaded if isinstance(loaded, dict) else {}


def _base_of(settings: dict[str, Any], init: str | None = None) -> str:
    """The recipe that settings start from; by default that of the run from whose weights another one starts.

    The config.yaml of a run holds every setting: it needs no recipe, and remains valid when a recipe file is deleted.
    """
    if not settings.get("recipe") and init is not None:
        run = Path(init) / "config.yaml"
        own = (_read_config(str(run)) if run.is_file() else shipped_training(init)).get("recipe")
        return own if own in recipes() else DEFAULT_RECIPE
    name = str(settings.get("recipe") or DEFAULT_RECIPE)
    gone = is_recipe_file(name) and not Path(name).expanduser().is_file()
    return (
        DEFAULT_RECIPE
        if gone and {"data", "seed", "model", "loader", "optimizer", "trainer"} <= set(settings)
        else name
    )


def build_config(parsed: Namespace) -> PretrainConfig:
    """Validate parsed settings as a whole.

    Raises:
        ConfigError: for values out of range or at odds with each other.
    """
    settings = parsed.as_dict()
    for name, meaning in (("output", "the run folder to write"), ("data", "where the audio is, for instance a folder")):
        if not settings.get(name):
            if name == "data" and settings["resume"]:
                raise ConfigError(
                    f"{settings['output']}: holds no run to resume; to start one, name {meaning}, with --data"
                )
            raise ConfigError(f"--{name} is missing: name {meaning}")
    model = ModelFields()
    try:
        model.set_fields(settings["model"])
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    return PretrainConfig(
        recipe=settings["recipe"],
        init=settings["init"],
        teacher=settings["teacher"],
        data=settings["data"],
        output=Path(settings["output"]),
        seed=settings["seed"],
        model=model,
        **{name: kind(**settings[name]) for name, kind in GROUPS.items()},
    )
