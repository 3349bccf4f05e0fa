"""Description and peak performance of this machine, to which all benchmarks refer."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds_per_call(call: Callable[[], object], device: torch.device, least_seconds: float = 1.0) -> float:
    """Median time of a call, after one warm-up call."""
    timed(call, device)
    times = [timed(call, device)]
    while sum(times) < least_seconds or len(times) < 3:
        times.append(timed(call, device))
    return statistics.median(times)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including the work of the device."""
    return host_and_device(call, device)[1]


def host_and_device(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until a call returns, and until the device has done its work too."""
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return returned - start, time.perf_counter() - start


def matrix_product_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured GFLOP/s of a large square matrix product."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / seconds_per_call(lambda: left @ right, device)


def description(device: torch.device) -> dict[str, str | int]:
    """Hardware and versions, for the head of a table of results."""
    found: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
