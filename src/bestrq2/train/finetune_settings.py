"""What a fine-tuning run can be told, and which parts of a classifier it trains."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from bestrq2 import flags
from bestrq2.errors import ConfigError
from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification
from bestrq2.train.optimizer import parameter_groups
from bestrq2.train.settings import OptimizerConfig

MODES = ("linear", "partial", "full")
# A head alone stands, and wants, larger steps than pretrained weights.
_PEAK_RATES = {"linear": 1e-3, "partial": 1e-4, "full": 1e-4}
# What may differ when a run is resumed: where it runs, not what it computes.
_FREE = frozenset({"output", "num_workers", "device"})
_BLOCK = re.compile(r"bestrq2\.encoder\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run, complete; see `finetune` for the fields."""

    model: str
    labelled: str
    output: Path
    mode: str
    layers: int | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_fraction: float
    layer_decay: float
    balanced: bool
    max_seconds: float | None
    seed: int
    num_workers: int
    device: str | None

    def __post_init__(self) -> None:
        """Raise a ConfigError unless the settings are in range and fit together."""
        if self.mode not in MODES:
            raise ConfigError(
                f"there is no mode '{self.mode}'{flags.nearest(self.mode, MODES)}; use {', '.join(MODES)}"
            )
        if (self.mode == "partial") != (self.layers is not None):
            raise ConfigError("layers belongs to mode partial, which needs it: the number of last blocks to train")
        if self.layer_decay != 1 and self.mode == "linear":
            raise ConfigError("layer_decay means nothing in mode linear, which trains no layer; leave it out")
        rules = [
            (self.layers is None or self.layers >= 1, f"layers must be at least 1, got {self.layers}"),
            (self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}"),
            (self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}"),
            (0 < self.lr < math.inf, f"lr must be above 0, got {self.lr}"),
            (0 <= self.weight_decay < math.inf, f"weight_decay must not be negative, got {self.weight_decay}"),
            (0 <= self.warmup_fraction < 1, f"warmup_fraction must lie in [0, 1), got {self.warmup_fraction}"),
            (0 < self.layer_decay <= 1, f"layer_decay must lie in (0, 1], got {self.layer_decay}"),
            (
                self.max_seconds is None or 0 < self.max_seconds < math.inf,
                f"max_seconds must be above 0, got {self.max_seconds}",
            ),
            (self.seed >= 0, f"seed must not be negative, got {self.seed}"),
            (self.num_workers >= 0, f"num_workers must not be negative, got {self.num_workers}"),
        ]
        for holds, sentence in rules:
            if not holds:
                raise ConfigError(sentence)

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW and the course of the learning rate."""
        return OptimizerConfig(lr=self.lr, weight_decay=self.weight_decay, warmup_fraction=self.warmup_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them."""
        return {**asdict(self), "output": str(self.output)}

    def changes_from(self, old: dict[str, Any]) -> list[str]:
        """Settings that make this another run than the one whose `config.yaml` held `old`."""
        new = self.to_dict()
        names = [field.name for field in fields(self) if field.name not in _FREE]
        return [f"{name} was {old.get(name)} and is now {new[name]}" for name in names if old.get(name) != new[name]]


def peak_rate(mode: str, lr: float | None) -> float:
    """The learning rate asked for, or that of the mode."""
    return _PEAK_RATES.get(mode, 1e-4) if lr is None else lr


def choose_trainable(model: BestRQ2ForAudioClassification, mode: str, layers: int | None) -> list[nn.Module]:
    """Let gradients reach the head ("linear"), also the last blocks and the norm behind them ("partial"), or all.

    Returns:
        The modules that are trained.

    Raises:
        ConfigError: there are fewer blocks than `layers`.
    """
    trained: list[nn.Module] = [model.classifier]
    if mode == "full":
        trained = [model]
    elif mode == "partial":
        assert layers is not None
        encoder = model.bestrq2.encoder
        if layers > len(encoder.blocks):
            raise ConfigError(
                f"layers is {layers}, but the encoder has {len(encoder.blocks)} blocks; give at most that"
            )
        trained += encoder.blocks[-layers:]
        if isinstance(norm := getattr(encoder, "norm", None), nn.Module):
            trained.append(norm)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return trained


def layer_groups(model: BestRQ2ForAudioClassification, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and depth; `initial_lr` falls by `layer_decay` from each block to the one
    before it, from the head and the last norm down to what lies before the first block.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    top = len(model.bestrq2.encoder.blocks) + 1
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for group in parameter_groups(model, config.weight_decay, decay_all=False):
        parameters: Any = group["params"]
        decay: Any = group["weight_decay"]
        for parameter in parameters:
            groups.setdefault((decay, _depth(names[parameter], top)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "initial_lr": config.lr * config.layer_decay ** (top - depth)}
        for (decay, depth), parameters in groups.items()
    ]


def _depth(name: str, top: int) -> int:
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return top if name.startswith(("classifier.", "bestrq2.encoder.norm.")) else 0
