"""Reading weights and model folders without ever unpickling foreign objects."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as hub_logging

from bestrq2.errors import CheckpointError
from bestrq2.files import write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2PreTrainedModel
from bestrq2.model.modeling_bestrq2_classification import BestRQ2ForAudioClassification

# In a model folder: the step its weights were taken at.
EXPORTED = "training.json"

ModelClass = TypeVar("ModelClass", bound=BestRQ2PreTrainedModel)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a `.ckpt`/`.pt`/`.pth`/`.bin` file loaded with weights only.

    Raises:
        CheckpointError: if the file is missing, truncated, no such file at all, or holds pickled objects.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; name a .safetensors or .ckpt file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); copy or download it again"
            ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of pickles stumbles over foreign bytes in any way there is
        raise CheckpointError(
            f"{path}: not a file of plain tensors (it is damaged or holds pickled objects, which are never loaded); "
            "convert it to .safetensors where you trust it"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return dict(state)


def write_exported_step(folder: Path, step: int) -> None:
    """Note beside the weights in a model folder after how many steps of training they were taken."""
    write_text(folder / EXPORTED, json.dumps({"step": step}) + "\n")


def exported_step(run: Path) -> int | None:
    """The step of the weights in a run's model folder; None where it was not noted."""
    try:
        return int(json.loads((run / "model" / EXPORTED).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_model_folder(folder: str | Path, model_class: type[ModelClass]) -> ModelClass:
    """Load a folder in hub format (or a hub id) as the encoder, the whole pretraining model or a classifier.

    Raises:
        CheckpointError: if the folder is no BEST-RQ-2 model, weights are damaged, missing or of another shape, or they
            are a pickle.
    """
    _check_folder(folder)
    try:
        with quiet_hub():
            model, report = model_class.from_pretrained(
                str(folder), output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: the model cannot be loaded: {first}") from error
    problems = {kind: sorted(map(str, report.get(f"{kind}_keys") or [])) for kind in ("missing", "unexpected")}
    beyond = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    if model.base_model is not model and beyond <= set(problems["missing"]):
        remedy = "name a run folder or a folder exported with --with-predictor"
        if model_class is BestRQ2ForAudioClassification:
            remedy = "name a run of `bestrq2 finetune`"
        raise CheckpointError(f"{folder}: holds an encoder without the rest of a {model_class.__name__}; {remedy}")
    problems["misshaped"] = sorted(str(key[0]) for key in report.get("mismatched_keys") or [])
    raise_for_keys(str(folder), problems)
    return model.eval()


def raise_for_keys(source: str, problems: dict[str, list[str]]) -> None:
    """Raise `CheckpointError` that lists the tensors under each kind of problem; none, if there are none."""
    found = [f"{kind} {len(keys)}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{source}: the tensors do not fit the architecture ({'; '.join(found)})")


def _check_folder(folder: str | Path) -> None:
    path = Path(folder)
    if not path.is_dir():
        return  # a hub id
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no config.json in it; name a run folder or an exported model folder")
    try:
        config: Any = json.loads(config_file.read_text())
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_file}: expected a mapping of settings, found {type(config).__name__}")
        if config.get("model_type") != BestRQ2Config.model_type:
            raise CheckpointError(
                f"{config_file}: model_type is {config.get('model_type')!r}, expected {BestRQ2Config.model_type!r}"
            )
        BestRQ2Config(**{key: value for key, value in config.items() if key != "model_type"})
    except (json.JSONDecodeError, ValueError) as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    if not list(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.glob("*.bin"))
        extra = f"; {pickles[0]} is a pickle, which is never loaded: convert it where you trust it" if pickles else ""
        raise CheckpointError(f"{folder}: no .safetensors weights in it{extra}")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers: our own errors say what matters."""
    bars, level = hub_logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hub_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars:
            hub_logging.enable_progress_bar()
