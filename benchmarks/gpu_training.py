"""Training for a limited time: its data, its number of steps, and weights in 16 bits to take home.

`on_a_gpu.py` runs these actions in turn; PART is a folder of recordings_pack.py.

    python benchmarks/gpu_training.py unpack PART           shards of recordings
    python benchmarks/gpu_training.py soundworld 12000      generated clips, by all processors but six
    python benchmarks/gpu_training.py precisions            loss curves of equal runs in float32 and bfloat16
    python benchmarks/gpu_training.py train                 a run as long as --seconds-left allows, and its encoder

`train` measures the speed in a short run, chooses `max_steps` so that the schedule ends in time, and compiles the model
if end_to_end.py found that to be faster. Where training is slower than it was measured, it stops early and the encoder
is that of the last step.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from recordings_pack import unpack
from ship_encoder import rounded

import bestrq2
from bestrq2.child_processes import available_cpus
from bestrq2.convert.loading import load_encoder
from bestrq2.errors import StoppedBySignal
from bestrq2.run_records import read_table
from bestrq2.soundworld import unlabelled

RECORDED_SHARE = 0.75
PIECE_BYTES = 15_000_000
# For the encoder of a run, after training (s), and as a share of the time for steps.
EXPORT_SECONDS, MARGIN = 15.0, 0.06
RECORDS = ("config.yaml", "metrics.csv", "timing.csv", "heard.csv", "environment.json", "warnings.txt")


def data_file(work: Path) -> str:
    """Name of the data: a mixture of the recordings and SoundWorld, as far as they are there."""
    sources = []
    if any((work / "real").glob("*.tar")):
        sources.append({"data": str((work / "real").absolute()), "weight": RECORDED_SHARE})
    generated = work / "figures" / "soundworld.json"
    if generated.is_file():
        clips = json.loads(generated.read_text())["clips"]
        sources.append({"data": f"soundworld:{clips}", "weight": 1 - RECORDED_SHARE})
    if len(sources) < 2:
        return sources[0]["data"] if sources else "soundworld:40"
    (work / "data.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return str(work / "data.yaml")


def pretrain(options: argparse.Namespace, output: Path, steps: int, **trainer: Any) -> Path:
    """A run without report in a new folder, on as many workers as there are processors."""
    shutil.rmtree(output, ignore_errors=True)
    recipe = "demo" if options.rehearse else options.recipe
    loader: dict[str, Any] = {"num_workers": min(12, available_cpus() - 1)}
    if options.rehearse:
        loader |= {"batch_seconds": 20.0, "statistics_clips": 16, "validation_clips": 4}
    settings = {"max_steps": steps, "val_every_n_steps": 0, "report": False, **trainer}
    return bestrq2.pretrain(data=data_file(options.work), output=output, recipe=recipe, loader=loader, trainer=settings)


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Clips of SoundWorld in the cache."""
    clips, began = int(options.argument), time.monotonic()
    unlabelled(clips, workers=max(1, available_cpus() - 6), progress=False)
    return {"clips": clips, "hours": clips / 360, "seconds": time.monotonic() - began}


def unpack_part(options: argparse.Namespace) -> dict[str, Any]:
    """Shards of a part of the recordings."""
    return {"hours": unpack(Path(options.argument), options.work / "real", available_cpus()) / 3600}


def precisions(options: argparse.Namespace) -> dict[str, Any]:
    """Loss curves of the same run in both precisions."""
    steps, every = (4, 2) if options.rehearse else (400, 20)
    curves = {}
    for precision in ("32-true", "bf16-mixed"):
        run = pretrain(options, options.work / f"run-{precision}", steps, precision=precision, log_every_n_steps=every)
        curves[precision] = read_table(run / "metrics.csv")["train/loss"][1].tolist()
    differences = [abs(one - other) / one for one, other in zip(*curves.values(), strict=True)]
    return {"steps": steps, "every": every, "loss": curves, "largest_relative_difference": max(differences)}


def faster_compiled(work: Path, recipe: str) -> bool:
    """Whether end_to_end.py found training of the recipe to be faster when compiled."""
    speeds = {}
    for name in ("eager", "compiled"):
        file = work / "figures" / f"{name}.json"
        for run in json.loads(file.read_text())["runs"] if file.is_file() else ():
            if run["recipe"] == recipe:
                speeds[name] = run["clips_per_second"]
    return len(speeds) == 2 and speeds["compiled"] > speeds["eager"]


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is nearly over, and write the encoder."""
    end = time.monotonic() + options.seconds_left - EXPORT_SECONDS
    trainer = {"compile": faster_compiled(options.work, options.recipe)}
    steps, every = (6, 1) if options.rehearse else (150, 10)
    began = time.monotonic()
    trial = pretrain(options, options.work / "trial", steps, log_every_n_steps=every, **trainer)
    done, seconds = read_table(trial / "timing.csv")["seconds"]
    middle = len(done) // 2
    pace = (seconds[-1] - seconds[middle]) / (done[-1] - done[middle])
    overhead = time.monotonic() - began - steps * pace  # opening the data, statistics, compiling, saving
    steps = max(2, int((1 - MARGIN) * (end - time.monotonic() - overhead) / pace))
    if options.rehearse:
        steps = min(steps, 20)
    print(f"{1 / pace:.2f} steps per second after {overhead:.0f} s: {steps} steps", flush=True)

    watchdog = threading.Timer(max(1.0, end - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    watchdog.daemon = True
    watchdog.start()
    run = options.work / "run"
    every = max(1, steps // 8)
    try:
        pretrain(options, run, steps, checkpoint_every_n_steps=every, **trainer | {"val_every_n_steps": every})
    except StoppedBySignal as stopped:
        print(stopped, flush=True)
    watchdog.cancel()
    names, values = zip(*((name, curve[1][-1]) for name, curve in read_table(run / "metrics.csv").items()), strict=True)
    return {
        "planned_steps": steps,
        "steps": int(read_table(run / "timing.csv")["seconds"][0][-1]),
        "steps_per_second": 1 / pace,
        "compile": trainer["compile"],
        "last": dict(zip(names, values, strict=True)),
        "pieces": write_pieces(run, options.work),
    }


def write_pieces(run: Path, folder: Path) -> list[str]:
    """Write the encoder in 16 bits and the records of its run as pieces of a tar, trained.tar.0 and so on."""
    for old in folder.glob("trained.tar.*"):
        old.unlink()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar, tempfile.TemporaryDirectory() as exported:
        model = rounded(load_encoder(run), torch.float16)
        model.save_pretrained(exported)
        config = Path(exported) / "config.json"
        # The type in which transformers loads the weights, whatever type they are stored in.
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2))
        tar.add(exported, "trained")
        for name in RECORDS:
            if (run / name).is_file():
                tar.add(run / name, f"trained/run/{name}")
    content, names = buffer.getvalue(), []
    for number, start in enumerate(range(0, len(content), PIECE_BYTES)):
        names.append(f"trained.tar.{number}")
        (folder / names[-1]).write_bytes(content[start : start + PIECE_BYTES])
    return names


ACTIONS = {"unpack": unpack_part, "soundworld": generate, "precisions": precisions, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("argument", nargs="?", help="PART, or number of clips")
    parser.add_argument("--recipe", default="best-rq-3-small")
    parser.add_argument("--work", type=Path, default=Path("build/gpu-work"), help="folder of data and runs")
    parser.add_argument("--seconds-left", type=float, default=300.0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--rehearse", action="store_true", help="the recipe demo and a few steps")
    options = parser.parse_args()
    figures = json.dumps(ACTIONS[options.action](options), indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(figures + "\n")
    print(figures)


if __name__ == "__main__":
    main()
