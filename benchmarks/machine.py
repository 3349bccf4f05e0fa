"""What this machine can do at best: the measuring stick of all benchmarks."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bestrq2.train.run_folder import environment


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


def processor() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def description(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and measured float32 peak, for the JSON files in benchmarks/results."""
    known = {name: value for name, value in environment().items() if name != "command"}
    peak = round(matrix_product_peak(device, torch.float32), 1)
    return {**known, "processor": processor(), "device": str(device), "float32_gflops_peak": peak}
