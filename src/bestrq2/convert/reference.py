"""Checkpoints of the reference implementation: import and export of its state dicts.

Covers the research module (two-step and one-stage) and encoders exported from it to the hub. Configurations are
translated in `reference_config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from bestrq2.convert.reference_config import (
    HUB_MODEL_TYPE,
    ReferenceConfig,
    check_repeated_fields,
    part_shapes,
    read_config,
    split_config,
    translate,
    write_config,
)
from bestrq2.convert.weights import quiet_hub, raise_for_keys, read_state_dict, refuse_not_finite, refuse_oversized
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.files import check_writable, disk_errors, whole_file, write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.log_mel import mel_filters
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2Model
from bestrq2.model.transformer import TransformerShape

Model = TypeVar("Model", BestRQ2Model, BestRQ2ForPreTraining)

# The weight of the patch embedding: every reference module has it, so it shows the prefix of all keys.
ANCHOR = "patch_embed.patch_embed.proj.weight"
# Types that float32 represents exactly; tensors of other types are refused.
_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
_WINDOW, _FILTERS = "spectrogram.mel_spec.spectrogram.window", "spectrogram.mel_spec.mel_scale.fb"


def load_reference(
    checkpoint: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any]
) -> BestRQ2ForPreTraining:
    """Load a checkpoint of the reference implementation, two-step or one-stage.

    Args:
        checkpoint: `.safetensors` or `.ckpt` file (loaded with weights only), or its state dict.
        config: configuration of the reference, a mapping or a JSON or YAML file: `net` with `spectrogram`,
            `patch_embed`, `masking`, `encoder`, `predictor`; `vocab_size` and `codebook_dim`. Missing fields have the
            values of the paper. docs/reference-checkpoints.md lists all fields.

    Returns:
        The whole pretraining model in evaluation mode; `.base_model` is the encoder.

    Raises:
        CheckpointError: if tensors are missing, extra or misshaped (all are listed), or contradict the configuration.
        ConfigError: if the configuration cannot be read, has an unknown field, or asks for something unsupported.
    """
    source, state = _read_state(checkpoint)
    loaded = read_config(config)
    with _named(config):
        parts = split_config(loaded)
        if not parts.whole:
            raise ConfigError(
                f"model_type {HUB_MODEL_TYPE!r} is an encoder alone, without predictor and quantizer; load it with "
                "bestrq2.load"
            )
        return _make(BestRQ2ForPreTraining, parts, _without_prefix(state, source), source)


def load_reference_encoder(
    checkpoint: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any]
) -> BestRQ2Model:
    """Load the encoder of a reference checkpoint or of a hub export (`model_type: audio_embeddings`).

    The keys of a hub export are recognised by their ends, whatever their prefix. Window, filters, position tables and
    rotary frequencies may be missing there; they follow from the configuration.

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
    """Whether a folder's config.json belongs to an encoder exported from the reference implementation."""
    try:
        return read_config(folder / "config.json").get("model_type") == HUB_MODEL_TYPE
    except ConfigError:
        return False


def write_reference(model: BestRQ2ForPreTraining | BestRQ2Model, output: Path) -> None:
    """Write a model as a checkpoint of the reference implementation, with its configuration beside it as `.json`.

    `load_reference` reads the same model from it, bit for bit. Buffers that follow from the configuration (window, mel
    filters, position tables, rotary frequencies) are computed as the reference does, in float32; where another
    processor rounds one of them differently, its last bit follows this machine.

    Args:
        model: a whole pretraining model, written as the state dict of the research module, or an encoder, written as a
            hub export (`model_type: audio_embeddings`).
        output: a `.safetensors` file.

    Raises:
        ConfigError: if the reference cannot express the model (the field is named), or `output` cannot be written.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: a reference checkpoint is written as .safetensors; name such a file")
    check_writable(output)
    content = write_config(model.config, isinstance(model, BestRQ2ForPreTraining))
    with disk_errors(output):
        write_text(output.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
        with whole_file(output) as temporary:
            save_file(reference_state(model), temporary, metadata={"format": "pt"})


def reference_state(model: BestRQ2ForPreTraining | BestRQ2Model) -> dict[str, Tensor]:
    """State dict of the reference module with the same weights, including its fixed buffers."""
    config, whole = model.config, isinstance(model, BestRQ2ForPreTraining)
    prefix = "" if whole else "bestrq2."
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if "statistics." not in key:
            shape = reference_shape(prefix + key, value.shape, config)
            state[reference_key(prefix + key, config)] = value.reshape(shape)
    if config.activation == "swiglu":
        # Gate and value get names of their own, the one spelling without a question of order.
        for key in [key for key in state if ".mlp.fc1." in key]:
            gate, value = state.pop(key).chunk(2)
            state[key.replace(".fc1.", ".fc1_g.")], state[key.replace(".fc1.", ".fc1_x.")] = gate, value
    state |= {key: fixed.value() for key, fixed in fixed_tensors(config, whole).items()}
    for part, sizes in part_shapes(config, whole).items():
        places = [f"{part}.rope", *(f"{part}.blocks.{block}.attn.rope" for block in range(sizes.layers))]
        for name, frequencies in rotary_frequencies(config, sizes).items():
            state |= {f"{place}.{name}": frequencies for place in places}
    # Tensors that share memory cannot be saved.
    return {key: value.detach().to("cpu").clone().contiguous() for key, value in sorted(state.items())}


# --- Names, shapes and fixed tensors


_RENAMED = (
    ("bestrq2.encoder.", "encoder."),
    ("bestrq2.patch_embedding.", "patch_embed.patch_embed.proj."),
    ("predictor_input.", "predictor_input_proj."),
    ("quantizer.projection", "quantizer.P"),
    ("quantizer.codebook", "quantizer.CB"),
)


def reference_key(key: str, config: BestRQ2Config) -> str:
    """Name in the reference of a tensor of `BestRQ2ForPreTraining`."""
    head = "rq_proj." if config.objective == "two_step" else "output_proj."
    for ours, theirs in (*_RENAMED, ("head.", head)):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def reference_shape(key: str, shape: torch.Size, config: BestRQ2Config) -> list[int]:
    """Shape in the reference of a tensor of ours; the values and their order are the same."""
    if key == "bestrq2.patch_embedding.weight":
        return [shape[0], 1, *config.patch_size]  # a convolution over whole patches is a linear map
    return list(shape[1:] if key.startswith("quantizer.") else shape)


@dataclass(frozen=True)
class FixedTensor:
    """A buffer that follows from the configuration; computed on demand, as its size may be nonsense."""

    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def fixed_tensors(config: BestRQ2Config, whole: bool) -> dict[str, FixedTensor]:
    """Window, mel filters and sine-cosine tables, float32, by the reference's names."""
    bands = (config.num_mel_bands, config.mel_min_hz, config.mel_max_hz, config.sampling_rate)
    fixed = {
        _WINDOW: FixedTensor((config.win_length,), lambda: torch.hann_window(config.win_length)),
        _FILTERS: FixedTensor(
            (config.n_fft // 2 + 1, config.num_mel_bands),
            lambda: mel_filters(config.n_fft, *bands, torch.device("cpu")),
        ),
    }
    if config.position_embedding == "sincos":
        rows, columns = config.patch_rows, config.columns(config.max_samples)
        for part, shape in part_shapes(config, whole).items():
            fixed[f"{part}.pos_embed"] = FixedTensor(
                (1, rows * columns, shape.width),
                lambda width=shape.width: _sine_cosine(rows, columns, width),  # type: ignore[misc]
            )
    return fixed


def _sine_cosine(rows: int, columns: int, width: int) -> Tensor:
    """`sine_cosine_positions` of the model, but in float32 throughout, for the last bits that the reference stores."""
    quarter = width // 4
    frequencies = 1.0 / 10_000.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    row = torch.arange(rows, dtype=torch.float32)[:, None, None] * frequencies
    column = torch.arange(columns, dtype=torch.float32)[None, :, None] * frequencies
    size = (rows, columns, quarter)
    angles = torch.cat([row.expand(size), column.expand(size)], dim=-1).flatten(0, 1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[None]


def rotary_frequencies(config: BestRQ2Config, shape: TransformerShape) -> dict[str, Tensor]:
    """Rotary frequencies of one stack of blocks, float32, by the last part of their names; empty without rotation."""
    if not config.position_embedding.startswith("rope"):
        return {}
    # In two dimensions rows (`h`) and columns (`w`) rotate half of a head each; time alone rotates all of it.
    two_dimensional = config.position_embedding == "rope_2d"
    rotated = shape.width // shape.heads // (2 if two_dimensional else 1)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    names = ("inv_freq_h", "inv_freq_w") if two_dimensional else ("inv_freq_t",)
    return dict.fromkeys(names, frequencies)


# --- Spellings of SwiGLU


# Feed-forward layers with a gate whose names say which matrix is which: (gate, value, output).
_SEPARATE = (("fc1_g", "fc1_x", "fc2"), ("gate_proj", "up_proj", "down_proj"))
_FEED_FORWARD = re.compile(r"((?:encoder|predictor)\.blocks\.\d+\.mlp)\.(\w+)\.(weight|bias)")


def join_gates(state: Mapping[str, Tensor], gate: str | None, gate_field: str) -> dict[str, Tensor]:
    """Rename every unambiguous spelling of SwiGLU to ours: `fc1` with the gate in its first half, and `fc2`.

    The layout of the release with SwiGLU (BEST-RQ-2.1) is not public. Gate and value in the wrong order still load and
    embed, only badly, so a spelling is accepted only where names and shapes leave one reading:

    - `fc1_g`, `fc1_x`, `fc2` (timm) and `gate_proj`, `up_proj`, `down_proj` (Llama in transformers) are explicit.
    - `w1`, `w2`, `w3`: wherever these names are used `w1` is the gate; the output is the one whose rows are the model's
      width (Llama: `w2`, DINOv3: `w3`). Where both are square the order is unknown.
    - `w12`, `w3` (DINOv2, xformers): the first half of `w12` is the gate by definition of that layer.
    - `fc1`, `fc2` with twice as many rows in `fc1` as columns in `fc2`: timm has both orders under these names
      (`GluMlp` with `gate_last` true and false), so the configuration must name one.

    Args:
        state: the reference's state dict without prefix.
        gate: position of the gate in a packed `fc1`, "first" or "last"; None where the configuration does not say.
        gate_field: name of that field in messages.

    Raises:
        CheckpointError: if the order is unknown.
    """
    layers: dict[str, set[str]] = {}
    for key in state:
        if found := _FEED_FORWARD.fullmatch(key):
            layers.setdefault(found[1], set()).add(found[2])
    joined = dict(state)
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            _join_layer(joined, layer, names, kind, gate, gate_field)
    return joined


def _join_layer(
    state: dict[str, Tensor], layer: str, names: set[str], kind: str, gate: str | None, gate_field: str
) -> None:
    """Replace the tensors of one kind in one feed-forward layer; unknown spellings stay and are reported later."""

    def key(name: str) -> str:
        return f"{layer}.{name}.{kind}"

    def rows_and_columns(name: str) -> tuple[int, ...]:
        weight = state.get(f"{layer}.{name}.weight")
        return () if weight is None or weight.ndim != 2 else tuple(weight.shape)

    if names == {"fc1", "fc2"} and kind == "weight":
        first, second = rows_and_columns("fc1"), rows_and_columns("fc2")
        if first and second and first[0] == 2 * second[1]:
            if gate is None:
                raise CheckpointError(
                    f"'{key('fc1')}' {list(first)} holds gate and value of a SwiGLU in an unknown order; set "
                    f"{gate_field} to first or last"
                )
            if gate == "last":
                for each in (key("fc1"), f"{layer}.fc1.bias"):
                    if each in state and _can_be_joined(state[each]):
                        state[each] = torch.cat(state[each].chunk(2)[::-1])
        return
    for parts in (*_SEPARATE, *_by_shape(names, rows_and_columns)):
        if names == set(parts) and all(key(name) in state and _can_be_joined(state[key(name)]) for name in parts):
            *inner, output = (state.pop(key(name)) for name in parts)
            if len({tensor.shape[1:] for tensor in inner}) > 1:
                raise CheckpointError(f"'{key(parts[0])}' and '{key(parts[1])}' do not belong to one SwiGLU")
            state[key("fc1")], state[key("fc2")] = torch.cat(inner), output


def _can_be_joined(tensor: Tensor) -> bool:
    return tensor.dtype in _WEIGHTS and tensor.ndim > 0


def _by_shape(names: set[str], rows_and_columns: Callable[[str], tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Spellings with numbered matrices, as (gate, value, output) or (both, output)."""
    if names == {"w12", "w3"}:
        yield "w12", "w3"
    if names == {"w1", "w2", "w3"}:
        width_last = rows_and_columns("w1")[::-1]
        outputs = [name for name in ("w2", "w3") if rows_and_columns(name) == width_last]
        if len(outputs) == 1:
            yield "w1", "w3" if outputs == ["w2"] else "w2", outputs[0]


# --- From a state dict to a model


@contextmanager
def _named(config: str | Path | Mapping[str, Any]) -> Iterator[None]:
    """Prefix errors about a configuration with the name of its file."""
    try:
        yield
    except ConfigError as error:
        if isinstance(config, Mapping):
            raise
        raise ConfigError(f"{config}: {error}") from error


def _read_state(checkpoint: str | Path | Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Name of a checkpoint in messages, and its tensors."""
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
    """The tensors without the prefix of a training framework, such as `net.`."""
    anchors = [key for key in state if key.endswith(ANCHOR)]
    if not anchors:
        raise CheckpointError(
            f"{source}: no tensor '{ANCHOR}' in it, so it is not a checkpoint of the reference; it holds "
            f"{', '.join(sorted(key[:80] for key in state)[:5])}…"
        )
    prefix = anchors[0].removesuffix(ANCHOR)
    return {key.removeprefix(prefix): value for key, value in state.items()}


# Ends of an exported encoder's keys, and their prefix in the reference.
_ENDS = (
    (re.compile(r"(?:.*?\.)??(blocks\.\d+\..+)"), "encoder."),
    (re.compile(r"(?:.*\.)?(norm\.(?:weight|bias)|pos_embed|rope\.\w+)"), "encoder."),
    (re.compile(r"(?:.*\.)?patch_embed\.(proj\.(?:weight|bias))"), "patch_embed.patch_embed."),
    (re.compile(r"(?:.*\.)?(spectrogram\.window)"), "spectrogram.mel_spec."),
    (re.compile(r"(?:.*\.)?(mel_scale\.fb)"), "spectrogram.mel_spec."),
)
# Prefixes of tensors that belong to no encoder.
_OTHERS = re.compile(r"predictor|teacher|target|ema|quantizer|decoder", re.IGNORECASE)


def _by_suffix(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of an exported encoder by the reference's names; unknown keys stay as they are."""
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        name = key
        for pattern, prefix in _ENDS:
            found = pattern.fullmatch(key)
            if found and not _OTHERS.search(key.removesuffix(found[1])):
                name = prefix + found[1]
                break
        if name in named:
            raise CheckpointError(
                f"{source}: '{origin[name][:200]}' and '{key[:200]}' both end like '{name[:200]}', so it is not clear "
                "which one is the encoder's"
            )
        named[name], origin[name] = value, key
    if ANCHOR not in named:
        raise CheckpointError(
            f"{source}: no tensor ending in 'patch_embed.proj.weight' in it, so it is not an encoder of the reference; "
            f"it holds {', '.join(sorted(key[:80] for key in state)[:5])}…"
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
    model.config.architectures = [model_class.__name__]  # as in a model folder
    _fill(model, parts.whole, state, source)
    return model.eval()


def _check_fixed_tensors(config: BestRQ2Config, state: Mapping[str, Tensor], source: str, whole: bool) -> None:
    """Refuse a checkpoint whose window, filters or positions contradict its configuration."""
    expected = fixed_tensors(config, whole)
    for part, sizes in part_shapes(config, whole).items():
        for frequencies in rotary_frequencies(config, sizes).values():
            one = FixedTensor(tuple(frequencies.shape), lambda value=frequencies: value)  # type: ignore[misc]
            expected |= {key: one for key in state if key.startswith(f"{part}.") and ".rope.inv_freq" in key}
    for key, fixed in expected.items():
        if key in state and not (tuple(state[key].shape) == fixed.shape and _alike(state[key], fixed.value())):
            raise CheckpointError(
                f"{source}: '{key}' {list(state[key].shape)} is not what the configuration gives {list(fixed.shape)}; "
                "check net.spectrogram, net.patch_embed and net.encoder"
            )


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether a stored buffer equals the expected one up to rounding."""
    if found.dtype not in _WEIGHTS:
        return False
    tolerance = max(1e-4, torch.finfo(found.dtype).eps)
    return torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance)


def _fill(model: BestRQ2Model | BestRQ2ForPreTraining, whole: bool, state: dict[str, Tensor], source: str) -> None:
    """Fill a model with the reference's tensors; all that do not fit are listed."""
    config, prefix = model.config, "" if whole else "bestrq2."
    ours = {key: value for key, value in model.state_dict().items() if "statistics." not in key}
    names = {key: reference_key(prefix + key, config) for key in ours}
    shapes = {names[key]: reference_shape(prefix + key, value.shape, config) for key, value in ours.items()}
    fixed = fixed_tensors(config, whole).keys()
    rotary = config.position_embedding.startswith("rope")
    optional = {key for key in state if key in fixed or (rotary and ".rope.inv_freq" in key)}
    raise_for_keys(
        source,
        {
            "missing": sorted((shapes.keys() | (fixed if whole else set())) - state.keys()),
            "unexpected": sorted(key[:200] for key in state.keys() - shapes.keys() - optional),
            "misshaped": [
                f"{key} {list(state[key].shape)}, not {shape}"
                for key, shape in sorted(shapes.items())
                if key in state and list(state[key].shape) != shape
            ],
            "not of floating point": sorted(
                f"{key} ({state[key].dtype})"
                for key in shapes.keys() & state.keys()
                if state[key].dtype not in _WEIGHTS
            ),
        },
    )
    model.load_state_dict({key: state[names[key]].reshape(ours[key].shape) for key in ours}, strict=False)
    refuse_not_finite(model, source)
