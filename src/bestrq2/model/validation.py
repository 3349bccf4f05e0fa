"""Which architectural choices fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_bestrq2 import BestRQ2Config

CHOICES: dict[str, tuple[str, ...]] = {
    "input_normalization": ("none", "dataset", "clip"),
    "quantizer_normalization": ("none", "layernorm", "dataset"),
    "encoder_type": ("vit", "conformer"),
    "position_embedding": ("sincos", "rope_2d", "rope_time", "learned", "relative"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "objective": ("two_step", "one_stage"),
    "mask_shape": ("uniform", "block", "span"),
    "mask_fill": ("token", "noise"),
}


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check(config: BestRQ2Config) -> None:
    """Pass if every field is in range and all fit together; else a ValueError names the first that does not."""
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    _check_types(config)
    _check_spectrogram(config)
    _check_transformer(config, "", config.position_embedding)
    if config.objective == "two_step":
        _check_transformer(config, "predictor_", config.position_embedding)
    low, high = config.mask_ratio
    require(0.0 < low <= high < 1.0, f"mask_ratio must satisfy 0 < lowest <= highest < 1, got {config.mask_ratio}")
    columns = config.columns(config.max_samples)
    require(
        config.position_embedding != "learned" or columns <= config.max_columns,
        f"max_columns ({config.max_columns}) must not be below the {columns} patch columns of a clip of max_seconds "
        f"({config.max_seconds:g} s)",
    )
    _check_encoder(config)
    rows, columns = config.mask_block_size
    limits = (config.patch_rows, config.columns(config.max_samples))
    fits = {"block": rows <= limits[0] and columns <= limits[1], "span": columns < limits[1]}
    require(
        fits.get(config.mask_shape, True),
        f"mask_block_size {config.mask_block_size} does not fit the {limits[0]} x {limits[1]} patches of a clip of "
        f"{config.max_seconds:g} s",
    )


_POSITIVE_INTEGERS = [
    "sampling_rate",
    "n_fft",
    "win_length",
    "hop_length",
    "num_mel_bands",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_columns",
    "predictor_hidden_size",
    "predictor_num_layers",
    "predictor_num_attention_heads",
    "predictor_intermediate_size",
    "conformer_kernel_size",
    "codebook_size",
    "codebook_dim",
    "num_codebooks",
    "masks_per_clip",
]
_INTEGER_PAIRS = ["patch_size", "mask_block_size", "conformer_channels"]
_NUMBERS = [
    "mel_min_hz",
    "mel_max_hz",
    "max_seconds",
    "norm_eps",
    "drop_path_rate",
    "conformer_dropout",
    "mask_span_probability",
    "mask_noise_std",
    "initializer_range",
]
_FLAGS = ["use_bias", "qk_norm", "predictor_context_positions"]


def _values(config: BestRQ2Config, names: Sequence[str]) -> dict[str, Any]:
    """Values of fields by name, those of pairs as `name[0]` and `name[1]`."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name)
        found |= {f"{name}[{i}]": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_types(config: BestRQ2Config) -> None:
    """Numbers that are numbers, and in the range that each has by itself."""
    for name, value in _values(config, [*_POSITIVE_INTEGERS, *_INTEGER_PAIRS]).items():
        require(_is_whole(value) and value > 0, f"{name} must be a whole number above 0, got {value!r}")
    for name, value in _values(config, [*_NUMBERS, "mask_ratio"]).items():
        finite = (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)
        require(finite, f"{name} must be a number, got {value!r}")
    for name, value in _values(config, _FLAGS).items():
        require(isinstance(value, bool), f"{name} must be true or false, got {value!r}")
    for name, value in _values(config, ["max_seconds", "norm_eps", "initializer_range", "mask_noise_std"]).items():
        require(value > 0, f"{name} must be above 0, got {value!r}")
    require(config.codebook_size > 1, f"codebook_size must be above 1, got {config.codebook_size!r}")
    for name in ("drop_path_rate", "conformer_dropout"):
        rate = getattr(config, name)
        require(0 <= rate < 1, f"{name} must lie in [0, 1), got {rate!r}")
    start = config.mask_span_probability
    require(0 < start < 1, f"mask_span_probability must lie between 0 and 1, got {start!r}")
    seed = config.quantizer_seed
    require(_is_whole(seed) and seed >= 0, f"quantizer_seed must be a whole number of at least 0, got {seed!r}")


def _check_spectrogram(config: BestRQ2Config) -> None:
    require(config.n_fft % 2 == 0, f"n_fft must be even, got {config.n_fft}")
    require(
        config.win_length <= config.n_fft, f"win_length ({config.win_length}) must not exceed n_fft ({config.n_fft})"
    )
    nyquist = config.sampling_rate / 2
    require(
        0 <= config.mel_min_hz < config.mel_max_hz <= nyquist,
        f"mel_min_hz ({config.mel_min_hz:g}) and mel_max_hz ({config.mel_max_hz:g}) must satisfy "
        f"0 <= mel_min_hz < mel_max_hz <= sampling_rate / 2 = {nyquist:g}",
    )
    require(
        config.num_mel_bands % config.patch_size[0] == 0,
        f"num_mel_bands ({config.num_mel_bands}) must be a multiple of the patch height ({config.patch_size[0]})",
    )
    shortest = config.frame_hop_samples - config.hop_length
    require(
        config.max_samples >= shortest,
        f"max_seconds ({config.max_seconds:g}) is shorter than one patch ({shortest / config.sampling_rate:g} s)",
    )
    patches = config.patch_rows * config.columns(config.max_samples)
    require(patches >= 2, f"a clip of max_seconds ({config.max_seconds:g}) has {patches} patch; at least 2 are needed")


def _check_transformer(config: BestRQ2Config, prefix: str, positions: str) -> None:
    width = getattr(config, f"{prefix}hidden_size")
    heads = getattr(config, f"{prefix}num_attention_heads")
    require(
        width % heads == 0, f"{prefix}hidden_size ({width}) must be a multiple of {prefix}num_attention_heads ({heads})"
    )
    divisor = {"sincos": 4, "learned": 1, "relative": 2}.get(positions)
    if divisor is not None:
        require(
            width % divisor == 0,
            f"{prefix}hidden_size ({width}) must be a multiple of {divisor} for {positions} positions",
        )
        return
    divisor = 4 if positions == "rope_2d" else 2
    require(
        width // heads % divisor == 0,
        f"the width of a head ({prefix}hidden_size / {prefix}num_attention_heads = {width // heads}) must be a "
        f"multiple of {divisor} for {positions} positions",
    )


def _check_encoder(config: BestRQ2Config) -> None:
    """What the one-stage objective and the Conformer alone can do, and what the Conformer needs."""
    require(
        config.mask_fill == "token" or config.objective == "one_stage",
        "mask_fill 'noise' needs objective 'one_stage': in two steps the encoder does not see hidden patches at all",
    )
    require(
        config.mask_fill == "token" or config.input_normalization != "none",
        "mask_fill 'noise' needs input_normalization 'dataset' or 'clip': among decibels, noise of deviation "
        f"mask_noise_std = {config.mask_noise_std:g} around 0 would be the loudest sound of all",
    )
    conformer = config.encoder_type == "conformer"
    require(
        conformer == (config.position_embedding == "relative"),
        f"position_embedding 'relative' and encoder_type 'conformer' go together, got {config.position_embedding!r} "
        f"and {config.encoder_type!r}",
    )
    if not conformer:
        return
    require(
        config.objective == "one_stage" and config.mask_fill == "noise",
        "encoder_type 'conformer' needs objective 'one_stage' and mask_fill 'noise': its convolutions read neighbours, "
        f"so no part can be left out; got {config.objective!r} and {config.mask_fill!r}",
    )
    require(
        config.patch_size == [config.num_mel_bands, 4],
        f"encoder_type 'conformer' needs patch_size [num_mel_bands, 4] = [{config.num_mel_bands}, 4], the frames that "
        f"its two strided convolutions join, got {config.patch_size}",
    )
    fixed = {"norm": "layernorm", "use_bias": True, "qk_norm": False, "activation": "gelu"}
    for name, value in fixed.items():
        found = getattr(config, name)
        require(found == value, f"encoder_type 'conformer' needs {name} {value!r}, got {found!r}")
    kernel = config.conformer_kernel_size
    require(kernel % 2 == 1, f"conformer_kernel_size must be odd, got {kernel}")
