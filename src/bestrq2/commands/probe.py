"""`bestrq2 probe`: linear probe and k-NN on labelled audio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bestrq2 import flags
from bestrq2.errors import ConfigError
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
    layers: int | list[int] | str | None = None,
    frequency: Literal["mean", "concat"] | None = None,
    pooling: str | None = None,
    readouts: bool = False,
) -> Result:
    """Score a model by linear probes and k-NN on labelled audio, beside baselines, with 95 % intervals.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
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
        layers: layer or layers that frames are made of, as in `bestrq2 embed`; the model's own readout by default, like
            the next two. A run folder keeps results of its own readout only.
        frequency: "mean" of the rows of patches along frequency, or "concat".
        pooling: what a clip holds of its frames, such as "mean" or "mean+std".
        readouts: compare up to 16 readouts by linear probes on validation folds of the training clips (of a frozen
            benchmark, those of the tasks to choose on), and score the best alone on the test clips. Prints the table
            and the flags that reproduce the best; baselines are left out.

    Returns:
        Result with one score per features, task and method; it prints as its table, and a notebook shows it as HTML.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    with starting("probe") as progress:
        from bestrq2.evaluate.probe import run_probe, run_readouts

        progress.show()
        options: dict[str, Any] = {"layers": layers, "frequency": frequency, "pooling": pooling}
        if readouts:
            for name, value in options.items():
                if value is not None:
                    raise ConfigError(f"{name} is {value}, but readouts are compared; leave one of them out")
            return run_readouts(model, labelled, output=output, seed=seed, device=device)
        result = run_probe(model, labelled, baselines=baselines, output=output, seed=seed, device=device, **options)
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
