"""`bestrq2 pretrain`: pretrain an encoder on unlabelled audio."""

from __future__ import annotations

import logging as log
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestrq2.errors import BestRQ2Error
from bestrq2.files import disk_errors
from bestrq2.progress import starting
from bestrq2.text import counted

if TYPE_CHECKING:
    from bestrq2.data.sources import Source
    from bestrq2.train.settings import PretrainConfig

logger = log.getLogger(__name__)

_LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_NTASKS")


def pretrain(
    *,
    data: str | os.PathLike[str] | Source | None = None,
    output: str | os.PathLike[str],
    recipe: str | None = None,
    init: str | os.PathLike[str] | None = None,
    teacher: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    resume: bool = False,
    model: dict[str, Any] | None = None,
    loader: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    probe: dict[str, Any] | None = None,
    watch: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
) -> Path:
    """Pretrain an encoder on unlabelled audio.

    Settings come from a recipe, and the groups `model` to `logging` change single ones, as the flags
    `--trainer.max_steps` and so on do. `bestrq2 pretrain --help` lists all of them with units and defaults.

    Examples:
        >>> pretrain(data="recordings/", output="run", recipe="best-rq-2-tiny", trainer={"max_steps": 2000})

    Args:
        data: folder of audio or of tars, file, list (.txt, .csv, .jsonl), pattern ("shards/*.tar"), mixture (.yaml),
            HDF5 (.h5), Hub dataset ("hub:NAME"), URLs of tars, "soundworld" (synthetic), or a `Source`; may be left
            out to resume.
        output: run folder to write.
        recipe: recipe that the settings start from: best-rq-2, best-rq-2-plus, best-rq-2.1, best-rq-vit or
            best-rq-conformer, or one of these with a size, such as "best-rq-2-tiny" (`bestrq2.recipes()` lists all), or
            a YAML file; by default that of the run in `init`, else "best-rq-2".
        init: model whose weights and architecture a new run starts from, as in `bestrq2.load`; what it lacks is
            initialised from the seed.
        teacher: trained encoder of the same patches, as in `bestrq2.load`, whose clustered states are the targets of
            half of the codebooks; None for random codebooks alone.
        seed: random seed of weights, data order, crops and masks; 0 by default.
        resume: continue the run in `output` with its own data and settings, or start it if there is none. A larger
            `max_steps` extends the run; other settings that would make it another run are refused.
        model: architecture and objective that differ from the recipe, fields of `BestRQ2Config`: hidden_size,
            num_hidden_layers, mask_ratio, max_seconds (longest clip, s), ...
        loader: batches: batch_seconds (audio per step, s), num_workers, validation_clips, ...
        optimizer: algorithm ("adamw", "muon"), lr, weight_decay, warmup_fraction, ...
        trainer: length, devices and files: max_steps, accelerator ("cpu", "gpu"), devices, precision ("bf16-mixed"),
            ema, checkpoint_every_n_steps, ...
        probe: linear probe during training: data (labelled), every_n_steps, ...
        watch: when a run stops or warns: max_skipped_in_a_row, stall_steps, ...
        logging: Weights & Biases: wandb (project), run_name.

    Returns:
        The run folder.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        KeyboardInterrupt: when stopped by Ctrl-C; the run can be resumed.
    """
    from bestrq2.train.settings import resolve

    if data is None or isinstance(data, str | os.PathLike):
        source, spec = None, data and os.fspath(data)
    else:
        source, spec = data, data.name
    settings: dict[str, Any] = {
        "recipe": recipe, "data": spec, "output": os.fspath(output), "init": init and os.fspath(init),
        "teacher": teacher and os.fspath(teacher), "seed": seed, "resume": resume, "model": model, "loader": loader,
        "optimizer": optimizer, "trainer": trainer, "probe": probe, "watch": watch, "logging": logging,
    }  # fmt: skip
    return _pretrain(resolve(settings), resume, source)


def _pretrain(config: PretrainConfig, resume: bool, source: Source | None = None) -> Path:
    """Open the audio, which takes a second, before what trains is imported, which takes many."""
    with starting("pretrain") as progress, disk_errors(config.output):
        if source is None and not resume:
            from bestrq2.data.open_source import open_source

            source = open_source(config.data)
            if progress.shown:
                logger.info("%s: %s", source.name, counted(len(source), "recording"))
        from bestrq2.train.pretraining import run_pretraining

        progress.show()
        return run_pretraining(config, resume=resume, source=source)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 pretrain`."""
    try:
        from bestrq2.train.settings import parse_arguments

        folder = _pretrain(*parse_arguments(argv))
    except BestRQ2Error as error:
        # Wrong input is the same for all processes; one of them prints the error.
        if type(error) is not BestRQ2Error and not _first_process():
            sys.exit(2)
        raise
    if _first_process():
        report = folder / "report.html"
        print(f"{folder}: done.{f' Report: {report}' if report.exists() else ''}")
        print(f"Embed audio with: bestrq2 embed {folder} FOLDER --output embeddings.parquet")


def _first_process() -> bool:
    if not any(name in os.environ for name in _LAUNCHED):
        return True  # the only one
    from bestrq2.train.processes import first_process

    return first_process()
