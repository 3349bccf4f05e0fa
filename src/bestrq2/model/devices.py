"""How small tensors get from the CPU to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU is sent it without waiting, through page-locked memory.

    Elsewhere the copy is waited for: not every device keeps the source until it has been read.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
