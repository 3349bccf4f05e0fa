"""Provenance of a result: the model and its training run, software versions, command and date."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bestrq2 import soundworld
from bestrq2._version import __version__
from bestrq2.convert.shipped import shipped_training
from bestrq2.convert.weights import exported_step
from bestrq2.errors import CheckpointError, DataError
from bestrq2.inference.cost import cost
from bestrq2.inference.embedder import Embedder, weights_hash
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.run_records import initial_gflops, is_finetuned, newest_step, read_run_settings, teacher_gflops


def is_run_folder(model: str | os.PathLike[str]) -> bool:
    """Whether a model is given as the folder of a pretraining run."""
    return (Path(model) / "config.yaml").is_file() and not is_finetuned(Path(model))


def model_name(model: str | os.PathLike[str]) -> str:
    """Name of a model in tables: that of its folder, also for "." and "run/.."."""
    return os.path.basename(os.path.abspath(model))


def encoder_identity(embedder: Embedder) -> dict[str, str]:
    """What embeddings depend on, as texts: weights, architecture and the version of this package."""
    config = embedder.config.to_diff_dict()
    for name in ("transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    return {
        "weights_sha256": weights_hash(embedder.model),
        "architecture_sha256": hashlib.sha256(_canonical(config).encode()).hexdigest(),
        "bestrq2": __version__,
    }


def digest(identity: dict[str, str]) -> str:
    """Short name of an identity: 16 hexadecimal digits."""
    return hashlib.blake2b(_canonical(identity).encode(), digest_size=8).hexdigest()


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def software_provenance(command: Sequence[str] = ()) -> dict[str, str]:
    """Versions that scores depend on, the command and the time.

    Args:
        command: words of the command that makes the result.

    Returns:
        bestrq2, torch, synthesiser, soundworld, command and created (ISO, UTC).
    """
    return {
        "bestrq2": __version__,
        "torch": str(torch.__version__),
        "synthesiser": soundworld.synthesiser(),
        "soundworld": soundworld.VERSION,
        "command": " ".join(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def model_provenance(
    model: str | os.PathLike[str], config: BestRQ2Config, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Origin of a model, as plain JSON types.

    Args:
        model: source of the model, as given to a command.
        config: architecture of the model.
        command: words of the command that makes the result.

    Returns:
        model; recipe, data, seed, steps (planned) and batch_seconds of the run; step of the exported weights (of the
        newest row of metrics.csv in runs of older versions); finished, whether that is the last one; training_gflops up
        to that step (the last one where it is unknown), with those of a teacher and of the model that the run started
        from; encoder_parameters, objective, and `software_provenance`. Values that only runs and encoders
        of the package hold are None for other models, as is step where there are no metrics.

    Raises:
        CheckpointError: config.yaml or metrics.csv of a run folder cannot be read.
    """
    numbers = cost(config)
    known: dict[str, Any] = dict.fromkeys(("recipe", "data", "seed", "steps", "batch_seconds", "training_gflops"))
    known |= {"step": None, "finished": None}
    if training := training_provenance(model):
        before, teacher = (training.pop(name, 0.0) for name in ("initial_gflops", "teacher_gflops"))
        known |= training
        steps = known["steps"] if known["step"] is None else known["step"]
        clips = known["batch_seconds"] / config.max_seconds * steps
        known["training_gflops"] = before + clips * (numbers.training_gflops + teacher)
    return {
        "model": os.fspath(model),
        **known,
        "encoder_parameters": numbers.encoder_parameters,
        "objective": config.objective,
        **software_provenance(command),
    }


def training_provenance(model: str | os.PathLike[str]) -> dict[str, Any]:
    """`run_provenance` of a run folder or of an encoder of the package; empty for other models."""
    return run_provenance(Path(model)) if is_run_folder(model) else shipped_training(model)


def run_provenance(run: Path) -> dict[str, Any]:
    """Recipe, data, seed, planned steps and `batch_seconds` of a run, the step of its weights, and if it is finished.

    Also the operations (GFLOPs) per clip of its teacher, and of all training of the model that it started from.

    Raises:
        CheckpointError: config.yaml or metrics.csv cannot be read.
    """
    try:
        settings = read_run_settings(run / "config.yaml")
        known = {
            "recipe": _text(settings["recipe"]),
            "data": _text(settings["data"]),
            "seed": int(settings["seed"]),
            "steps": int(settings["trainer.max_steps"]),
            "batch_seconds": float(settings["loader.batch_seconds"]),
            "teacher_gflops": teacher_gflops(run),
            "initial_gflops": initial_gflops(run),
        }
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run / 'config.yaml'}: does not hold the settings of a run") from error
    # the weights are those of the last export; metrics may have been logged since
    step, metrics = exported_step(run), run / "metrics.csv"
    try:
        if step is None and metrics.is_file():
            step = newest_step(metrics)
    except DataError as error:
        raise CheckpointError(f"{metrics}: does not hold the metrics of a run") from error
    return {**known, "step": step, "finished": step == known["steps"]}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
