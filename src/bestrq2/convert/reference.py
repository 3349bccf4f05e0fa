"""Checkpoints of the reference research module into this package's model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bestrq2.convert.weights import raise_for_keys, read_state_dict
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.log_mel import mel_filters
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.model.patches import sine_cosine_positions

# The patch embedding's weight: every reference module has it, so it tells what stands before all keys.
_ANCHOR = "patch_embed.patch_embed.proj.weight"


def load_reference(
    checkpoint: str | Path | Mapping[str, Tensor], config: str | Path | Mapping[str, Any]
) -> BestRQ2ForPreTraining:
    """Load a checkpoint of the reference implementation, two-step or one-stage.

    Args:
        checkpoint: `.safetensors` or `.ckpt` file (loaded with weights only), or its state dict.
        config: the reference's own configuration, a mapping or a JSON or YAML file: `net` with `spectrogram`,
            `patch_embed`, `masking`, `encoder`, `predictor`; `vocab_size` and `codebook_dim`. What is absent is the
            paper's.

    Returns:
        The whole pretraining model in evaluation mode; `.base_model` is the encoder.

    Raises:
        CheckpointError: if tensors are missing, extra or misshaped (all are listed), or contradict the configuration.
        ConfigError: if the configuration cannot be read or asks for what this package does not do.
    """
    source = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_state_dict(Path(checkpoint))
    state = _without_prefix(state, source)
    model = BestRQ2ForPreTraining(_translate_config(_read_config(config), state))
    fixed, rotary = _fixed_tensors(model.config), _rotary_tensors(model.config, state)
    _check_fixed_tensors(state, fixed | rotary, source)
    ours = {key: value for key, value in model.state_dict().items() if ".statistics." not in key}
    names = {key: _reference_key(key, model.config) for key in ours}
    shapes = {names[key]: _reference_shape(key, value.shape, model.config) for key, value in ours.items()}
    required = shapes.keys() | fixed.keys()
    rotary_model = model.config.position_embedding == "rope_2d"
    raise_for_keys(
        source,
        {
            "missing": sorted(required - state.keys()),
            "unexpected": sorted(key for key in state.keys() - required if not (rotary_model and ".rope." in key)),
            "misshaped": [
                f"{key} {list(state[key].shape)}, not {shape}"
                for key, shape in sorted(shapes.items())
                if key in state and list(state[key].shape) != shape
            ],
        },
    )
    model.load_state_dict({key: state[names[key]].reshape(ours[key].shape) for key in ours}, strict=False)
    return model.eval()


def _read_config(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    try:
        text = path.read_text()
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON or YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path}: expected a mapping with the key 'net', found {type(loaded).__name__}")
    return loaded


def _without_prefix(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop what a training framework put in front of the keys, such as `net.`."""
    anchors = [key for key in state if key.endswith(_ANCHOR)]
    if not anchors:
        raise CheckpointError(
            f"{source}: no tensor '{_ANCHOR}' in it, so it is no checkpoint of the reference; it holds "
            f"{', '.join(sorted(state)[:5])}…"
        )
    prefix = anchors[0].removesuffix(_ANCHOR)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _translate_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BestRQ2Config:
    try:
        return BestRQ2Config(**_settings(config, state))
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"the reference's configuration does not fit: {error}") from error


def _settings(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our names for the reference's settings."""
    net = config.get("net", config)
    parts = ("spectrogram", "patch_embed", "masking", "encoder", "predictor")
    spectrogram, patch, masking, encoder, predictor = (dict[str, Any](net.get(part) or {}) for part in parts)
    if spectrogram.get("power", 2.0) != 2.0:
        raise ValueError(f"net.spectrogram.power is {spectrogram['power']}, only 2.0 (power) is supported")
    rate = int(spectrogram.get("sample_rate", 16_000))
    hop = round(float(spectrogram.get("hop_length_ms", 39.0625)) * rate / 1000)
    width, heads = int(encoder.get("embed_dim", 768)), int(encoder.get("num_heads", 12))
    predictor_width = int(predictor.get("embed_dim", width))
    image: Any = patch.get("img_size") or (128, 256)
    ratio = masking.get("mask_ratio", (0.4, 0.6))
    # Sine-cosine tables are buffers named `pos_embed`; with rotary positions there are none.
    sine_cosine = encoder.get("pos_embed_type") == "sincos" or any(key.endswith(".pos_embed") for key in state)
    return {
        "sampling_rate": rate,
        "n_fft": int(spectrogram.get("n_fft", 2048)),
        "win_length": round(float(spectrogram.get("win_length_ms", 128)) * rate / 1000),
        "hop_length": hop,
        "num_mel_bands": int(spectrogram.get("n_mels", 128)),
        "mel_min_hz": float(spectrogram.get("f_min", 0.0)),
        "mel_max_hz": float(spectrogram.get("f_max", rate / 2)),
        "max_seconds": int(image[1]) * hop / rate,
        "patch_size": list(patch.get("patch_size") or (16, 16)),
        "hidden_size": width,
        "num_hidden_layers": int(encoder.get("depth", 12)),
        "num_attention_heads": heads,
        "intermediate_size": round(width * float(encoder.get("mlp_ratio", 4.0))),
        "position_embedding": "sincos" if sine_cosine else "rope_2d",
        "drop_path_rate": float(encoder.get("drop_path_rate", 0.1)),
        "objective": "two_step" if any(key.startswith("predictor.") for key in state) else "one_stage",
        "predictor_hidden_size": predictor_width,
        "predictor_num_layers": int(predictor.get("depth", 4)),
        "predictor_num_attention_heads": int(predictor.get("num_heads", heads)),
        "predictor_intermediate_size": round(predictor_width * float(predictor.get("mlp_ratio", 4.0))),
        "codebook_size": int(config.get("vocab_size", 8192)),
        "codebook_dim": int(config.get("codebook_dim", 16)),
        "mask_ratio": [ratio, ratio] if isinstance(ratio, int | float) else list(ratio),
    }


def _fixed_tensors(config: BestRQ2Config) -> dict[str, Tensor]:
    """Window, mel filters and sine-cosine tables under the reference's names; they follow from the configuration."""
    cpu = torch.device("cpu")
    bands = (config.num_mel_bands, config.mel_min_hz, config.mel_max_hz)
    fixed = {
        "spectrogram.mel_spec.spectrogram.window": torch.hann_window(config.win_length),
        "spectrogram.mel_spec.mel_scale.fb": mel_filters(config.n_fft, *bands, config.sampling_rate, cpu),
    }
    if config.position_embedding == "sincos":
        columns = config.columns(config.max_samples)
        for part, width in _widths(config).items():
            fixed[f"{part}.pos_embed"] = sine_cosine_positions(config.patch_rows, columns, width, cpu)[None]
    return fixed


def _widths(config: BestRQ2Config) -> dict[str, int]:
    """Width of each transformer, by the reference's name."""
    widths = {"encoder": config.hidden_size, "predictor": config.predictor_hidden_size}
    return widths if config.objective == "two_step" else {"encoder": config.hidden_size}


def _rotary_tensors(config: BestRQ2Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rotary frequencies in a checkpoint, with the values they must have; the reference stores some twice."""
    if config.position_embedding != "rope_2d":
        return {}
    heads = {"encoder": config.num_attention_heads, "predictor": config.predictor_num_attention_heads}
    expected: dict[str, Tensor] = {}
    for part, width in _widths(config).items():
        half = width // heads[part] // 2
        inverse = 10_000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        expected |= {
            key: inverse.float()
            for key in state
            if key.startswith(f"{part}.") and key.endswith((".rope.inv_freq_h", ".rope.inv_freq_w"))
        }
    return expected


def _check_fixed_tensors(state: Mapping[str, Tensor], fixed: Mapping[str, Tensor], source: str) -> None:
    """Refuse a checkpoint whose window, filters or positions are not what its configuration gives here."""
    for key, value in fixed.items():
        if key in state and (
            state[key].shape != value.shape or not torch.allclose(state[key].float(), value, rtol=1e-4, atol=1e-4)
        ):
            raise CheckpointError(
                f"{source}: '{key}' {list(state[key].shape)} is not what the configuration gives {list(value.shape)}; "
                "check net.spectrogram, net.patch_embed and net.encoder"
            )


_RENAMED = (
    ("bestrq2.encoder.", "encoder."),
    ("bestrq2.patch_embedding.", "patch_embed.patch_embed.proj."),
    ("predictor_input.", "predictor_input_proj."),
    ("quantizer.projection", "quantizer.P"),
    ("quantizer.codebook", "quantizer.CB"),
)


def _reference_key(key: str, config: BestRQ2Config) -> str:
    """The reference's name of one of our tensors."""
    head = "rq_proj." if config.objective == "two_step" else "output_proj."
    for ours, theirs in (*_RENAMED, ("head.", head)):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _reference_shape(key: str, shape: torch.Size, config: BestRQ2Config) -> list[int]:
    """The shape that one of our tensors has in the reference, which holds the same values in the same order."""
    if key == "bestrq2.patch_embedding.weight":
        return [shape[0], 1, *config.patch_size]  # a convolution over whole patches is a linear map
    return list(shape[1:] if key.startswith("quantizer.") else shape)
