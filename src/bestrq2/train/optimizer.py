"""AdamW and Muon, their parameter groups, the learning rate over the steps, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from bestrq2.train.settings import FinetuneConfig, OptimizerConfig

_BLOCK = re.compile(r"bestrq2\.encoder\.blocks\.(\d+)\.")


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, precision: str, groups: list[dict[str, Any]] | None = None
) -> torch.optim.AdamW:
    """AdamW or Muon over the trainable parameters.

    AdamW is fused unless float16 gradients must be unscaled before they are clipped.

    Args:
        model: the model.
        config: rates and decay.
        precision: precision of the run, such as "32-true" or "16-mixed".
        groups: parameter groups, by default those of `parameter_groups`; `initial_lr` of a group, by default the rate
            of the configuration, is its peak learning rate.
    """
    if groups is None:
        groups = parameter_groups(model, config.weight_decay, config.decay_all)
    groups = [{"initial_lr": config.lr, **group} for group in groups]
    fused = not precision.startswith("16")
    if config.algorithm == "muon":
        groups = _matrices_apart(model, groups)
    kind = Muon if config.algorithm == "muon" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


class Muon(torch.optim.AdamW):
    """Muon for the groups marked with "muon", AdamW for the others.

    A matrix moves along its momentum, whose singular values become about 1 by five Newton-Schulz iterations (Jordan
    et al., 2024, "Muon: an optimizer for hidden layers in neural networks"). The factor 0.2 sqrt(larger side) makes
    its entries move as far as those of AdamW, so that both share learning rate and weight decay (arXiv 2502.16982).
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step, without a closure; a `found_inf` of 1 leaves all as it is, as in a fused AdamW."""
        assert closure is None, "a closure would see matrices that have moved already"
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if group["muon"] and parameter.grad is not None]
            for shape in dict.fromkeys(parameter.shape for parameter in moved):
                alike = [parameter for parameter in moved if parameter.shape == shape]
                # On a CPU one fits the caches; on a GPU, launching kernels for each takes longer than their work.
                together = len(alike) if alike[0].is_cuda else 1
                for first in range(0, len(alike), together):
                    self._move(alike[first : first + together], group["lr"], group["weight_decay"])
            for parameter in moved:
                parameter.grad = None  # AdamW passes over it
        return super().step()

    def _move(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """Move matrices of one shape."""
        for matrix in matrices:
            if not self.state[matrix]:  # with the names of AdamW, which looks for them
                self.state[matrix]["step"] = torch.zeros((), device=matrix.device)
                self.state[matrix]["exp_avg"] = torch.zeros_like(matrix)
        states = [self.state[matrix] for matrix in matrices]
        kept, weights = _joined([state["exp_avg"] for state in states]), _joined(matrices)
        gradient = _joined([matrix.grad for matrix in matrices if matrix.grad is not None])
        momentum = kept.lerp(gradient, 1 - self.MOMENTUM)
        direction = orthogonalised(gradient.lerp(momentum, self.MOMENTUM))
        moved = weights * (1 - lr * weight_decay) - lr * 0.2 * max(weights.shape[-2:]) ** 0.5 * direction
        skip = getattr(self, "found_inf", torch.zeros((), device=weights.device)) > 0
        for matrix, state, new, new_momentum in zip(
            matrices,
            states,
            torch.where(skip, weights, moved).view(-1, *weights.shape[-2:]),
            torch.where(skip, kept, momentum).view(-1, *weights.shape[-2:]),
            strict=True,
        ):
            matrix.copy_(new)
            state["exp_avg"].copy_(new_momentum)
            state["step"] += ~skip


def _joined(matrices: list[Tensor]) -> Tensor:
    """Several matrices as one tensor [K, M, N]; a single one as it is."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0]


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Set singular values above about 1/500 of a matrix's norm to 0.7 to 1.2, in bfloat16: [..., M, N] to [..., M, N].

    Smaller ones grow as well, but remain smaller.
    """
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if upright else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x.mT if upright else x).to(matrices.dtype)


def _matrices_apart(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups for Muon: the matrices of linear layers, without that of the head, in groups of their own."""
    matrices = {
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"
    }
    apart = []
    for group in groups:
        for muon in (True, False):
            if chosen := [parameter for parameter in group["params"] if (parameter in matrices) == muon]:
                apart.append({**group, "params": chosen, "muon": muon})
    return apart


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay.

    Matrices and kernels decay; biases, norms and tokens do not, except with `decay_all`, as in the reference.
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
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}]
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])


def layer_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Trainable parameters of a classifier by weight decay and depth.

    `initial_lr` falls by `layer_decay` from each block to the one before it, from the head and the last norm down to
    what is in front of the first block.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    top = len(model.get_submodule("bestrq2.encoder.blocks")) + 1  # type: ignore[arg-type]
    groups: dict[tuple[float, int], list[Tensor]] = {}
    for group in parameter_groups(model, config.weight_decay):
        for parameter in group["params"]:
            groups.setdefault((group["weight_decay"], _depth(names[parameter], top)), []).append(parameter)
    peak = config.optimizer.lr
    return [
        {"params": parameters, "weight_decay": decay, "initial_lr": peak * config.layer_decay ** (top - depth)}
        for (decay, depth), parameters in groups.items()
    ]


def _depth(name: str, top: int) -> int:
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return top if name.startswith(("classifier.", "bestrq2.encoder.norm.")) else 0


def learning_rate_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate at a step (from 0), 0 at the first step of a warm-up, as in the public code.

    The rate rises linearly, then falls with a cosine to `final_lr_ratio` or with the inverse root of the step ("noam").
    """
    warmup = warmup_steps(max_steps, config)
    if step < warmup:
        return step / warmup
    if config.schedule == "noam":
        return (max(1, warmup) / max(1, step)) ** 0.5
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine


def warmup_steps(max_steps: int, config: OptimizerConfig) -> int:
    """Number of steps in which the learning rate rises, rounded down as in the public code."""
    return int(config.warmup_fraction * max_steps)


def ema_decay(max_steps: int, config: OptimizerConfig) -> float:
    """Decay of the moving average, about 20 time constants over the steps after the warm-up (paper section 3)."""
    steps = max(1, max_steps - warmup_steps(max_steps, config))
    return min(max(1.0 - 20.0 / steps, 0.9), 0.99999)


class MovingAverage:
    """Exponential moving average of a model's parameters; buffers, which are frozen, are those of the model.

    Args:
        model: the model; copied.
        decay: share of the average that is kept at each step.
        start: number of steps before the first update.
    """

    def __init__(self, model: nn.Module, decay: float, start: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.start = start

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after a step (from 1) into the average, which begins with the first weights it gets."""
        average: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        if step == self.start + 1:
            torch._foreach_copy_(average, current)
        elif step > self.start:
            torch._foreach_lerp_(average, current, 1.0 - self.decay)
