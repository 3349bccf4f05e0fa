"""`bestrq2 xares`: score a model on X-ARES by the benchmark's own harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bestrq2 import flags
from bestrq2.errors import ConfigError

if TYPE_CHECKING:
    from bestrq2.evaluate.result import Result


def xares(
    model: str | os.PathLike[str],
    data: Path | None = None,
    tasks: str | list[str] | None = None,
    jobs: int = 1,
    phases: int | None = None,
    clip_phases: int = 1,
    layers: int | list[int] | str | None = None,
    frequency: Literal["mean", "concat"] | None = None,
    pooling: str | None = None,
    extraction: Literal["overlap", "chunks"] = "overlap",
    output: Path | None = None,
    device: str | None = None,
    cache: Path | None = None,
    keep_embeddings: bool = False,
) -> Result:
    """Score a model on X-ARES by the benchmark's own harness: its splits, its linear probe and its k-NN.

    Each task runs in a process of its own. A task that fails is listed with the reason, and the others continue.
    Finished scores are cached by model, options and versions: rerun the same command to score only the missing tasks. A
    run folder gets the result as xares.json and xares.csv.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        data: folder with one folder of tars per task, such as DATA/esc50/*.tar or the output of `bestrq2 soundworld
            DATA --format xares`; nothing is downloaded then. Without it the harness downloads missing tasks from
            Zenodo into the cache.
        tasks: task names such as "esc50,gtzan", or paths of task files; by default all with public data, or all in
            DATA.
        jobs: tasks that run in parallel, assigned to the GPUs in turn.
        phases: shifted copies of the patch grid for frame-level tasks, for frames every 1/phases of the hop; by default
            2, or 1 where a patch is 1 frame wide.
        clip_phases: the same for clip-level tasks.
        layers: layer or layers that frames are made of, as in `bestrq2 embed`; the model's own readout by default, like
            the next two.
        frequency: "mean" of the rows of patches along frequency, or "concat".
        pooling: what a clip holds of its frames in clip-level tasks, such as "mean" or "mean+std".
        extraction: "overlap" for windows that overlap by half, without padding, or "chunks" for 10 s chunks without
            overlap, with the padding of batches counted as sound, as in the X-ARES fork of the author of BEST-RQ-2.
        output: JSON file for the result; a CSV table is written beside it.
        device: "cpu", "cuda", or one GPU such as "cuda:1"; all GPUs by default where available.
        cache: folder of downloads and cached scores; $BESTRQ2_CACHE or ~/.cache/bestrq2 by default.
        keep_embeddings: keep the embeddings of every clip on disk after a task is scored.

    Returns:
        Scores, reasons of failures, and their provenance.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.evaluate.xares.run import run_xares

    return run_xares(
        model, data=data, tasks=tasks, jobs=jobs, phases=phases, clip_phases=clip_phases, layers=layers,
        frequency=frequency, pooling=pooling, extraction=extraction, output=output, device=device, cache=cache,
        keep_embeddings=keep_embeddings,
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 xares`, or list its tasks with `--list`."""
    switches = {"list": "list the tasks and where their data are, and exit"}
    values = flags.parse_command(xares, argv, positional=("model",), optional=("model",), switches=switches)
    if values.pop("list"):
        from bestrq2.evaluate.xares.run import list_tasks

        print(list_tasks(values["data"], values["cache"]))
        return
    if values["model"] is None:
        raise ConfigError("MODEL is missing; name a model to score, or give --list")
    result = xares(**values)
    from bestrq2.evaluate.result import check_complete
    from bestrq2.report.page import write_xares_pages

    print(result)
    for page in write_xares_pages(values["model"], values["output"]):
        print(f"report: {page}")
    check_complete(result)
