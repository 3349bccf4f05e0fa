"""Checkpoints of the reference research module, and the encoders exported from it, into this package's models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bestrq2.convert.reference_config import (
    HUB_MODEL_TYPE,
    ReferenceConfig,
    check_repeated_fields,
    read_config,
    split_config,
    translate,
)
from bestrq2.convert.reference_layout import (
    ANCHOR,
    WEIGHTS,
    fixed_tensors,
    join_gates,
    reference_key,
    reference_shape,
    rotary_frequencies,
    transformers,
)
from bestrq2.convert.weights import quiet_hub, raise_for_keys, read_state_dict, refuse_oversized
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2Model

Model = TypeVar("Model", BestRQ2Model, BestRQ2ForPreTraining)


def load_reference(
    checkpoint: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any]
) -> BestRQ2ForPreTraining:
    """Load a checkpoint of the reference implementation, two-step or one-stage.

    Args:
        checkpoint: `.safetensors` or `.ckpt` file (loaded with weights only), or its state dict.
        config: the reference's own configuration, a mapping or a JSON or YAML file: `net` with `spectrogram`,
            `patch_embed`, `masking`, `encoder`, `predictor`; `vocab_size` and `codebook_dim`. What is absent is the
            paper's. docs/reference-checkpoints.md lists all fields.

    Returns:
        The whole pretraining model in evaluation mode; `.base_model` is the encoder.

    Raises:
        CheckpointError: if tensors are missing, extra or misshaped (all are listed), or contradict the configuration.
        ConfigError: if the configuration cannot be read, has a field of unknown meaning, or asks for what this package
            does not do.
    """
    source, state = _read_state(checkpoint)
    loaded = read_config(config)
    with _named(config):
        parts = split_config(loaded)
        if not parts.whole:
            raise ConfigError(
                f"model_type {HUB_MODEL_TYPE!r} is that of an encoder alone, without predictor and quantizer; load it "
                "with bestrq2.load"
            )
        return _make(BestRQ2ForPreTraining, parts, _without_prefix(state, source), source)


def load_reference_encoder(
    checkpoint: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any]
) -> BestRQ2Model:
    """The encoder of a reference checkpoint or of a hub export (`model_type: audio_embeddings`).

    The keys of a hub export are known by their ends; what stands before them may be anything, and what does not fit is
    refused. Window, filters, position tables and rotary frequencies may be missing there: the configuration gives them.

    Args:
        checkpoint: as in `load_reference`, or a folder of `.safetensors` files.
        config: as in `load_reference`, or the export's config.json.

    Raises:
        CheckpointError, ConfigError: as `load_reference`.
    """
    loaded = read_config(config)
    if loaded.get("model_type") is None:
        return load_reference(checkpoint, config).base_model
    source, state = _read_state(checkpoint)
    with _named(config):
        return _make(BestRQ2Model, split_config(loaded), _by_suffix(state, source), source)


def is_hub_export(folder: Path) -> bool:
    """Whether a folder's config.json is that of an encoder exported from the reference implementation."""
    try:
        return read_config(folder / "config.json").get("model_type") == HUB_MODEL_TYPE
    except ConfigError:
        return False


def load_hub_export(folder: Path) -> BestRQ2Model:
    """The encoder in a folder with `config.json` and `.safetensors` weights; errors as `load_reference_encoder`."""
    return load_reference_encoder(folder, folder / "config.json")


@contextmanager
def _named(config: str | Path | Mapping[str, Any]) -> Iterator[None]:
    """Put the configuration's file, where it is one, before what is wrong with it."""
    try:
        yield
    except ConfigError as error:
        if isinstance(config, Mapping):
            raise
        raise ConfigError(f"{config}: {error}") from error


def _read_state(checkpoint: str | Path | Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """How messages name a checkpoint, and its tensors."""
    if isinstance(checkpoint, Mapping):
        return "the state dict", dict(checkpoint)
    path = Path(checkpoint)
    if not path.is_dir():
        return str(path), read_state_dict(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no .safetensors weights in it")
    return str(path), {key: value for file in files for key, value in read_state_dict(file).items()}


def _without_prefix(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop what a training framework put in front of the keys, such as `net.`."""
    anchors = [key for key in state if key.endswith(ANCHOR)]
    if not anchors:
        raise CheckpointError(
            f"{source}: no tensor '{ANCHOR}' in it, so it is no checkpoint of the reference; it holds "
            f"{', '.join(sorted(key[:80] for key in state)[:5])}…"
        )
    prefix = anchors[0].removesuffix(ANCHOR)
    return {key.removeprefix(prefix): value for key, value in state.items()}


# The ends of an exported encoder's keys, and what to put before them.
_ENDS = (
    (re.compile(r"(?:.*?\.)??(blocks\.\d+\..+)"), "encoder."),
    (re.compile(r"(?:.*\.)?(norm\.(?:weight|bias)|pos_embed|rope\.\w+)"), "encoder."),
    (re.compile(r"(?:.*\.)?patch_embed\.(proj\.(?:weight|bias))"), "patch_embed.patch_embed."),
    (re.compile(r"(?:.*\.)?(spectrogram\.window)"), "spectrogram.mel_spec."),
    (re.compile(r"(?:.*\.)?(mel_scale\.fb)"), "spectrogram.mel_spec."),
)
# What belongs to no encoder, whatever its name ends in.
_OTHERS = re.compile(r"predictor|teacher|target|ema|quantizer|decoder", re.IGNORECASE)


def _by_suffix(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """An exported encoder's tensors by the reference's names; keys that fit none stay as they are."""
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        name = key
        for pattern, before in _ENDS:
            found = pattern.fullmatch(key)
            if found and not _OTHERS.search(key.removesuffix(found[1])):
                name = before + found[1]
                break
        if name in named:
            raise CheckpointError(
                f"{source}: '{origin[name][:200]}' and '{key[:200]}' both end like '{name[:200]}', so it is not clear "
                "which one is the encoder's"
            )
        named[name], origin[name] = value, key
    if ANCHOR not in named:
        raise CheckpointError(
            f"{source}: no tensor ending in 'patch_embed.proj.weight' in it, so it is no encoder of the reference; it "
            f"holds {', '.join(sorted(key[:80] for key in state)[:5])}…"
        )
    return named


def _make(model_class: type[Model], parts: ReferenceConfig, state: dict[str, Tensor], source: str) -> Model:
    """A model of the architecture that configuration and tensors describe, filled with the tensors."""
    encoder = parts.parts["encoder"]
    gate = encoder.word("swiglu_gate")
    if gate not in (None, "first", "last"):
        raise encoder.refuse("swiglu_gate", "expected first or last")
    try:
        state = join_gates(state, gate, encoder.field("swiglu_gate"))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    config = translate(parts, state)
    whole = model_class is BestRQ2ForPreTraining
    refuse_oversized(config, sum(tensor.numel() for tensor in state.values()), source, whole)
    _check_fixed_tensors(config, state, source, whole)
    check_repeated_fields(parts, config)
    with quiet_hub():
        model = model_class(config)
    model.config.architectures = [model_class.__name__]  # as a model folder says what it holds
    _take_over(model, parts, state, source)
    return model.eval()


def _check_fixed_tensors(config: BestRQ2Config, state: Mapping[str, Tensor], source: str, whole: bool) -> None:
    """Refuse a checkpoint whose window, filters or positions are not what its configuration gives here."""
    for key, fixed in fixed_tensors(config, whole).items():
        if key in state:
            same = tuple(state[key].shape) == fixed.shape and _alike(state[key], fixed.value())
            _refuse_unless(same, key, state[key], fixed.shape, source)
    for part, shape in transformers(config, whole).items():
        expected = list(rotary_frequencies(config, shape).values())
        for key, value in state.items():
            if expected and key.startswith(f"{part}.") and ".rope.inv_freq" in key:
                same = value.shape == expected[0].shape and _alike(value, expected[0])
                _refuse_unless(same, key, value, tuple(expected[0].shape), source)


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether a stored buffer is the expected one but for rounding."""
    if found.dtype not in WEIGHTS:
        return False
    tolerance = max(1e-4, torch.finfo(found.dtype).eps)
    return torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance)


def _refuse_unless(same: bool, key: str, found: Tensor, shape: tuple[int, ...], source: str) -> None:
    if not same:
        raise CheckpointError(
            f"{source}: '{key}' {list(found.shape)} is not what the configuration gives {list(shape)}; "
            "check net.spectrogram, net.patch_embed and net.encoder"
        )


def _take_over(
    model: BestRQ2Model | BestRQ2ForPreTraining, parts: ReferenceConfig, state: dict[str, Tensor], source: str
) -> None:
    """Fill a model with the reference's tensors; all that do not fit are listed."""
    config, before = model.config, "" if parts.whole else "bestrq2."
    ours = {key: value for key, value in model.state_dict().items() if "statistics." not in key}
    names = {key: reference_key(before + key, config) for key in ours}
    shapes = {names[key]: reference_shape(before + key, value.shape, config) for key, value in ours.items()}
    fixed = fixed_tensors(config, parts.whole).keys()
    rotary = config.position_embedding.startswith("rope")
    optional = {key for key in state if key in fixed or (rotary and ".rope.inv_freq" in key)}
    raise_for_keys(
        source,
        {
            "missing": sorted((shapes.keys() | (fixed if parts.whole else set())) - state.keys()),
            "unexpected": sorted(key[:200] for key in state.keys() - shapes.keys() - optional),
            "misshaped": [
                f"{key} {list(state[key].shape)}, not {shape}"
                for key, shape in sorted(shapes.items())
                if key in state and list(state[key].shape) != shape
            ],
            "not of floating point": sorted(
                f"{key} ({state[key].dtype})" for key in shapes.keys() & state.keys() if state[key].dtype not in WEIGHTS
            ),
        },
    )
    model.load_state_dict({key: state[names[key]].reshape(ours[key].shape) for key in ours}, strict=False)
