"""An encoder from anything that holds one: run folder, model folder, reference checkpoint, recipe or hub id."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bestrq2.convert.reference import load_reference
from bestrq2.convert.weights import load_model_folder, quiet_hub
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2Model, BestRQ2PreTrainedModel
from bestrq2.recipe_book import is_recipe_file, recipe, recipes

RANDOM_SEED = 0


def load_encoder(source: str | os.PathLike[str]) -> BestRQ2Model:
    """The encoder of `source`, as in `bestrq2.load`, on the CPU."""
    return _load(source, BestRQ2Model).base_model


def load_pretraining(source: str | os.PathLike[str]) -> BestRQ2ForPreTraining:
    """The whole pretraining model of `source`, a source as in `bestrq2.load`, on the CPU.

    Raises:
        CheckpointError: as `bestrq2.load`, or if the source holds an encoder alone.
    """
    model = _load(source, BestRQ2ForPreTraining)
    assert isinstance(model, BestRQ2ForPreTraining)
    return model


def _load(source: str | os.PathLike[str], model_class: type[BestRQ2PreTrainedModel]) -> BestRQ2PreTrainedModel:
    """The model of that class in `source`; the whole of it where a source always holds one."""
    path = Path(source)
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        return load_model_folder(folder, model_class)
    name = str(source)
    if name in recipes() or is_recipe_file(name):
        config = _recipe_config(name)
        return random_encoder(config) if model_class is BestRQ2Model else _random_pretraining(config)
    if path.is_file():
        beside = [path.with_suffix(suffix) for suffix in (".json", ".yaml", ".yml")]
        settings = next((candidate for candidate in beside if candidate.is_file()), None)
        if settings is None:
            raise CheckpointError(
                f"{path}: its configuration is expected beside it as {beside[0].name} or {beside[1].name}; to give "
                "another one use bestrq2.load_reference(checkpoint, config)"
            )
        return load_reference(path, settings)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return load_model_folder(name, model_class)
    raise CheckpointError(
        f"{name}: no such run folder, model folder, checkpoint file or recipe; recipes are {', '.join(recipes())}"
    )


def _recipe_config(name: str) -> BestRQ2Config:
    """The architecture of a recipe or recipe file."""
    try:
        return BestRQ2Config(**recipe(name).get("model", {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"recipe {name}: model: {error}") from error


def random_encoder(config: BestRQ2Config, seed: int = RANDOM_SEED) -> BestRQ2Model:
    """An untrained encoder, the baseline of every probe; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(seed)
        return BestRQ2Model(config).eval()


def _random_pretraining(config: BestRQ2Config) -> BestRQ2ForPreTraining:
    """An untrained model around the same encoder."""
    encoder = random_encoder(config)
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(RANDOM_SEED)
        model = BestRQ2ForPreTraining(config).eval()
    model.base_model.load_state_dict(encoder.state_dict())
    return model
