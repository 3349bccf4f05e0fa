"""AdamW, its parameter groups, and the learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from bestrq2.train.settings import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, object]]:
    """Trainable parameters with and without weight decay.

    Matrices and kernels decay; biases, norms and tokens do not, unless `decay_all` asks for the reference's behaviour.
    """
    matrices = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if decay_all or parameter in matrices]
    others = [parameter for parameter in trainable if not decay_all and parameter not in matrices]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": weight_decay}]
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])


def learning_rate_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate at a step (from 0): linear warm-up, then cosine down to `final_lr_ratio`."""
    warmup = warmup_steps(max_steps, config)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine


def warmup_steps(max_steps: int, config: OptimizerConfig) -> int:
    """Steps in which the rate rises."""
    return round(config.warmup_fraction * max_steps)


def ema_decay(max_steps: int, config: OptimizerConfig) -> float:
    """Decay of the moving average, about 20 time constants over what follows the warm-up (paper section 3)."""
    steps = max(1, max_steps - warmup_steps(max_steps, config))
    return min(max(1.0 - 20.0 / steps, 0.9), 0.99999)


def make_optimizer(model: nn.Module, config: OptimizerConfig, precision: str) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, fused unless float16 gradients must be unscaled before they are clipped."""
    groups = parameter_groups(model, config.weight_decay, config.decay_all)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=not precision.startswith("16"))
