"""Train and benchmark many arms over several seeds: the experiments of docs/results.md.

    python benchmarks/experiments.py examples/two-steps-or-one/*-*.yaml --lr 5e-4 1e-3 --output runs
    python benchmarks/experiments.py best-rq-2-tiny best-rq-vit-tiny --seeds 0 1 2 --gflops 40000 --output runs

An arm is a recipe or a recipe file, with `--lr` one at each of the learning rates. Every run is a single-threaded
process, `--jobs` at a time; finished runs are kept and unfinished ones resumed. With `--gflops` every arm gets as many
steps as cost that much training compute (bestrq2.inference.cost), otherwise `--steps` or its own number. The
checkpoints of each quarter of a run are kept, for learning curves.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bestrq2.recipe_book import is_recipe_file, merge, recipe


def settings_of(arm: str, gflops: float | None, steps: int | None, lr: float | None) -> dict[str, Any]:
    """Groups of settings of one arm, with its number of steps."""
    from bestrq2.inference.cost import cost
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config

    settings = recipe(arm)
    settings.pop("description", None)
    if gflops is not None:
        model = BestRQ2Config(**settings["model"])
        rows = max(1, round(settings["loader"]["batch_seconds"] / model.max_seconds))
        steps = max(1, round(gflops / (cost(model).training_gflops * rows)))
    if steps is not None:
        settings = merge(settings, {"trainer": {"max_steps": steps}})
    if lr is not None:
        settings = merge(settings, {"optimizer": {"lr": lr}})
    quarter = -(-settings["trainer"]["max_steps"] // 4)  # rounded up: the last one is the end
    return merge(settings, {"trainer": {"checkpoint_every_n_steps": quarter, "keep_every_n_steps": quarter}})


def name_of(arm: str, lr: float | None, seed: int) -> str:
    """Name of the folder of a run."""
    return f"{Path(arm).stem if is_recipe_file(arm) else arm}{f'-lr{lr:g}' if lr else ''}-seed{seed}"


def train(arm: str, seed: int, folder: Path, data: str, settings: dict[str, Any], probe: str) -> tuple[str, float]:
    """One run from start to benchmark; returns its folder's name and the seconds it took."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    import bestrq2
    from bestrq2.convert.weights import exported_step

    began = time.monotonic()
    if exported_step(folder) != settings["trainer"]["max_steps"]:
        with (folder.parent / f".{folder.name}.log").open("a") as log, contextlib.redirect_stderr(log):
            bestrq2.pretrain(recipe=arm, data=data, output=folder, seed=seed, resume=True, **settings)
        (folder / "soundworld-2.json").unlink(missing_ok=True)
    if probe != "no" and not (folder / "soundworld-2.json").is_file():
        bestrq2.probe(folder, "soundworld-2", baselines=probe == "all" and seed == 0)
    return folder.name, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", default="soundworld:4000")
    parser.add_argument("--lr", nargs="+", type=float, default=[None])
    parser.add_argument("--gflops", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--probe", choices=["all", "model", "no"], default="all",
        help="the model and, for seed 0, untrained weights and log-mel statistics; the model alone; nothing",
    )  # fmt: skip
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    # The first arms of all seeds come first, so that an experiment cut short has whole rows.
    jobs = [
        (arm, seed, options.output / name_of(arm, lr, seed), options.data,
         settings_of(arm, options.gflops, options.steps, lr), options.probe)
        for arm in options.arms for lr in options.lr for seed in options.seeds
    ]  # fmt: skip
    if len({folder for _, _, folder, *_ in jobs}) < len(jobs):
        parser.error("two arms have one name: their runs would lie in the same folders")
    failed = 0
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, *job): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            try:
                name, seconds = future.result()
                print(f"{number}/{len(jobs)} {name}: {seconds:.0f} s", flush=True)
            except Exception as error:
                failed += 1
                print(f"{number}/{len(jobs)} {futures[future][2].name} FAILED: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
