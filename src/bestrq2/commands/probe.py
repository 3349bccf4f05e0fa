"""`bestrq2 probe`: linear probe and k-NN on labelled audio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestrq2 import flags
from bestrq2.progress import starting

if TYPE_CHECKING:
    from bestrq2.evaluate.result import Result


def probe(
    model: str | os.PathLike[str],
    labelled: str | os.PathLike[str],
    baselines: bool = True,
    output: Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Result:
    """Score a model by linear probes and k-NN on labelled audio, beside baselines, with 95 % intervals.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        labelled: folder with one subfolder per class (optionally inside `train` and `test`), table with columns path
            and label, WebDataset tars with labels, hub:NAME with a column label, folder of several such tasks,
            "soundworld"; or a frozen benchmark, whose result is also written into a run folder as NAME.json:
            "soundworld-2", or "realworld-1", whose recordings `bestrq2 realworld` fetches (its folder may be named
            instead).
        baselines: also probe log-mel statistics and a randomly initialised encoder of the same architecture.
        output: JSON file for the result; a run folder keeps it in probes/ anyway, for its report and
            `bestrq2 compare`.
        seed: random seed of splits and probes; the frozen benchmark has its own.
        device: device to run on, such as "cpu" or "cuda:0"; CUDA by default where available.

    Returns:
        Result with one score per features, task and method; it prints as its table, and a notebook shows it as HTML.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    with starting("probe") as progress:
        from bestrq2.evaluate.probe import run_probe

        progress.show()
        result = run_probe(model, labelled, baselines=baselines, output=output, seed=seed, device=device)
        run = Path(model)
        if (run / "report.html").is_file():
            from bestrq2.files import disk_errors
            from bestrq2.report.page import refresh_scores

            with disk_errors(run / "report.html"):
                refresh_scores(run)
        return result


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 probe`."""
    print(probe(**flags.parse_command(probe, argv, positional=("model", "labelled"))))
