"""Initial weights of a run that continues from another model: what fits, what is new, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq2.convert.loading import load_encoder, load_whole_or_encoder
from bestrq2.convert.shipped import ENCODERS
from bestrq2.errors import ConfigError
from bestrq2.evaluate.provenance import model_provenance
from bestrq2.inference.embedder import weights_hash
from bestrq2.model.fields import FIELD_TYPES, ModelFields
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2Model
from bestrq2.recipe_book import is_recipe_file, recipes

# Fields that change neither the tensors of a model nor what these mean.
_FREE = ("max_seconds", "drop_path_rate", "conformer_dropout", "initializer_range", "mask_ratio", "mask_noise_std")
# Fields of what only pretraining has: predictor, head, mask token and quantizer.
_PRETRAINING = (
    *("objective", "predictor_hidden_size", "predictor_num_layers", "predictor_num_attention_heads"),
    *("predictor_intermediate_size", "codebook_size", "codebook_dim"),
    *("num_codebooks", "quantizer_seed", "quantizer_normalization", "mask_fill"),
)
_PARTS = {"predictor": "predictor", "mask_token": "mask token", "head": "head"}


def initial_fields(source: str) -> dict[str, Any]:
    """Architecture of a model as settings of a run that starts from it: field → value.

    Raises:
        ConfigError: a recipe, which has no trained weights.
        CheckpointError: as `bestrq2.load`.
    """
    refuse_recipe("--init", source)
    config = load_encoder(source).config
    return {name: getattr(config, name) for name in FIELD_TYPES}


def refuse_recipe(flag: str, source: str) -> None:
    """Refuse a recipe where a trained model is needed.

    Raises:
        ConfigError: naming the flag.
    """
    if not Path(source).is_dir() and (source in recipes() or is_recipe_file(source)):
        raise ConfigError(f"{flag} {source}: a recipe has no trained weights; give it as --recipe")


@dataclass(frozen=True)
class Initial:
    """Weights from which a run starts.

    Attributes:
        source: model as named by the user.
        model: the whole pretraining model, or the encoder where the source holds no more.
    """

    source: str
    model: BestRQ2ForPreTraining | BestRQ2Model

    @property
    def whole(self) -> bool:
        """Whether predictor, head and quantizer are there too."""
        return isinstance(self.model, BestRQ2ForPreTraining)

    def fill(self, model: BestRQ2ForPreTraining) -> str:
        """Copy the weights into the untrained model of a run; return what was copied and what is new, in words."""
        target = model if self.whole else model.base_model
        target.load_state_dict(self.model.state_dict())
        if self.whole:
            return f"starts from {self.source}: encoder, predictor, head and quantizer"
        new = [part for name, part in _PARTS.items() if hasattr(model, name)]
        return (
            f"starts from the encoder of {self.source}; its {', '.join(new[:-1])} and {new[-1]} are initialised from "
            f"the seed, its quantizer from model.quantizer_seed ({model.config.quantizer_seed})"
        )


def origin(source: str, encoder: BestRQ2Model) -> dict[str, Any]:
    """Name and hub id of a model, and SHA-256 of its encoder's tensors.

    Also recipe, data, seed, step and compute of its training (GFLOPs), where known.
    """
    known = model_provenance(source, encoder.config)
    facts = ("recipe", "data", "seed", "step", "training_gflops")
    run = {name: known[name] for name in facts if known[name] is not None}
    # What was loaded, but is neither of the package nor a path here, came from the hub.
    is_here = source in ENCODERS or Path(source).exists()
    hub = {} if is_here else {"base_model": source}
    return {"model": source, **hub, "sha256": weights_hash(encoder), **run}


def load_fitting(source: str, fields: ModelFields, keep_statistics: bool) -> Initial:
    """Load the weights of `source` for a run of an architecture.

    Args:
        source: model as in `bestrq2.load`.
        fields: architecture of the run.
        keep_statistics: whether the run keeps the statistics of the model.

    Raises:
        ConfigError: the architecture differs in fields that the weights depend on; all are listed.
        CheckpointError: as `bestrq2.load`.
    """
    initial = Initial(source, load_whole_or_encoder(source))
    config = initial.model.config
    free = _FREE if initial.whole else [*_FREE, *_PRETRAINING]
    pairs = {name: (_plain(config, name), _plain(fields, name)) for name in FIELD_TYPES if name not in free}
    differing = [
        f"model.{name} is {old!r} there, {new!r} in the settings" for name, (old, new) in pairs.items() if old != new
    ]
    if differing:
        remedy = "leave these settings out"
        if initial.whole and all(name in _PRETRAINING for name, (old, new) in pairs.items() if old != new):
            remedy += ", or start from its encoder alone: bestrq2 export"
        raise ConfigError(f"--init {source}: does not fit the settings: {'; '.join(differing)}; {remedy}")
    if keep_statistics and fields.uses_dataset_statistics and not config.uses_dataset_statistics:
        raise ConfigError(
            f"--init {source}: has no statistics to keep; set loader.statistics_clips to the number of clips from "
            "which to estimate them"
        )
    return initial


def _plain(fields: ModelFields, name: str) -> Any:
    value = getattr(fields, name)
    return list(value) if isinstance(value, tuple) else value
