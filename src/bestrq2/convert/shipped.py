"""Encoders that come with the package: their names, folders and training. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bestrq2.errors import CheckpointError, ConfigError

ENCODERS = ("bestrq2-tiny",)
"""Names of the encoders of the package; the first one is the default of `bestrq2.load`."""

TRAINING = "training.json"
"""File beside the weights with recipe, data, seed, steps and batch_seconds of their run."""

_FOLDER = Path(__file__).parents[1] / "encoders"


def shipped_folder(model: str | os.PathLike[str]) -> Path | None:
    """Model folder of an encoder of the package; None for any other name or path.

    Raises:
        ConfigError: a folder of that name is here, so that the name could mean either.
        CheckpointError: the files are missing in this installation.
    """
    if model not in ENCODERS:  # a Path, which drops the dot of ./NAME, is always a folder
        return None
    name = str(model)
    if os.path.isdir(name):
        raise ConfigError(
            f"{name}: names an encoder of the package and a folder here; write ./{name} for the folder, or rename it "
            "to use the encoder"
        )
    if not (_FOLDER / name / "model.safetensors").is_file():
        raise CheckpointError(f"{name}: the files of this encoder are missing in {_FOLDER}; install bestrq2 again")
    return _FOLDER / name


def shipped_training(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Recipe, data, seed, steps and batch_seconds of the run that made an encoder of the package; else empty."""
    path = _FOLDER / model / TRAINING
    return json.loads(path.read_text(encoding="utf-8")) if model in ENCODERS and path.is_file() else {}
