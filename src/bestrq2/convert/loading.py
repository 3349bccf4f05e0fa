"""Loading models by name: encoder of the package, run or model folder, reference checkpoint, recipe or hub id."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from bestrq2.convert.reference import is_hub_export, load_reference, load_reference_encoder
from bestrq2.convert.reference_config import HUB_MODEL_TYPE
from bestrq2.convert.shipped import ENCODERS, shipped_folder
from bestrq2.convert.weights import (
    first_line,
    load_kept_checkpoint,
    load_model_folder,
    quiet_hub,
    refuse_beyond_memory,
)
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import (
    BestRQ2ForAudioClassification,
    BestRQ2ForPreTraining,
    BestRQ2Model,
    BestRQ2PreTrainedModel,
)
from bestrq2.recipe_book import is_recipe_file, recipe, recipes
from bestrq2.text import nearest

logger = logging.getLogger(__name__)

RANDOM_SEED = 0


def load_encoder(source: str | os.PathLike[str]) -> BestRQ2Model:
    """Load the encoder of `source`, as in `bestrq2.load`, on the CPU.

    Its `config.architectures` names the class of the whole model in `source`; it is None for a recipe.
    """
    return _load(source, BestRQ2Model).base_model


def load_pretraining(source: str | os.PathLike[str]) -> BestRQ2ForPreTraining:
    """Load the whole pretraining model of `source`, as in `bestrq2.load`, on the CPU.

    Raises:
        CheckpointError: as `bestrq2.load`, or if the source holds an encoder alone.
    """
    model = _load(source, BestRQ2ForPreTraining)
    assert isinstance(model, BestRQ2ForPreTraining)
    return model


def load_whole_or_encoder(source: str | os.PathLike[str]) -> BestRQ2ForPreTraining | BestRQ2Model:
    """Load the whole pretraining model of `source`, or its encoder where it holds no more, on the CPU."""
    encoder = load_encoder(source)
    whole = encoder.config.architectures == [BestRQ2ForPreTraining.__name__]
    return load_pretraining(source) if whole else encoder


def load_classification(source: str | os.PathLike[str]) -> BestRQ2ForAudioClassification:
    """Load the classifier in a run of `bestrq2 finetune` or a model folder, on the CPU.

    Raises:
        CheckpointError: as `bestrq2.load`, or if the source is not a classifier.
    """
    if source in ENCODERS:
        raise CheckpointError(f"{source}: is an encoder, which classifies nothing; name a run of `bestrq2 finetune`")
    model = _load(source, BestRQ2ForAudioClassification)
    if not isinstance(model, BestRQ2ForAudioClassification):
        raise CheckpointError(f"{source}: is not a classifier; name a run of `bestrq2 finetune`")
    return model


def _load(source: str | os.PathLike[str], model_class: type[BestRQ2PreTrainedModel]) -> BestRQ2PreTrainedModel:
    """The model of that class in `source`, or the whole model where a source always holds one."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ConfigError(f"a model is named by a path, a recipe or a hub id, got {source!r:.80}")
    path, name = Path(source), str(source)
    if (shipped := shipped_folder(source)) is not None:
        return load_model_folder(shipped, model_class)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        folder = path / "model" if (path / "model").is_dir() else path
        return _load_export(folder, model_class) if is_hub_export(folder) else load_model_folder(folder, model_class)
    if name in recipes() or is_recipe_file(name):
        config = _recipe_config(name)
        logger.info("%s is a recipe: its weights are random, nothing was trained", name)
        return random_encoder(config) if model_class is BestRQ2Model else _random_pretraining(config)
    if os.path.isfile(path) and path.parent.name == "checkpoints" and (path.parents[1] / "model").is_dir():
        return load_kept_checkpoint(path, model_class)
    if os.path.isfile(path):
        load_file = load_reference_encoder if model_class is BestRQ2Model else load_reference
        return load_file(path, configuration_beside(path))
    if name.count("/") == 1 and not name.startswith((".", "/")) and not path.parent.exists():
        export = _downloaded_export(name)
        return load_model_folder(name, model_class) if export is None else _load_export(export, model_class)
    raise CheckpointError(_no_such_model(name))


def _no_such_model(name: str) -> str:
    if hint := nearest(name, [*ENCODERS, *recipes()]):
        return f"{name}: there is no such encoder or recipe, and no such file or folder{hint}"
    if "/" in name or Path(name).suffix:
        return f"{name}: does not exist; name a run folder, an exported folder or a checkpoint"
    return (
        f"{name}: there is no such model; name an encoder of the package ({', '.join(ENCODERS)}), a run folder, an "
        "exported folder, a checkpoint, a hub id (USER/MODEL) or a recipe such as best-rq-2-tiny"
    )


def _load_export(folder: Path, model_class: type[BestRQ2PreTrainedModel]) -> BestRQ2Model:
    """The encoder of a hub export of the reference implementation, which never holds more."""
    if model_class is not BestRQ2Model:
        raise CheckpointError(f"{folder}: holds an encoder alone, as all exports of the reference do; no predictor")
    return load_reference_encoder(folder, folder / "config.json")


def configuration_beside(checkpoint: Path) -> Path:
    """Configuration file of a reference checkpoint: the JSON or YAML file of the same name.

    Raises:
        CheckpointError: if there is none.
    """
    beside = [checkpoint.with_suffix(suffix) for suffix in (".json", ".yaml", ".yml")]
    for candidate in beside:
        if candidate.is_file():
            return candidate
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.json").is_file() or (folder / "model" / "config.json").is_file():
            raise CheckpointError(f"{checkpoint}: is part of the model in {folder}; name that folder")
    raise CheckpointError(
        f"{checkpoint}: is not a model; the configuration of a reference checkpoint is expected beside it as "
        f"{beside[0].name} or {beside[1].name}, or given to bestrq2.load_reference(checkpoint, config)"
    )


def _downloaded_export(name: str) -> Path | None:
    """The downloaded folder of a hub id that is an export of the reference implementation; None for all else."""
    import huggingface_hub

    try:
        with quiet_hub():
            config, _ = BestRQ2Config.get_config_dict(name)
            if config.get("model_type") != HUB_MODEL_TYPE:
                return None
    except OSError as error:  # a second attempt would wait for the network again
        raise CheckpointError(
            f"{name}: is not a local folder, nor a hub id that can be read: {first_line(error)}"
        ) from error
    except ValueError:
        return None  # loading it as a model of ours reports what is wrong
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: the model cannot be downloaded: {first_line(error)}") from error


def _recipe_config(name: str) -> BestRQ2Config:
    """Architecture of a recipe or recipe file."""
    try:
        return BestRQ2Config(**recipe(name).get("model", {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"recipe {name}: model: {error}") from error


def random_encoder(config: BestRQ2Config, seed: int = RANDOM_SEED) -> BestRQ2Model:
    """An untrained encoder, the baseline of every probe; the global random state is not changed.

    Raises:
        ConfigError: its weights do not fit the memory of this machine.
    """
    refuse_beyond_memory(config, whole=False)
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(seed)
        return BestRQ2Model(config).eval()


def _random_pretraining(config: BestRQ2Config) -> BestRQ2ForPreTraining:
    """An untrained model around the same encoder."""
    refuse_beyond_memory(config, whole=True)
    encoder = random_encoder(config)
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(RANDOM_SEED)
        model = BestRQ2ForPreTraining(config).eval()
    model.base_model.load_state_dict(encoder.state_dict())
    return model
