"""Speed, memory and parts of one pretraining step, compared with a plain step and other implementations.

python benchmarks/pretraining_step.py --recipes best-rq-2-tiny best-rq-2 --compiled --memory --json step.json

A step is forward, backward and AdamW on random audio of full length, with masks drawn on the CPU. All steps of one size
are interleaved in one process, so that other load on the machine affects them alike; times are medians over the rounds.
GFLOP/s counts the network's matrix products at the mean mask ratio (`bestrq2 info`), so spectrogram, quantizer and
optimiser lower the share of the matrix-product peak, which is measured first. `plain` is plain_step.py, whose loss is
checked against ours on the same masks; peers (peers.py) have the sizes of the Conformer recipes. Memory is the peak of
two steps, on a CPU in a separate process; its floor is weights, gradients and moments (16 bytes per parameter) plus
what autograd keeps of a batch (memory.py). Parts are from torch.profiler. Optimisers are those of the recipes.

On a GPU, `--graphs` adds steps whose forward and backward pass are one CUDA graph (graphed_step.py), with as many
hidden patches in every step; the host's time is that until the call of a step returns. Instead of parts, whose device
time is in end_to_end.py, there are the longest kernels, and the share of a step's time in which any kernel runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from graphed_step import graphed_step
from machine import description, host_and_device, matrix_product_peak
from memory import kept_bytes, peak_of, state_bytes
from peers import PEERS, make_peer
from plain_step import PlainModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import bestrq2
from bestrq2.inference.compiling import compile_parts
from bestrq2.inference.cost import cost
from bestrq2.model import modeling_bestrq2
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig

PARTS = ("front end", "encoder", "predictor", "head and loss", "backward", "optimiser")


@dataclass
class Row:
    """One line of the table."""

    recipe: str
    step: str
    batch: int
    precision: str
    parameters: int = 0
    clips_per_second: float = 0.0
    gflops_per_second: float | None = None
    share_of_peak: float | None = None
    times_plain: float | None = None
    host_ms: float | None = None
    peak_mib: float | None = None
    floor_mib: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class Size:
    """Recipe, batch and precision of a measurement."""

    recipe: str
    batch: int
    bf16: bool
    device: torch.device

    def config(self) -> bestrq2.BestRQ2Config:
        return bestrq2.BestRQ2Config(**bestrq2.recipe(self.recipe)["model"])


def make_model(name: str, size: Size) -> nn.Module | str:
    """The network of a step, or the reason why it is not available."""
    torch.manual_seed(0)
    if name in PEERS:
        model = make_peer(name, size.config())
        return model if isinstance(model, str) else model.to(size.device).train()
    model = bestrq2.BestRQ2ForPreTraining(size.config()).to(size.device).train()
    if name == "plain":
        try:
            return PlainModel(model).to(size.device).train()
        except ValueError as error:
            return str(error)
    if name.startswith("compiled"):
        compile_parts(model)
    return model


def make_step(model: nn.Module, size: Size, graph: bool = False) -> Callable[[], None]:
    """Forward, backward and optimiser of any of the networks; masks differ in every step."""
    config, batch, device = size.config(), size.batch, size.device
    if isinstance(model, bestrq2.BestRQ2ForPreTraining):
        rates = OptimizerConfig(**bestrq2.recipe(size.recipe).get("optimizer", {}))
        optimizer = make_optimizer(model, rates, "32-true")
    else:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), foreach=False)
    audio = 0.1 * torch.randn(batch, config.max_samples, device=device)
    columns, numbers = [config.columns(config.max_samples)] * batch, count()
    if graph:
        config.mask_ratio = (sum(config.mask_ratio) / 2,) * 2
        masks = (draw_hidden_mask(config, columns, 0, number, range(batch)) for number in numbers)
        return graphed_step(model, optimizer, audio, masks, size.bf16)

    def step() -> None:
        mask = draw_hidden_mask(config, columns, 0, next(numbers), range(batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=size.bf16):
            loss = loss_of(model, audio, mask)
        with record_function("backward"):
            loss.backward()
        with record_function("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def loss_of(model: nn.Module, audio: Tensor, hidden_mask: Tensor) -> Tensor:
    if isinstance(model, bestrq2.BestRQ2ForPreTraining):
        return model(audio, hidden_mask=hidden_mask, output_logits=False).loss
    return model(audio, hidden_mask) if isinstance(model, PlainModel) else model(audio)


@torch.no_grad()
def check_plain(size: Size) -> None:
    """Stop if the plain step does not have our loss on the same masks."""
    ours, plain = make_model("eager", size), make_model("plain", size)
    if isinstance(plain, str):
        return
    config = size.config()
    audio = 0.1 * torch.randn(2, config.max_samples, device=size.device)
    mask = draw_hidden_mask(config, [config.columns(config.max_samples)] * 2, 1, 0, range(2))
    losses = [loss_of(model.eval(), audio, mask).item() for model in (ours, plain)]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], f"{size.recipe}: losses {losses} of ours and plain differ"


def time_in_turns(
    steps: dict[str, Callable[[], None]], device: torch.device, seconds: float
) -> dict[str, tuple[float, float]]:
    """Median seconds of each step, until its call returns and until the device is done."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    while len(next(iter(times.values()), [()] * 5)) < 5 or (
        sum(done for each in times.values() for _, done in each) < seconds * len(steps)
    ):
        for name, step in steps.items():
            times[name].append(host_and_device(step, device))
    return {name: tuple(map(statistics.median, zip(*each, strict=True))) for name, each in times.items()}


@contextmanager
def named_parts(model: bestrq2.BestRQ2ForPreTraining) -> Iterator[None]:
    """Context manager under which the profiler attributes time to the parts of the network."""
    front = [model.bestrq2.log_mel, model.bestrq2.statistics, model.bestrq2.patch_embedding, model.quantizer]
    owners = {"front end": front, "encoder": [model.bestrq2.encoder]}
    if hasattr(model, "predictor"):
        owners["predictor"] = [model.predictor_input, model.predictor]
    handles, original = [], modeling_bestrq2.head_cross_entropy

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object) -> None:
            module.part = record_function(name)
            module.part.__enter__()

        return hook

    def end(module: nn.Module, *_: object) -> None:
        module.part.__exit__(None, None, None)

    def head(*arguments: object) -> object:
        with record_function("head and loss"):
            return original(*arguments)

    for name, modules in owners.items():
        for module in modules:
            handles += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end)]
    modeling_bestrq2.head_cross_entropy = head
    try:
        yield
    finally:
        modeling_bestrq2.head_cross_entropy = original
        for handle in handles:
            handle.remove()


def shares_of_parts(model: nn.Module, step: Callable[[], None]) -> dict[str, float]:
    """Share of a step's time on a CPU in each part; "other" is what no part covers (masks, gathers)."""
    with named_parts(model):
        step()  # compiled parts are compiled anew with their names
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                with record_function("whole step"):
                    step()
    times = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    shares = {name: times.get(name, 0.0) / max(1e-9, times["whole step"]) for name in PARTS}
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}


def longest_kernels(step: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Kernels of a step on a GPU: number, share of the time in which one runs, and the longest (name, ms, number)."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.self_device_time_total and event.count >= 3]
    found.sort(key=lambda event: -event.self_device_time_total)
    return {
        "number": sum(event.count for event in found) / 3,
        "busy": sum(event.self_device_time_total for event in found) / 3e6 / seconds,
        "longest": [[event.key[:100], event.self_device_time_total / 3000, event.count / 3] for event in found[:20]],
    }


def measured_peak(name: str, size: Size) -> float | None:
    """Peak of a step in MiB, measured on a CPU in a separate process; None if it does not fit."""
    if size.device.type == "cuda":
        try:
            return peak_of(lambda: make_step(make_model(name, size), size), size.device) / 2**20
        except torch.OutOfMemoryError:
            return None
    job = json.dumps([name, size.recipe, size.batch, size.bf16, str(size.device)])
    done = subprocess.run([sys.executable, __file__, "--peak-of", job], capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 2**20 if done.returncode == 0 else None


def floor_mib(size: Size) -> float:
    """State plus what autograd keeps of a batch, in MiB."""
    model = make_model("eager", size)
    one, two = (kept_bytes(model, batch, size.bf16, size.device) for batch in (1, 2))
    return (state_bytes(model) + one + (size.batch - 1) * (two - one)) / 2**20


def measure(size: Size, names: list[str], peak: float, seconds: float, memory: bool) -> list[Row]:
    """All steps of one size."""
    precision = "bf16" if size.bf16 else "fp32"
    rows = {name: Row(size.recipe, name, size.batch, precision) for name in names}
    if memory:  # first, as long as a GPU is empty
        for name, row in rows.items():
            if not name.endswith("graphs"):
                row.peak_mib = measured_peak(name, size)
    models = {name: make_model(name, size) for name in names}
    steps: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        if isinstance(model, str):
            rows[name].note = model
            continue
        try:
            step = make_step(model, size, name.endswith("graphs"))
            for _ in range(2):
                step()
            steps[name] = step
        except Exception as error:  # one that does not fit, or cannot be captured, leaves the others
            rows[name].note = f"fails: {str(error).strip().splitlines()[0][:150]}"
    times = time_in_turns(steps, size.device, seconds)
    for name, step in steps.items():
        model, row = models[name], rows[name]
        row.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row.host_ms = 1000 * times[name][0]
        row.clips_per_second = size.batch / times[name][1]
        if name not in PEERS:
            row.gflops_per_second = row.clips_per_second * cost(size.config()).training_gflops
            row.share_of_peak = row.gflops_per_second / peak
        row.times_plain = times["plain"][1] / times[name][1] if "plain" in times else None
        if size.device.type == "cuda":
            row.kernels = longest_kernels(step, times[name][1])
        elif isinstance(model, bestrq2.BestRQ2ForPreTraining):
            row.parts = shares_of_parts(model, step)
        if memory:
            row.floor_mib = floor_mib(size) if isinstance(model, bestrq2.BestRQ2ForPreTraining) else None
    return list(rows.values())


def line(row: Row) -> str:
    """A row of the table."""
    start = f"{row.recipe:<22} {row.step:<16} {row.batch:>5} {row.precision:>5}"
    if row.note:
        return f"{start}  {row.note}"
    number = lambda value, form: format("-" if value is None else format(value, form), ">8")  # noqa: E731
    memory = f"{number(row.peak_mib, '.0f')} {number(row.floor_mib, '.0f')}"
    speed = (
        f"{number(row.gflops_per_second, '.1f')} {number(row.share_of_peak, '.0%')} {number(row.times_plain, '.2f')}"
    )
    parts = " ".join(f"{row.parts[name]:.0%}" for name in (*PARTS, "other")) if row.parts else ""
    if row.kernels:
        parts = f"host {row.host_ms:.1f} ms, {row.kernels['number']:.0f} kernels, busy {row.kernels['busy']:.0%}"
    return f"{start} {row.parameters / 1e6:>7.1f} {row.clips_per_second:>8.2f} {speed} {memory}  {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["demo", "best-rq-2-tiny", "best-rq-2-small", "best-rq-2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--compiled", action="store_true", help="time the compiled step too")
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs of these steps too, on a GPU")
    parser.add_argument(
        "--peers", action="store_true", help="time other implementations at the Conformer recipes' sizes"
    )
    parser.add_argument("--memory", action="store_true", help="measure peaks too")
    parser.add_argument("--seconds", type=float, default=5.0, help="minimum time for each step of a size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        name, recipe, batch, bf16, device = json.loads(arguments.peak_of)
        size = Size(recipe, batch, bf16, torch.device(device))
        print(peak_of(lambda: make_step(make_model(name, size), size), size.device))
        return
    device = torch.device(arguments.device)
    machine = description(device)
    peaks = {
        name: matrix_product_peak(device, torch.bfloat16 if name == "bf16" else torch.float32)
        for name in arguments.precisions
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("matrix-product peak: " + ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in peaks.items()))
    print(
        f"{'recipe':<22} {'step':<16} {'batch':>5} {'prec':>5} {'M par':>7} {'clips/s':>8} {'GFLOP/s':>8} "
        f"{'of peak':>8} {'x plain':>8} {'MiB':>8} {'floor':>8}  {' | '.join((*PARTS, 'other'))}"
    )
    rows: list[Row] = []
    for recipe in arguments.recipes:
        check_plain(Size(recipe, 2, False, torch.device("cpu")))  # where no code differs by rounding
        names = ["eager", *(["compiled"] if arguments.compiled else [])]
        names += [f"{name} graphs" for name in names if arguments.graphs]
        names.append("plain")
        if arguments.peers and "conformer" in recipe:
            names += PEERS
        for batch in arguments.batches:
            for precision in arguments.precisions:
                size = Size(recipe, batch, precision == "bf16", device)
                new = measure(size, names, peaks[precision], arguments.seconds, arguments.memory)
                print("\n".join(map(line, new)), flush=True)
                rows += new
                content = {"machine": machine, "matrix_product_gflops": peaks, "rows": [asdict(row) for row in rows]}
                if arguments.json:
                    arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
