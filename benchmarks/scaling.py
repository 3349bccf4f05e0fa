"""Scaling of pretraining cost with clip length, batch, model, hidden patches and processes.

    python benchmarks/scaling.py --output docs/figures --json benchmarks/results/scaling_cpu.json

One plot each (`scaling-length.png` and so on) with measured points and the expected line, which follows from three
constants, measured once at a reference (`best-rq-2-tiny`, clips of 10 s, batch 16, one mask):

    milliseconds per clip = front end per second of audio x seconds     (spectrogram, patches, codes)
                          + GFLOP of a clip / GFLOP per millisecond     (bestrq2.inference.cost)
                          + optimiser per parameter x parameters / clips in a batch

GFLOP are counted on the network, including the quadratic part of attention. `--redraw` draws the plots of a JSON file
again. A step is the spectrogram, forward, backward and AdamW on noise; only the plot of processes times complete runs
(`bestrq2 pretrain --trainer.devices N`, one thread per process, data parallel by gloo).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scaling_figures
import torch
from data_loading import write_corpus
from machine import description

import bestrq2
from bestrq2.inference.cost import cost
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig

REFERENCE, BATCH = "best-rq-2-tiny", 16


def configuration(recipe: str, **changes: Any) -> bestrq2.BestRQ2Config:
    """Configuration of a recipe with some fields of the model changed."""
    return bestrq2.BestRQ2Config(**{**bestrq2.recipe(recipe)["model"], **changes})


@dataclass(frozen=True)
class Timed:
    """Medians of one setting, milliseconds per step.

    Attributes:
        front_end: spectrogram, patches and the codes of all patches.
        network: forward and backward, without what is in `front_end`.
        optimiser: AdamW.
        gflops: of the network, forward and backward, a clip.
        parameters: that are trained.
    """

    front_end: float
    network: float
    optimiser: float
    gflops: float
    parameters: int

    @property
    def step(self) -> float:
        """All three."""
        return self.front_end + self.network + self.optimiser


def timed_step(
    config: bestrq2.BestRQ2Config, batch: int, device: torch.device, seconds: float, clock: Callable[[], float]
) -> Timed:
    """Time steps for `seconds`, at least three after one warm-up step."""
    torch.manual_seed(0)
    model = bestrq2.BestRQ2ForPreTraining(config).to(device).train()
    optimizer = make_optimizer(model, OptimizerConfig(), "32-true")
    audio = 0.1 * torch.randn(batch, config.max_samples, device=device)
    columns = [config.columns(config.max_samples)] * batch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * clock()

    rows: list[tuple[float, float, float]] = []
    begin = now()
    while len(rows) < 4 or now() - begin < 1000 * seconds:
        mask = draw_hidden_mask(config, columns, 0, len(rows), range(batch))
        start = now()
        with torch.no_grad():
            patches = model.base_model.patches(audio)
            model.quantizer(patches.quantizer_input)
        front = now() - start
        start = now()
        model(audio, hidden_mask=mask).loss.backward()
        both = now() - start
        start = now()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append((front, both - front, now() - start))
    front, network, update = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    counted = cost(config)
    return Timed(front, network, update, counted.training_gflops, counted.pretraining_parameters)


def peak_gflops(device: torch.device, clock: Callable[[], float]) -> float:
    """GFLOP/s of a large float32 matrix product by this clock."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    times = []
    for _ in range(8):
        start = clock()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return round(2 * size**3 / 1e9 / statistics.median(times[1:]), 1)


class Points:
    """Measures settings and prints each result."""

    def __init__(self, device: torch.device, seconds: float, clock: Callable[[], float]) -> None:
        self.device, self.seconds, self.clock = device, seconds, clock

    def __call__(self, x: float, recipe: str, batch: int, **changes: Any) -> dict[str, Any]:
        """One point of a plot: x, its setting, and times a step in ms."""
        config = configuration(recipe, **changes)
        timed = timed_step(config, batch, self.device, self.seconds, self.clock)
        point = {"x": x, "recipe": recipe, "batch": batch, "clip_seconds": config.max_seconds, **asdict(timed)}
        print(f"  {recipe:<18} x {x:<8g} batch {batch:<3} {timed.step / batch:9.2f} ms/clip", flush=True)
        return point


def linear_gflops(recipe: str, seconds: float) -> float:
    """GFLOP of a clip without the part that grows with the square of its length."""
    short, long = (configuration(recipe, max_seconds=length) for length in (10.0, 40.0))
    first, second = (config.columns(config.max_samples) for config in (short, long))
    counts = [cost(short).training_gflops, cost(long).training_gflops]
    linear, _ = np.linalg.solve([[first, first**2], [second, second**2]], counts)
    config = configuration(recipe, max_seconds=seconds)
    return float(linear * config.columns(config.max_samples))


def lengths(point: Points) -> list[dict[str, Any]]:
    """Clips of 1 to 60 s, the same audio in every batch."""
    found = []
    for seconds in (1, 2, 5, 10, 20, 40, 60):
        batch = max(1, round(160 / seconds))
        each = point(seconds, REFERENCE, batch, max_seconds=float(seconds))
        found.append({**each, "linear_gflops": linear_gflops(REFERENCE, seconds)})
    return found


def batches(point: Points) -> list[dict[str, Any]]:
    """Clips in a batch."""
    return [point(batch, REFERENCE, batch) for batch in (1, 2, 4, 8, 16, 32, 64)]


def models(point: Points) -> list[dict[str, Any]]:
    """Sizes of both objectives; x is GFLOP per clip."""
    names = (
        "demo", "best-rq-2-tiny", "best-rq-2-plus-tiny", "best-rq-vit-tiny", "best-rq-2-small", "best-rq-vit-small",
        "best-rq-2",
    )  # fmt: skip
    found = []
    for name in names:
        gflops = cost(configuration(name)).training_gflops
        found.append(point(gflops, name, 4 if gflops > 10 else BATCH))
    return found


def ratios(point: Points) -> list[dict[str, Any]]:
    """Shares of hidden patches, for the two-step and the one-stage objective."""
    return [
        point(ratio, recipe, BATCH, mask_ratio=[ratio, ratio])
        for recipe in (REFERENCE, "best-rq-vit-tiny")
        for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]


def processes(steps: int, most: int) -> list[dict[str, Any]]:
    """Complete runs in 1, 2, ... processes on the CPU: ms per step of 32 clips, from timing.csv."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), 64)
        for number in [count for count in (1, 2, 4, 8) if count <= most]:
            run = Path(folder) / f"run-{number}"
            command = [
                str(Path(sys.executable).with_name("bestrq2")), "pretrain", "--recipe", REFERENCE,
                "--data", str(Path(folder) / "pcm"), "--output", str(run), "--loader.batch_seconds", "320",
                "--loader.num_workers", "0", "--loader.validation_clips", "0", "--trainer.accelerator", "cpu",
                "--trainer.devices", str(number), "--trainer.max_steps", str(steps + 2),
                "--trainer.log_every_n_steps", "1", "--trainer.val_every_n_steps", "0",
            ]  # fmt: skip
            result = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise SystemExit(f"{number} processes: {result.stderr[-2000:]}")
            table = list(csv.DictReader(io.StringIO((run / "timing.csv").read_text())))
            seconds = {int(row["step"]): float(row["seconds"]) for row in table}
            # The last step writes a checkpoint after its time was taken.
            step = statistics.median(1000 * (seconds[at + 1] - seconds[at]) for at in range(1, steps + 1))
            found.append({"x": number, "recipe": REFERENCE, "batch": 32, "step": step})
            print(f"  {number} processes {step / 32:9.2f} ms/clip", flush=True)
            shutil.rmtree(run)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--output", type=Path, required=True, help="folder of the plots")
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--redraw", type=Path, help="draw the plots of this JSON file without measuring")
    parser.add_argument("--only", nargs="+", choices=list(scaling_figures.PLOTS), default=list(scaling_figures.PLOTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="minimum time of each point")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run in the plot of processes")
    parser.add_argument("--most-processes", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument(
        "--processor-time", action="store_true", help="measure processor time of one thread (shared CPU)"
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.redraw:
        scaling_figures.write(json.loads(arguments.redraw.read_text()), arguments.output)
        return
    device = torch.device(arguments.device)
    clock = time.perf_counter
    if arguments.processor_time:
        torch.set_num_threads(1)
        clock = time.process_time
    point = Points(device, arguments.seconds, clock)
    measured: dict[str, Any] = {"machine": description(device), "command": sys.argv, "plots": {}}
    measured["cpus"] = os.cpu_count()
    measured["peak_gflops"] = peak_gflops(device, clock)
    measured["clock"] = "processor time of one thread" if arguments.processor_time else "wall time"
    print("reference", flush=True)
    measured["reference"] = point(0, REFERENCE, BATCH)
    plots = {"length": lengths, "batch": batches, "model": models, "ratio": ratios}
    for name in arguments.only:
        print(name, flush=True)
        if name == "processes":
            measured["plots"][name] = processes(arguments.steps, arguments.most_processes)
        else:
            measured["plots"][name] = plots[name](point)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    scaling_figures.write(measured, arguments.output)


if __name__ == "__main__":
    main()
