"""What this machine can do at best: the measuring stick of all benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds_per_call(call: Callable[[], object], device: torch.device, least_seconds: float = 1.0) -> float:
    """Median time of a call, after one to warm up."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    times = [timed()]
    while sum(times) < least_seconds or len(times) < 3:
        times.append(timed())
    return statistics.median(times)


def matrix_product_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured GFLOP/s of a large square matrix product."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / seconds_per_call(lambda: left @ right, device)
