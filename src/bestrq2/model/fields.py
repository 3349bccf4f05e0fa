"""Architecture fields: names, types, defaults and consistency of everything a model can be configured to be.

This module imports nothing but the standard library, so that commands list and check the fields without loading torch.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

IntPair = tuple[int, int]
FloatPair = tuple[float, float]


@dataclass
class ModelFields:
    """Architecture and objective of a model; the defaults are the paper's (section 3).

    Args:
        sampling_rate: sampling rate of the input waveform, Hz.
        n_fft: length of the Fourier transform, samples.
        win_length: length of the Hann window, samples.
        hop_length: samples between frames.
        num_mel_bands: number of mel bands, of both windows where there are two.
        short_win_length: length of a second, shorter Hann window, samples; 0 for none. Its bands, over the same
            frequencies and frames, follow those of the long one: long windows resolve pitch, short ones speech.
        short_mel_bands: how many of the mel bands are those of the short window.
        mel_min_hz: lower edge of the lowest mel band, Hz.
        mel_max_hz: upper edge of the highest mel band, Hz.
        max_seconds: longest clip in pretraining, and the window in which longer audio is embedded, s.
        input_normalization: normalization of the log-mel spectrogram: "none" (raw dB, the paper), "dataset" (per band,
            with statistics stored in the model), "clip" (one mean and deviation per clip) or "clip_band" (a mean and
            deviation per clip and band).
        patch_size: size of a patch: mel bands, frames.
        encoder_type: "vit", or "conformer" (strided convolutions, then Conformer blocks; one-stage only).
        hidden_size: width of the encoder.
        num_hidden_layers: number of encoder blocks.
        num_attention_heads: number of attention heads in the encoder.
        intermediate_size: hidden width of the encoder's feed-forward layers.
        activation: activation of the feed-forward layers: "gelu" or "swiglu" (leave it at "gelu" for a Conformer,
            which has `conformer_activation`).
        norm: "layernorm" or "rmsnorm".
        norm_eps: epsilon of the norms.
        use_bias: biases in the linear layers of the blocks, the patch embedding and the predictor.
        qk_norm: normalization of queries and keys per head before the dot product.
        position_embedding: "sincos" (2-D sine-cosine, added), "rope_2d" (rotary, frequency and time), "rope_time"
            (rotary, time only), "learned" (added) or "relative" (Transformer-XL; Conformer only).
        max_columns: number of patch columns with "learned" positions.
        drop_path_rate: stochastic depth rate of the last encoder block, rising linearly from 0 at the first (a
            Conformer has dropout instead).
        conformer_channels: channels of the two convolutions (kernel 3, stride 2) in front of a Conformer.
        conformer_kernel_size: kernel size of the depthwise convolution in a Conformer block, frames; odd.
        conformer_dropout: dropout rate in a Conformer and the convolutions in front of it.
        conformer_activation: activation in the blocks of a Conformer: "silu" (arXiv 2005.08100) or "gelu".
        objective: "two_step" (the encoder sees visible patches, a predictor names the codes of the hidden ones) or
            "one_stage" (mask tokens in the encoder's input, head on the encoder).
        predictor_hidden_size: width of the predictor.
        predictor_num_layers: number of predictor blocks.
        predictor_num_attention_heads: number of attention heads in the predictor.
        predictor_intermediate_size: hidden width of the predictor's feed-forward layers.
        codebook_size: number of codes per codebook.
        codebook_dim: width of the random projection.
        num_codebooks: number of independent quantizers; their losses are averaged.
        quantizer_seed: random seed of the projection and the codebook.
        quantizer_normalization: normalization of the quantizer's input: "none" (the encoder's own input), "layernorm"
            (each patch of it, or the part of each window, to mean 0 and deviation 1), or, whatever the encoder's input
            is, "decibels" (raw dB), "dataset", "clip" or "clip_band" (as `input_normalization`).
        mask_ratio: lowest and highest share of hidden patches, drawn once per step.
        mask_fill: replacement of hidden patches in one-stage models: "token" (learned) or "noise" (Gaussian with
            deviation `mask_noise_std` in place of the normalized values).
        mask_noise_std: standard deviation of that noise.
        initializer_range: standard deviation of the truncated normal from which the linear layers of a transformer's
            blocks, learned positions and the mask token are drawn; a Conformer's blocks are Xavier normal, and all
            other layers have PyTorch's defaults.
    """

    sampling_rate: int = 16_000
    n_fft: int = 2048
    win_length: int = 2048
    hop_length: int = 625
    num_mel_bands: int = 128
    short_win_length: int = 0
    short_mel_bands: int = 0
    mel_min_hz: float = 0.0
    mel_max_hz: float = 8000.0
    max_seconds: float = 10.0
    input_normalization: Literal["none", "dataset", "clip", "clip_band"] = "none"
    patch_size: IntPair = (16, 16)
    encoder_type: Literal["vit", "conformer"] = "vit"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    activation: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    use_bias: bool = True
    qk_norm: bool = False
    position_embedding: Literal["sincos", "rope_2d", "rope_time", "learned", "relative"] = "sincos"
    max_columns: int = 16
    drop_path_rate: float = 0.1
    conformer_channels: IntPair = (128, 32)
    conformer_kernel_size: int = 31
    conformer_dropout: float = 0.1
    conformer_activation: Literal["silu", "gelu"] = "silu"
    objective: Literal["two_step", "one_stage"] = "two_step"
    predictor_hidden_size: int = 768
    predictor_num_layers: int = 4
    predictor_num_attention_heads: int = 12
    predictor_intermediate_size: int = 3072
    codebook_size: int = 8192
    codebook_dim: int = 16
    num_codebooks: int = 1
    quantizer_seed: int = 0
    quantizer_normalization: Literal["none", "layernorm", "decibels", "dataset", "clip", "clip_band"] = "none"
    mask_ratio: FloatPair = (0.4, 0.6)
    mask_fill: Literal["token", "noise"] = "token"
    mask_noise_std: float = 0.1
    initializer_range: float = 0.02

    @property
    def spectra(self) -> list[tuple[int, int, int]]:
        """Length of the transform and of the window, samples, and number of mel bands, of each spectrogram."""
        spectra = [(self.n_fft, self.win_length, self.num_mel_bands - self.short_mel_bands)]
        if self.short_mel_bands:
            spectra.append((2 ** (self.short_win_length - 1).bit_length(), self.short_win_length, self.short_mel_bands))
        return spectra

    @property
    def patch_rows(self) -> int:
        """Patches along the frequency axis."""
        return self.num_mel_bands // self.patch_size[0]

    @property
    def patch_values(self) -> int:
        """Log-mel values in one patch."""
        return self.patch_size[0] * self.patch_size[1]

    @property
    def window_values(self) -> list[int]:
        """Log-mel values of each window in one patch."""
        if self.patch_rows > 1:  # a patch is of one window or the other
            return [self.patch_values]
        return [bands * self.patch_size[1] for _, _, bands in self.spectra]

    @property
    def frame_hop_samples(self) -> int:
        """Samples between the frames that the encoder returns (one per patch column)."""
        return self.patch_size[1] * self.hop_length

    @property
    def max_samples(self) -> int:
        """Samples of the longest clip in pretraining."""
        return round(self.max_seconds * self.sampling_rate)

    @property
    def min_training_samples(self) -> int:
        """Samples of the shortest clip in pretraining: of two patches one must stay visible."""
        return 1 if self.patch_rows > 1 else 2 * self.frame_hop_samples - self.hop_length

    @property
    def uses_dataset_statistics(self) -> bool:
        """Whether mean and deviation per mel band must be estimated before training."""
        return "dataset" in (self.input_normalization, self.quantizer_normalization)

    @property
    def mean_hidden_share(self) -> float:
        """Expected share of hidden patches, up to rounding to whole patches."""
        return sum(self.mask_ratio) / 2

    def columns(self, samples: int) -> int:
        """Patch columns of a clip of `samples` samples: whole patches only, at least one."""
        return max(1, (1 + samples // self.hop_length) // self.patch_size[1])

    def set_fields(self, values: dict[str, Any]) -> None:
        """Set every field, from `values` or to its default, and check them all.

        Pairs become lists, as JSON keeps them.

        Raises:
            ValueError: for a value of the wrong type or out of range, or values that do not fit together.
        """
        for name, hint in FIELD_TYPES.items():
            value = values.get(name, getattr(ModelFields, name))
            setattr(self, name, _as_pair(value, name) if get_origin(hint) is tuple else value)
        for name, hint in FIELD_TYPES.items():
            _check_type(name, getattr(self, name), hint)
        for check in (_check_ranges, _check_spectrogram, _check_transformers, _check_masks, _check_conformer):
            check(self)


FIELD_TYPES: dict[str, Any] = get_type_hints(ModelFields)
"""Type of every field, in order of declaration."""

# Numbers with a narrower range than their type; other integers must be above 0. The upper limits keep what follows from
# a single field (loops over blocks, windows of audio) within reach of a machine.
_MOST = {
    "quantizer_seed": 2**63 - 1,
    "max_seconds": 86_400,
    **dict.fromkeys(("num_hidden_layers", "predictor_num_layers", "num_codebooks"), 1000),
}
_MOST_OF_OTHERS = 2**24
# Weights of the mel filters, bands x frequencies.
_MOST_FILTER_WEIGHTS = 2**27
_FROM_ZERO = ("quantizer_seed", "short_win_length", "short_mel_bands")
_POSITIVE = ("max_seconds", "norm_eps", "initializer_range", "mask_noise_std")
_BELOW_ONE = ("drop_path_rate", "conformer_dropout")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _as_pair(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {reprlib.repr(value)}")
    return list(value)


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Check a value against the type of its field; every integer but a seed must be positive."""
    if get_origin(hint) is tuple:
        for index, (part, kind) in enumerate(zip(value, get_args(hint), strict=True)):
            _check_type(f"{name}[{index}]", part, kind)
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    got = reprlib.repr(value)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {got}")
    elif hint is bool:
        _require(isinstance(value, bool), f"{name} must be true or false, got {got}")
    elif hint is float:
        finite = whole or (isinstance(value, float) and math.isfinite(value))
        _require(finite, f"{name} must be a number, got {got}")
    elif name in _FROM_ZERO:
        _require(whole and value >= 0, f"{name} must be a whole number of at least 0, got {got}")
    else:
        _require(whole and value > 0, f"{name} must be a whole number above 0, got {got}")
    if get_origin(hint) is not Literal:
        most = _MOST.get(name, _MOST_OF_OTHERS)
        _require(abs(value) <= most, f"{name} must be at most {most}, got {got}")


def _check_ranges(config: ModelFields) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        _require(value > 0, f"{name} must be above 0, got {value!r}")
    for name in _BELOW_ONE:
        value = getattr(config, name)
        _require(0 <= value < 1, f"{name} must lie in [0, 1), got {value!r}")
    _require(config.codebook_size > 1, f"codebook_size must be above 1, got {config.codebook_size!r}")


def _check_spectrogram(config: ModelFields) -> None:
    _require(config.n_fft % 2 == 0, f"n_fft must be even, got {config.n_fft}")
    _require(
        config.win_length <= config.n_fft, f"win_length ({config.win_length}) must not exceed n_fft ({config.n_fft})"
    )
    _require(
        bool(config.short_win_length) == bool(config.short_mel_bands),
        "short_win_length and short_mel_bands must both be 0 or both be above 0, got "
        f"{config.short_win_length} and {config.short_mel_bands}",
    )
    _require(
        config.short_mel_bands < config.num_mel_bands,
        f"short_mel_bands ({config.short_mel_bands}) must be fewer than num_mel_bands ({config.num_mel_bands})",
    )
    long_bands = config.num_mel_bands - config.short_mel_bands
    _require(
        config.patch_rows == 1 or not config.short_mel_bands or long_bands % config.patch_size[0] == 0,
        f"the {long_bands} bands of the long window must be a multiple of the patch height ({config.patch_size[0]})",
    )
    _require(
        config.short_win_length == 0 or 2 <= config.short_win_length < config.win_length,
        f"short_win_length ({config.short_win_length}) must be from 2 to below win_length ({config.win_length})",
    )
    _require(
        config.num_codebooks >= len(config.window_values),
        f"num_codebooks ({config.num_codebooks}) must be at least 2 where a patch has the bands of two windows, which "
        "codebooks code by turns",
    )
    filters = config.num_mel_bands * (config.n_fft // 2 + 1)
    _require(
        filters <= _MOST_FILTER_WEIGHTS,
        f"num_mel_bands ({config.num_mel_bands}) and n_fft ({config.n_fft}) give {filters} weights of mel filters; at "
        f"most {_MOST_FILTER_WEIGHTS} are allowed",
    )
    nyquist = config.sampling_rate / 2
    _require(
        0 <= config.mel_min_hz < config.mel_max_hz <= nyquist,
        f"mel_min_hz ({config.mel_min_hz:g}) and mel_max_hz ({config.mel_max_hz:g}) must satisfy "
        f"0 <= mel_min_hz < mel_max_hz <= sampling_rate / 2 = {nyquist:g}",
    )
    _require(
        config.num_mel_bands % config.patch_size[0] == 0,
        f"num_mel_bands ({config.num_mel_bands}) must be a multiple of the patch height ({config.patch_size[0]})",
    )
    shortest = config.frame_hop_samples - config.hop_length
    _require(
        config.max_samples >= shortest,
        f"max_seconds ({config.max_seconds:g}) is shorter than one patch ({shortest / config.sampling_rate:g} s)",
    )
    columns = config.columns(config.max_samples)
    patches = config.patch_rows * columns
    _require(patches >= 2, f"a clip of max_seconds ({config.max_seconds:g}) has {patches} patch; at least 2 are needed")
    _require(
        config.position_embedding != "learned" or columns <= config.max_columns,
        f"max_columns ({config.max_columns}) must not be below the {columns} patch columns of a clip of max_seconds "
        f"({config.max_seconds:g} s)",
    )


def _check_transformers(config: ModelFields) -> None:
    """Check that widths divide into heads, and both into what the positions need."""
    positions = config.position_embedding
    for prefix in ("", "predictor_") if config.objective == "two_step" else ("",):
        width = getattr(config, f"{prefix}hidden_size")
        heads = getattr(config, f"{prefix}num_attention_heads")
        _require(
            width % heads == 0,
            f"{prefix}hidden_size ({width}) must be a multiple of {prefix}num_attention_heads ({heads})",
        )
        if positions.startswith("rope"):
            divisor = 4 if positions == "rope_2d" else 2
            _require(
                width // heads % divisor == 0,
                f"the width of a head ({prefix}hidden_size / {prefix}num_attention_heads = {width // heads}) must be a "
                f"multiple of {divisor} for {positions} positions",
            )
            continue
        divisor = {"sincos": 4, "relative": 2}.get(positions, 1)
        _require(
            width % divisor == 0,
            f"{prefix}hidden_size ({width}) must be a multiple of {divisor} for {positions} positions",
        )


def _check_masks(config: ModelFields) -> None:
    low, high = config.mask_ratio
    _require(0.0 < low <= high < 1.0, f"mask_ratio must satisfy 0 < lowest <= highest < 1, got {config.mask_ratio}")
    _require(
        config.mask_fill == "token" or config.objective == "one_stage",
        "mask_fill 'noise' needs objective 'one_stage': in two steps the encoder does not see hidden patches at all",
    )
    _require(
        config.mask_fill == "token" or config.input_normalization != "none",
        "mask_fill 'noise' needs a normalized input (input_normalization): among decibels, noise of deviation "
        f"mask_noise_std = {config.mask_noise_std:g} around 0 would be the loudest sound of all",
    )


def _check_conformer(config: ModelFields) -> None:
    conformer = config.encoder_type == "conformer"
    _require(
        conformer == (config.position_embedding == "relative"),
        f"position_embedding 'relative' and encoder_type 'conformer' go together, got {config.position_embedding!r} "
        f"and {config.encoder_type!r}",
    )
    if not conformer:
        return
    _require(
        config.objective == "one_stage" and config.mask_fill == "noise",
        "encoder_type 'conformer' needs objective 'one_stage' and mask_fill 'noise': its convolutions read neighbours, "
        f"so no part can be left out; got {config.objective!r} and {config.mask_fill!r}",
    )
    _require(
        list(config.patch_size) == [config.num_mel_bands, 4],
        f"encoder_type 'conformer' needs patch_size [num_mel_bands, 4] = [{config.num_mel_bands}, 4], the frames that "
        f"its two strided convolutions join, got {config.patch_size}",
    )
    fixed = {"norm": "layernorm", "use_bias": True, "qk_norm": False, "activation": "gelu"}
    for name, value in fixed.items():
        found = getattr(config, name)
        _require(found == value, f"encoder_type 'conformer' needs {name} {value!r}, got {found!r}")
    kernel = config.conformer_kernel_size
    _require(kernel % 2 == 1, f"conformer_kernel_size must be odd, got {kernel}")
