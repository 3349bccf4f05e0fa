"""Cost of a row in a complete pretraining run, part by part, and the share of time the device waits for data.

    python benchmarks/end_to_end.py --output benchmarks/results/end_to_end_cpu.json

Clips of 12 s (with `--lengths varied`: 2 to 12 s) are packed by `bestrq2 prepare` into shards of 16-bit PCM, and
`bestrq2.pretrain` trains on rows packed with them with the recipe's own settings. The first steps are not counted. The
functions of the package are wrapped from here, and every instant of the training thread is attributed to exactly one
row. On a GPU a further column has the device's own time, including its idle time during the row. With `--workers` above
0, rows that run in the loader's processes are counted in processor time and overlap with the device's work; the part
that does not overlap is in the row "wait for the loader".

"device waits" is the share of the time from the end of a step to the arrival of the next batch, in which a step could
have run if its batch had been ready. The run reports the same share in its progress; both are in the JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from data_loading import RATE, waveform
from lightning_fabric import Fabric
from machine import description
from stopwatch import Stopwatch

import bestrq2
from bestrq2.commands.prepare import prepare
from bestrq2.data import batch, loader
from bestrq2.data.shards.shard_source import ShardSource
from bestrq2.inference.cost import cost
from bestrq2.model import modeling_bestrq2
from bestrq2.train import clock, guard, loop, objective, watch
from bestrq2.train.loop import Run
from bestrq2.train.objective import PretrainingTask
from bestrq2.train.optimizer import Muon

# Loading: in the training thread without workers, else in theirs.
CLIP, READ, MASKS, BATCH, HAND_OVER, PIN = (
    "clip: place, look-up", "read: from the page cache into the batch", "masks", "batch of rows",
    "hand over to the training process", "pin",
)  # fmt: skip
WAIT, TO_DEVICE = "wait for the loader", "copy to the device, float32"
LENGTHS, ORDER = "lengths and padding", "order of the masks"
SPECTROGRAM, PATCHES, QUANTIZER = "spectrogram", "normalise and cut into patches", "quantizer"
FORWARD, BACKWARD, CLIPPING, OPTIMISER = "forward", "backward", "gradient norm, skipped steps", "optimiser"
DIAGNOSTICS, LOGGING, KEEPING, REST = "diagnostics", "logging", "checkpoints and rejected files", "loop and rest"

LOADING = (CLIP, READ, MASKS, BATCH, HAND_OVER, PIN)
STEP = (SPECTROGRAM, PATCHES, QUANTIZER, FORWARD, BACKWARD, OPTIMISER)
ROWS = (
    *LOADING, WAIT, TO_DEVICE, LENGTHS, ORDER, SPECTROGRAM, PATCHES, QUANTIZER, FORWARD, BACKWARD, OPTIMISER, CLIPPING,
    DIAGNOSTICS, LOGGING, KEEPING, REST,
)  # fmt: skip

PLACES: list[tuple[Any, str, str]] = [
    (ShardSource, "segment", CLIP),
    (batch, "put_reflected", READ),
    (objective.MaskDrawer, "__call__", MASKS),
    (batch.RowWriter, "batch", BATCH),
    (batch.AudioBatch, "pin_memory", PIN),
    (torch.utils.data.dataloader._BaseDataLoaderIter, "__next__", WAIT),
    (PretrainingTask, "inputs", TO_DEVICE),
    (PretrainingTask, "terms", LENGTHS),
    (modeling_bestrq2.BestRQ2Model, "patches", LENGTHS),
    (modeling_bestrq2, "order_by_mask", ORDER),
    (modeling_bestrq2, "split_by_mask", ORDER),
    (modeling_bestrq2.LogMel, "packed", SPECTROGRAM),
    (modeling_bestrq2.BestRQ2Model, "spectrogram_patches", PATCHES),
    (modeling_bestrq2.RandomProjectionQuantizer, "forward", QUANTIZER),
    (PretrainingTask, "forward", FORWARD),
    (Fabric, "backward", BACKWARD),
    (guard.Guard, "judge", CLIPPING),
    (guard.Guard, "too_many", CLIPPING),
    (torch.optim.AdamW, "step", OPTIMISER),
    (Muon, "step", OPTIMISER),
    (torch.optim.AdamW, "zero_grad", OPTIMISER),
    (loop, "added", DIAGNOSTICS),
    (objective, "summarise", LOGGING),
    (Run, "publish", LOGGING),
    (clock.RunClock, "record", LOGGING),
    (watch.Watch, "look", LOGGING),
    (Run, "list_rejected", KEEPING),
    (Run, "save", KEEPING),
]


def write_shards(root: Path, clips: int, varied: bool) -> Path:
    """Prepared shards of clips of 12 s, or of 2 to 12 s."""
    folder, shards = root / "clips", root / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(clips):
        samples = waveform(number)
        if varied:
            samples = samples[: int(rng.integers(2 * RATE, len(samples) + 1))]
        soundfile.write(folder / f"{number:06d}.wav", samples, RATE)
    with _quiet():
        prepare(str(folder), shards, num_workers=os.cpu_count())
    return shards


class TimeIsUp(Exception):
    """Ends a run that has been measured for long enough."""


class Measurement:
    """Starts the stopwatch after the first steps of a run and stops it, and the run, when the time is up.

    Attributes:
        watch: the stopwatch.
        steps: counted.
    """

    def __init__(self, warm_up: int, seconds: float, batch: int) -> None:
        self.watch = Stopwatch(ROWS, REST)
        self.warm_up, self.seconds, self.batch = warm_up, seconds, batch
        self.steps = self.clips = 0
        self.clock: Any = None
        self.clock_before = (0.0, 0.0)
        self.clock_says = 0.0

    def step_ended(self, run: Run, done: int) -> None:
        """After every step, when all is done but the next one's batch.

        Raises:
            TimeIsUp: the run has been measured for long enough.
        """
        every = run.settings.log_every_n_steps
        if done == self.warm_up:
            if run.fabric.device.type == "cuda":
                torch.cuda.synchronize()
            self.clock_before = (run.clock.elapsed, run.clock.waited)
            self.watch.start(run.fabric.device)
        elif self.watch.running:
            self.steps += 1
            self.clips += self.batch
            spent = run.clock.elapsed - self.clock_before[0]
            # Whole rounds of logging, so that its share is what it is in a long run; unless a round takes too long.
            if spent >= self.seconds and (self.steps % every == 0 or spent >= 2 * self.seconds):
                self.watch.stop()
                elapsed, waited = run.clock.elapsed, run.clock.waited
                self.clock_says = (waited - self.clock_before[1]) / (elapsed - self.clock_before[0])
                raise TimeIsUp

    @contextlib.contextmanager
    def of_this_run(self) -> Iterator[None]:
        """Measure the run in this block."""
        with self.watch.watching(PLACES), _batches_of_workers(self.watch):
            plain = Run.show

            def ended(run: Run, step: int) -> None:
                with self.watch.part(LOGGING):
                    plain(run, step)
                self.step_ended(run, step)

            Run.show = ended  # type: ignore[method-assign]
            try:
                with contextlib.suppress(TimeIsUp):
                    yield
            finally:
                Run.show = plain  # type: ignore[method-assign]

    def result(self) -> dict[str, Any]:
        """Milliseconds per row of clips (of 10 s, mostly) by part of the work, and shares."""
        tables = {
            "host_ms_per_clip": self.watch.host_seconds(),
            "device_ms_per_clip": self.watch.device_seconds(),
            "workers_ms_per_clip": self.watch.elsewhere_seconds(),
        }
        waited = tables["device_ms_per_clip"] or tables["host_ms_per_clip"]
        busy = sum(waited.get(name, 0.0) for name in STEP)
        scaled = {
            table: {name: 1000 * times[name] / self.clips for name in ROWS if times.get(name)}
            for table, times in tables.items()
        }
        return {
            "steps": self.steps,
            "clips": self.clips,
            "seconds": self.watch.seconds,
            "clips_per_second": self.clips / self.watch.seconds,
            "device_waits": sum(waited.get(name, 0.0) for name in (*LOADING, WAIT)) / self.watch.seconds,
            "clock_of_the_run_says": self.clock_says,
            "in_the_step_itself": busy / self.watch.seconds,
            **scaled,
        }


@contextlib.contextmanager
def _batches_of_workers(watch: Stopwatch) -> Iterator[None]:
    """Book what a worker spends beside its parts, pickling and copying into shared memory, as handing over."""
    plain, main_process = loader.as_it_is, os.getpid()
    before: dict[int, tuple[float, float]] = {}

    def last(made: Any) -> Any:
        if os.getpid() != main_process:
            spent, known = time.process_time(), watch.booked_here()
            if os.getpid() in before:
                last_spent, last_known = before[os.getpid()]
                watch.add_elsewhere(HAND_OVER, spent - last_spent - (known - last_known))
            before[os.getpid()] = spent, known
        return plain(made)

    loader.as_it_is = last
    try:
        yield
    finally:
        loader.as_it_is = plain


def measure(recipe: str, shards: Path, arguments: argparse.Namespace, workers: int) -> dict[str, Any]:
    """One run."""
    settings = bestrq2.recipe(recipe)
    longest = settings["model"].get("max_seconds", 10.0)
    batch = arguments.batch or round(settings["loader"]["batch_seconds"] / longest)
    if not arguments.batch and arguments.accelerator == "cpu":
        batch = min(batch, 16)
    every = 1_000_000
    trainer = {
        "max_steps": every, "val_every_n_steps": 0, "checkpoint_every_n_steps": every,
        "accelerator": arguments.accelerator, "precision": arguments.precision, "compile": arguments.compile,
    }  # fmt: skip
    if arguments.log_every:
        trainer["log_every_n_steps"] = arguments.log_every
    measurement = Measurement(arguments.warm_up, arguments.seconds, batch)
    with tempfile.TemporaryDirectory() as folder, measurement.of_this_run(), _quiet():
        bestrq2.pretrain(
            recipe=recipe,
            data=shards,
            output=Path(folder) / "run",
            loader={
                "batch_seconds": batch * longest,
                "num_workers": workers,
                "validation_clips": 0,
                "statistics_clips": 16,
            },
            trainer=trainer,
        )
    gflops = cost(bestrq2.BestRQ2Config(**settings["model"])).training_gflops
    result = measurement.result()
    run = {
        "recipe": recipe, "batch": batch, "workers": workers, "lengths": arguments.lengths,
        "precision": arguments.precision, "compile": arguments.compile,
    }  # fmt: skip
    return {**run, "training_gflops_per_clip": gflops, **result}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


def print_table(run: dict[str, Any]) -> None:
    """For people."""
    print(
        f"\n{run['recipe']}, {run['steps']} steps of {run['batch']} clips ({run['lengths']} lengths), "
        f"{run['workers']} workers: {run['clips_per_second']:.1f} clips/s, device waits {run['device_waits']:.2%} "
        f"(the run's clock: {run['clock_of_the_run_says']:.2%}), in the step itself {run['in_the_step_itself']:.1%}"
    )
    host, device, workers = (run[f"{name}_ms_per_clip"] for name in ("host", "device", "workers"))
    total = sum(host.values())
    print(f"{'part':<42} {'ms/clip':>9} {'share':>7} {'GPU ms/clip':>12} {'workers ms/clip':>16}")
    for name in ROWS:
        if host.get(name) or device.get(name) or workers.get(name):
            cells = [f"{times[name]:.3f}" if times.get(name) else "" for times in (device, workers)]
            own = host.get(name, 0.0)
            print(f"{name:<42} {own:>9.3f} {own / total:>7.1%} {cells[0]:>12} {cells[1]:>16}")
    print(f"{'sum':<42} {total:>9.3f}", flush=True)


def markdown(runs: list[dict[str, Any]]) -> str:
    """The tables of docs/speed.md."""
    lines = [
        "| recipe | workers | clips/s | device waits | the run's clock | in the step itself |",
        "|---|" + "--:|" * 5,
    ]
    for run in runs:
        shares = " | ".join(
            f"{run[name]:.2%}" for name in ("device_waits", "clock_of_the_run_says", "in_the_step_itself")
        )
        lines.append(f"| `{run['recipe']}` | {run['workers']} | {run['clips_per_second']:.1f} | {shares} |")
    heads = " | ".join(f"{run['recipe'].removeprefix('best-rq-')}, {run['workers']}" for run in runs)
    lines += ["", f"| ms a clip | {heads} |", "|---|" + "--:|" * len(runs)]
    for name in ROWS:
        cells = []
        for run in runs:
            own = run["device_ms_per_clip"].get(name) or run["host_ms_per_clip"].get(name, 0.0)
            elsewhere = run["workers_ms_per_clip"].get(name)
            cells.append(f"({elsewhere:.3f})" if elsewhere else f"{own:.3f}" if own >= 0.0005 else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--recipes", nargs="+", default=["demo", "best-rq-2-tiny", "best-rq-2"])
    parser.add_argument("--workers", type=int, nargs="+", default=[4] if on_gpu else [0, 1])
    parser.add_argument("--batch", type=int, help="clips a step; default the recipe's, on a CPU at most 16")
    parser.add_argument("--lengths", choices=["equal", "varied"], default="equal")
    parser.add_argument("--clips", type=int, default=100, help="in the shards")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured of each run, at least")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--log-every", type=int, help="steps; default the recipe's")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="gpu" if on_gpu else "cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", "--json", type=Path, help="JSON file")
    parser.add_argument("--markdown", type=Path, help="print this JSON file as tables; measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())["runs"]))
        return
    machine = description(torch.device("cuda" if arguments.accelerator == "gpu" else "cpu"))
    runs: list[dict[str, Any]] = []
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), arguments.clips, arguments.lengths == "varied")
        for recipe in arguments.recipes:
            for workers in arguments.workers:
                runs.append(measure(recipe, shards, arguments, workers))
                print_table(runs[-1])
                if arguments.output:
                    content = {"machine": machine, "cpus": os.cpu_count(), "command": sys.argv, "runs": runs}
                    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
