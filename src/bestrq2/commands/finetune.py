"""`bestrq2 finetune`: fine-tune an encoder as a classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bestrq2 import flags
from bestrq2.progress import starting

if TYPE_CHECKING:
    from bestrq2.evaluate.result import Result


def finetune(
    model: str | os.PathLike[str] | None = None,
    labelled: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    mode: Literal["linear", "partial", "full"] = "full",
    layers: int | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float | None = None,
    weight_decay: float = 0.05,
    warmup_fraction: float = 0.1,
    layer_decay: float = 1.0,
    balanced: bool = False,
    max_seconds: float | None = None,
    seed: int = 0,
    num_workers: int = 1,
    device: str | None = None,
    devices: int = 1,
    resume: bool = False,
) -> Result:
    """Fine-tune an encoder as a classifier of recordings; the best epoch on the validation split is kept and tested.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id; it
            and `labelled` may be left out to resume.
        labelled: folder with one subfolder per class (optionally inside `train`, `valid` and `test`), table with
            columns path and label (or labels, separated by ";", for several classes per recording), WebDataset tars
            with labels, or hub:NAME with a column label.
        output: run folder to write.
        mode: trained part: "linear" (the head), "partial" (also the last `layers` blocks) or "full".
        layers: number of trained blocks in mode "partial".
        epochs: passes over the training recordings.
        batch_size: clips per step, on average: clips share rows of `max_seconds`, and a step has whole rows.
        lr: peak learning rate; by default 1e-2 for "linear", else 0.2 over the width of the encoder (1e-3 for 192).
        weight_decay: weight decay of AdamW, for matrices.
        warmup_fraction: share of the steps with a rising learning rate; a cosine decay to nearly 0 follows.
        layer_decay: factor of the learning rate from each block to the one before it; 1 for equal rates.
        balanced: draw recordings of rare classes as often as those of frequent ones.
        max_seconds: longest random crop in training, and the window for classifying longer recordings (s); that of the
            model by default.
        seed: random seed of missing splits, head, order and crops.
        num_workers: processes that decode audio; 0 decodes in the main process.
        device: device to run on, such as "cpu" or "cuda:0"; by default CUDA with bfloat16 where available.
        devices: processes, one per device; torchrun and SLURM override it.
        resume: continue the run in `output` with its own settings where these are left at their defaults, or start it
            if there is none.

    Returns:
        Scores on the test split, over all classes and for each.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        KeyboardInterrupt: when stopped by Ctrl-C; the run can be resumed.
    """
    from bestrq2.train.settings import finetune_config

    config = finetune_config(
        {
            "model": model and os.fspath(model), "labelled": labelled and os.fspath(labelled), "output": output,
            "mode": mode, "layers": layers, "epochs": epochs, "batch_size": batch_size, "lr": lr,
            "weight_decay": weight_decay, "warmup_fraction": warmup_fraction,
            "layer_decay": layer_decay, "balanced": balanced, "max_seconds": max_seconds, "seed": seed,
            "num_workers": num_workers, "device": device, "devices": devices,
        },
        resume,
    )  # fmt: skip
    with starting("finetune") as progress:
        from bestrq2.train.finetuning import run_finetuning

        progress.show()
        return run_finetuning(config, resume=resume)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 finetune`."""
    values = flags.parse_command(finetune, argv, positional=("model", "labelled"), usual=("output",))
    result, output = finetune(**values), Path(values["output"])
    from bestrq2.evaluate.finetuned import format_finetune_result

    print(format_finetune_result(result, output))
    print(f"\nReport, with the wrong clips to hear: {output / 'report.html'}")
    print(f"Classify audio with: bestrq2 predict {output} FOLDER --output predictions.csv")
