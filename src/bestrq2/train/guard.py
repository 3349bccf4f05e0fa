"""Guard against steps whose loss or gradient is not finite: they are skipped and counted, on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def marked(loss: Tensor) -> Tensor:
    """The same loss, float []; where it is not finite, the gradients it gives are NaN.

    So the gradients alone tell whether a step is valid: they carry the verdict through the accumulation of batches, the
    reduction over processes and the scaling of float16, and all processes see the same.
    """
    one = torch.ones((), dtype=loss.dtype, device=loss.device)
    return loss * torch.where(loss.detach().isfinite(), one, torch.nan)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float [] on their device; that of the whole where they are shards."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Guard:
    """Judges every optimiser step and counts skipped ones.

    Attributes:
        skipped: int64 [] on the device, steps skipped so far.
        in_a_row: int64 [] on the device, how many of them were the latest ones.
        skip: bool [] on the device, whether the latest step is skipped.
        norm: float [] on the device, gradient norm of the latest step, before clipping.
        losses: float [] each, of the latest step's batches in this process.
    """

    def __init__(self) -> None:
        self.skipped = torch.zeros((), dtype=torch.int64)
        self.in_a_row = torch.zeros((), dtype=torch.int64)
        self.skip = torch.zeros((), dtype=torch.bool)
        self.norm = torch.zeros(())
        self.losses: list[Tensor] = []
        self._new_losses: list[Tensor] = []
        self._on_its_way: tuple[Tensor, Any] | None = None

    def to(self, device: torch.device) -> None:
        """Move the counters."""
        self.skipped, self.in_a_row = self.skipped.to(device), self.in_a_row.to(device)

    def see(self, loss: Tensor) -> Tensor:
        """Record the loss of one batch, float []; returns the one to differentiate in its place (see `marked`)."""
        self._new_losses.append(loss.detach())
        return marked(loss)

    @torch.no_grad()
    def judge(self, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        """Let the optimiser skip this step if the norm of all gradients is not finite.

        A fused optimiser then changes neither weights nor moments nor its count of steps, without synchronisation. A
        float16 run has no fused one: there the gradient scaler finds the same gradients and skips by itself.

        Args:
            parameters: trained parameters, with gradients reduced over all processes.
            optimizer: about to step.

        Returns:
            The norm, float [].
        """
        self.losses, self._new_losses = self._new_losses, []
        self.norm = gradient_norm(parameters)
        self.skip = ~self.norm.isfinite()
        self.skipped = self.skipped + self.skip
        self.in_a_row = (self.in_a_row + 1) * self.skip
        if optimizer.param_groups[0]["fused"]:  # the attribute that torch's own gradient scaler sets
            optimizer.found_inf = self.skip.float()  # type: ignore[attr-defined]
        return self.norm

    def kept(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contribution of the latest step to a running sum: zeros if it is skipped."""
        return {name: torch.where(self.skip, 0.0, value) for name, value in sums.items()}

    def too_many(self, limit: int) -> bool:
        """Whether the latest `limit` steps or more were skipped; to be called once after every step.

        On a GPU the answer is that of the step before, so that the device never waits for this process; a yes is
        checked against the latest step, whose batch is still in memory.
        """
        if not self.in_a_row.is_cuda:
            return int(self.in_a_row) >= limit
        before, self._on_its_way = self._on_its_way, self._sent()
        if before is None:
            return False
        count, event = before
        event.synchronize()
        return int(count) >= limit and int(self.in_a_row) >= limit

    def _sent(self) -> tuple[Tensor, Any]:
        count = torch.empty((), dtype=torch.int64, pin_memory=True)
        count.copy_(self.in_a_row, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return count, event

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"skipped": int(self.skipped), "in_a_row": int(self.in_a_row)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up the counters where they were."""
        self.skipped, self.in_a_row = torch.tensor(state["skipped"]), torch.tensor(state["in_a_row"])
