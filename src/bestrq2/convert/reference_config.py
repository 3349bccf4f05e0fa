"""Configuration of the reference implementation: translation into ours and back.

Every field is used, known to be without effect, or refused by name.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from bestrq2.errors import ConfigError
from bestrq2.files import regular_file
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.transformer import TransformerShape
from bestrq2.text import nearest

HUB_MODEL_TYPE = "audio_embeddings"


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


_TRANSFORMER = _names(
    "embed_dim depth num_heads mlp_ratio qkv_bias drop_rate attn_drop_rate drop_path_rate num_patches img_size "
    "patch_size pos_embed_type"
)
# Fields of our own for a release whose configuration is not public: what its tensors do not show must be given in them.
_ADDED = _names("norm_layer norm_eps qk_norm act_layer swiglu_gate")
_FIELDS = {
    "spectrogram": _names(
        "sample_rate n_fft win_length win_length_ms hop_length hop_length_ms n_mels f_min f_max power"
    ),
    "patch_embed": _names("img_size patch_size in_chans embed_dim"),
    "masking": _names("input_size patch_size mask_ratio"),
    "encoder": _TRANSFORMER | _ADDED,
    "predictor": (_TRANSFORMER | _ADDED) - {"swiglu_gate"},  # the encoder's holds for both
}
_MODULE = _names("net vocab_size codebook_dim spectrogram_adjustment_mode")
# Settings of training and logging, without effect on what a loaded model computes.
_MODULE_HARMLESS = _names(
    "_target_ optimizer scheduler criterion warmup_pct final_lr_ratio ema ema_decay ema_end_decay ema_anneal_end_step "
    "grid"
)
_HUB = _names(
    "encoder_kwargs patch_embed_kwargs spectrogram_kwargs sampling_rate spectrogram_adjustment_mode hidden_size "
    "model_target"
)
# `extraction_preset`: how the release cuts and pools audio around the encoder; the others belong to transformers.
_HUB_HARMLESS = _names(
    "extraction_preset model_type architectures auto_map custom_pipelines dtype torch_dtype transformers_version "
    "return_dict output_hidden_states output_attentions problem_type id2label label2id chunk_size_feed_forward "
    "is_encoder_decoder"
)


@dataclass(frozen=True)
class Section:
    """One part of a configuration, with typed access; errors name the field in full."""

    name: str
    values: Mapping[str, Any]

    def field(self, name: str) -> str:
        """Full name of a field, for messages."""
        return f"{self.name}.{name}" if self.name else name

    def refuse(self, name: str, expected: str) -> ConfigError:
        """The error for a field with an unexpected value."""
        return _does_not_fit(f"{self.field(name)} is {reprlib.repr(self.values.get(name))}, {expected}")

    def number(self, name: str, default: float) -> float:
        """A finite number; `default` where the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
            raise self.refuse(name, "expected a number")
        return float(value)

    def whole(self, name: str, default: int) -> int:
        """A whole number."""
        value = self.number(name, default)
        if value != int(value):
            raise self.refuse(name, "expected a whole number")
        return int(value)

    def pair(self, name: str, default: tuple[float, float]) -> tuple[float, float]:
        """A pair of numbers; a single number stands for both."""
        value = self.values.get(name)
        if value is None:
            return default
        parts = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(parts) != 2:
            raise self.refuse(name, "expected a pair of numbers")
        first, second = (Section(self.field(name), {"part": part}).number("part", math.nan) for part in parts)
        if math.isnan(first + second):
            raise self.refuse(name, "expected a pair of numbers")
        return first, second

    def word(self, name: str) -> str | None:
        """A name without module path, case and punctuation: `rmsnorm` for `torch.nn.RMSNorm`."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.refuse(name, "expected a name")
        return re.sub(r"[^a-z0-9_]", "", value.rsplit(".", 1)[-1].lower())

    def check(self, name: str, expected: Any, because: str) -> None:
        """Refuse a field with another value than `expected`; a missing field is accepted."""
        value = self.values.get(name)
        value = list(value) if isinstance(value, tuple) else value
        if value is not None and value != expected:
            raise self.refuse(name, f"{because} {expected}")


@dataclass(frozen=True)
class ReferenceConfig:
    """Sections of a reference configuration, from any of its forms.

    Attributes:
        module: fields beside the network.
        parts: spectrogram, patch_embed, masking, encoder, predictor.
        whole: whether it describes a pretraining module rather than an exported encoder.
    """

    module: Section
    parts: dict[str, Section]
    whole: bool


def read_config(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a configuration from a mapping, or from a JSON or YAML file.

    Raises:
        ConfigError: if the file cannot be read or holds no mapping.
    """
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    try:
        text = regular_file(path).read_text(encoding="utf-8")
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: does not exist; name the JSON or YAML file of the checkpoint's settings") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: cannot be read as JSON or YAML: {first}") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path}: expected a mapping with the key 'net', found {type(loaded).__name__}")
    return loaded


def split_config(config: Mapping[str, Any]) -> ReferenceConfig:
    """Split a configuration into its sections and refuse unknown fields.

    Args:
        config: configuration of the research module (`net` with its parts, alone or under `model`, or the parts
            themselves), or config.json of a hub export.

    Raises:
        ConfigError: for an unknown field, or a part that is not a mapping.
    """
    if config.get("model_type") is not None:
        if config["model_type"] != HUB_MODEL_TYPE:
            raise _does_not_fit(f"model_type is {reprlib.repr(config['model_type'])}, expected {HUB_MODEL_TYPE!r}")
        module = Section("", {name: value for name, value in config.items() if not str(name).startswith("_")})
        _refuse_unknown(module, _HUB | _HUB_HARMLESS)
        parts = {part: _part(f"{part}_kwargs", config.get(f"{part}_kwargs"), part) for part in _FIELDS}
        return ReferenceConfig(module, parts, whole=False)
    prefix = ""
    if isinstance(config.get("model"), Mapping):
        config, prefix = config["model"], "model."  # the configuration of a whole run
    module = Section(prefix.removesuffix("."), config)
    net: Any = config
    if "net" in config or not _FIELDS.keys() & config.keys():
        net, prefix = config.get("net") or {}, f"{prefix}net."
        if not isinstance(net, Mapping):
            raise _does_not_fit(f"{prefix[:-1]} is {reprlib.repr(net)}, expected a mapping")
        _refuse_unknown(module, _MODULE | _MODULE_HARMLESS)
        _refuse_unknown(Section(prefix[:-1], net), frozenset(_FIELDS))
    else:
        _refuse_unknown(module, _MODULE | _MODULE_HARMLESS | _FIELDS.keys())
    return ReferenceConfig(module, {part: _part(prefix + part, net.get(part), part) for part in _FIELDS}, whole=True)


def _part(name: str, values: Any, part: str) -> Section:
    if values is not None and not isinstance(values, Mapping):
        raise _does_not_fit(f"{name} is {reprlib.repr(values)}, expected a mapping")
    section = Section(name, values or {})
    _refuse_unknown(section, _FIELDS[part])
    return section


def _refuse_unknown(section: Section, known: frozenset[str]) -> None:
    for name, value in section.values.items():
        if name not in known:
            hint = nearest(str(name)[:80], sorted(known)) or "; remove it if it does not affect the model"
            found = f"{section.field(reprlib.repr(name).strip(chr(39)))} ({reprlib.repr(value)})"
            raise _does_not_fit(f"{found} is not a known field{hint}")


def _does_not_fit(problem: str) -> ConfigError:
    return ConfigError(f"the reference's configuration does not fit: {problem}")


def translate(config: ReferenceConfig, state: Mapping[str, Tensor]) -> BestRQ2Config:
    """Translate a reference configuration into ours, with the facts that only its tensors show.

    Args:
        config: the reference's; missing fields have the values of the paper.
        state: its tensors without prefix, SwiGLU as `join_gates` leaves it.

    Raises:
        ConfigError: for a field that asks for something unsupported, or contradicts the tensors.
    """
    try:
        return BestRQ2Config(**_settings(config, state))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _does_not_fit(str(error)) from error


def _settings(config: ReferenceConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our fields for the reference's."""
    module, masking = config.module, config.parts["masking"]
    patch, encoder, predictor = (config.parts[part] for part in ("patch_embed", "encoder", "predictor"))
    module.check("spectrogram_adjustment_mode", "truncate", "only whole patches count here:")
    patch.check("in_chans", 1, "the spectrogram has one channel:")
    spectrogram = _spectrogram_settings(config.parts["spectrogram"], module)
    frames = patch.pair("img_size", (128, 256))[1]
    two_step = config.whole and any(key.startswith("predictor.") for key in state)
    width, heads = encoder.whole("embed_dim", 768), encoder.whole("num_heads", 12)
    if not config.whole:
        _check_export(module, encoder, config.parts["spectrogram"], width)
    sections = {"encoder": encoder} | ({"predictor": predictor} if two_step else {})
    kinds = {part: _block_settings(section, part, state) for part, section in sections.items()}
    for part, kind in kinds.items():
        if "pos_embed_type" in encoder.values:
            sections[part].check("pos_embed_type", encoder.values["pos_embed_type"], "the encoder's is")
        if kind != kinds["encoder"]:
            names = [name for name in kind if kind[name] != kinds["encoder"][name]]
            raise _does_not_fit(f"{sections[part].name} differs from {encoder.name} in {', '.join(names)}")
    return {
        **spectrogram,
        **kinds["encoder"],
        "max_seconds": frames * spectrogram["hop_length"] / spectrogram["sampling_rate"],
        "patch_size": [int(size) for size in patch.pair("patch_size", (16, 16))],
        "hidden_size": width,
        "num_hidden_layers": encoder.whole("depth", 12),
        "num_attention_heads": heads,
        "intermediate_size": _intermediate(encoder, "encoder", width, state),
        "position_embedding": _positions(encoder, state, spectrogram["num_mel_bands"], patch),
        "drop_path_rate": encoder.number("drop_path_rate", 0.1),
        "codebook_size": module.whole("vocab_size", 8192),
        "codebook_dim": module.whole("codebook_dim", 16),
        "mask_ratio": list(masking.pair("mask_ratio", (0.4, 0.6))),
        **(_predictor_settings(predictor, width, heads, two_step, state) if config.whole else {}),
    }


def _predictor_settings(
    predictor: Section, width: int, heads: int, two_step: bool, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    predictor.check("drop_path_rate", 0.0, "the predictor has no stochastic depth:")
    predictor_width = predictor.whole("embed_dim", width)
    return {
        "objective": "two_step" if two_step else "one_stage",
        "predictor_hidden_size": predictor_width,
        "predictor_num_layers": predictor.whole("depth", 4),
        "predictor_num_attention_heads": predictor.whole("num_heads", heads),
        "predictor_intermediate_size": _intermediate(predictor, "predictor", predictor_width, state),
    }


def _check_export(module: Section, encoder: Section, spectrogram: Section, width: int) -> None:
    """Check fields that a hub export repeats, and those that it must have because no tensor shows them."""
    module.check("hidden_size", width, f"{encoder.field('embed_dim')} is")
    target = module.word("model_target")
    if target is not None and "bestrq" not in target.replace("_", ""):
        raise module.refuse("model_target", "expected a module of BEST-RQ")
    if "num_heads" not in encoder.values:
        raise encoder.refuse("num_heads", "expected the number of heads: no tensor shows it")
    if not {"hop_length", "hop_length_ms"} & spectrogram.values.keys():
        raise spectrogram.refuse("hop_length_ms", "expected the milliseconds between frames: no tensor shows them")


def _spectrogram_settings(spectrogram: Section, module: Section) -> dict[str, Any]:
    if spectrogram.number("power", 2.0) != 2.0:
        raise spectrogram.refuse("power", "only 2.0 (power) is supported")
    rate = spectrogram.whole("sample_rate", module.whole("sampling_rate", 16_000))
    module.check("sampling_rate", rate, f"{spectrogram.field('sample_rate')} is")

    def samples(name: str, milliseconds: float) -> int:
        # As in the reference, samples override milliseconds, and fractions of a sample are dropped.
        return spectrogram.whole(name, _floor(rate * spectrogram.number(f"{name}_ms", milliseconds) / 1000))

    return {
        "sampling_rate": rate,
        "n_fft": spectrogram.whole("n_fft", 2048),
        "win_length": samples("win_length", 128),
        "hop_length": samples("hop_length", 39.0625),
        "num_mel_bands": spectrogram.whole("n_mels", 128),
        "mel_min_hz": spectrogram.number("f_min", 0.0),
        "mel_max_hz": spectrogram.number("f_max", rate / 2),
    }


def _floor(value: float) -> int:
    """The whole part of a number, robust to rounding just below a whole number."""
    return round(value) if abs(value - round(value)) < 1e-6 else int(value)


def _block_settings(section: Section, part: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the blocks, read from their tensors; fields may confirm them, and give what tensors do not show."""
    for name in ("drop_rate", "attn_drop_rate"):
        section.check(name, 0.0, "there is no dropout here:")
    block = {key.removeprefix(f"{part}.blocks.0."): value for key, value in state.items()}
    use_bias, qk_norm, gated = "attn.proj.bias" in block, "attn.q_norm.weight" in block, _is_gated(part, state)
    section.check("qkv_bias", use_bias, "by the tensors it is")
    section.check("qk_norm", qk_norm, "by the tensors it is")
    if section.word("act_layer") not in (None, *(("silu", "swiglu") if gated else ("gelu",))):
        raise section.refuse("act_layer", f"by the tensors it is {'swiglu' if gated else 'gelu'}")
    norm = section.word("norm_layer")
    if norm not in (None, "layernorm", "rmsnorm"):
        raise section.refuse("norm_layer", "expected layernorm or rmsnorm")
    if norm is None:
        if "norm1.weight" in block and "norm1.bias" not in block:
            raise section.refuse("norm_layer", "expected rmsnorm or layernorm: norms without bias may be either")
        norm = "layernorm"
    if norm == "rmsnorm" and "norm_eps" not in section.values:
        raise section.refuse("norm_eps", "expected the epsilon of the RMSNorm: no tensor shows it")
    return {
        "use_bias": use_bias,
        "qk_norm": qk_norm,
        "activation": "swiglu" if gated else "gelu",
        "norm": norm,
        "norm_eps": section.number("norm_eps", 1e-5),
    }


def _is_gated(part: str, state: Mapping[str, Tensor]) -> bool:
    first, second = (state.get(f"{part}.blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return first is not None and second is not None and first.shape[:1] == (2 * second.shape[-1],)


def _intermediate(section: Section, part: str, width: int, state: Mapping[str, Tensor]) -> int:
    """Hidden width of the feed-forward layers; with a gate the tensors show it, as the ratio may count both halves."""
    stated = _floor(width * section.number("mlp_ratio", 4.0))
    if not _is_gated(part, state):
        return stated
    found = state[f"{part}.blocks.0.mlp.fc2.weight"].shape[-1]
    if "mlp_ratio" in section.values and found not in (stated, stated * 2 // 3):
        raise section.refuse("mlp_ratio", f"by the tensors the gated width is {found}")
    return found


def _positions(encoder: Section, state: Mapping[str, Tensor], bands: int, patch: Section) -> str:
    kind = encoder.word("pos_embed_type")
    if kind not in (None, "sincos", "rope", "rope_2d", "rope_time"):
        raise encoder.refuse("pos_embed_type", "expected sincos, rope, rope_2d or rope_time")
    if kind is None:
        kind = "sincos" if "encoder.pos_embed" in state else "rope"
    if kind != "rope":
        return kind
    frequencies = {key.rsplit(".", 1)[1] for key in state if key.startswith("encoder.") and ".rope." in key}
    if frequencies == {"inv_freq_h", "inv_freq_w"}:
        return "rope_2d"
    one_row = patch.pair("patch_size", (16, 16))[0] == bands
    if frequencies == {"inv_freq_t"} or (one_row and frequencies in ({"inv_freq"}, {"inv_freq_w"})):
        return "rope_time"
    found = ", ".join(sorted(frequencies)) or "no positions"
    raise encoder.refuse("pos_embed_type", f"expected sincos, rope_2d or rope_time: among the tensors are {found}")


def check_repeated_fields(config: ReferenceConfig, model: BestRQ2Config) -> None:
    """Refuse redundant fields that contradict others."""
    columns = model.columns(model.max_samples)
    bands, rows = model.num_mel_bands, model.patch_rows
    patch, masking = config.parts["patch_embed"], config.parts["masking"]
    size = [bands, columns * model.patch_size[1]]
    patch.check("embed_dim", model.hidden_size, "the encoder's width is")
    for section, name in ((patch, "img_size"), (masking, "input_size")):
        if section.pair(name, (bands, 0))[0] != bands:
            raise section.refuse(name, f"the mel bands are {bands}")
    masking.check("patch_size", model.patch_size, "the patches are")
    for section in (config.parts["encoder"], config.parts["predictor"]):
        section.check("num_patches", rows * columns, "the grid has")
        section.check("patch_size", model.patch_size, "the patches are")
        section.check("img_size", size, "the spectrogram is")


# Fields for which the reference knows one value only: those of the encoder, and those of its pretraining.
_ENCODER_ONLY_VALUE = {"encoder_type": "vit", "input_normalization": "none", "short_mel_bands": 0}
_PRETRAINING_ONLY_VALUE = {"quantizer_normalization": "none", "num_codebooks": 1}


_SPECTROGRAM = {
    "sample_rate": "sampling_rate", "n_fft": "n_fft", "win_length": "win_length", "hop_length": "hop_length",
    "n_mels": "num_mel_bands", "f_min": "mel_min_hz", "f_max": "mel_max_hz",
}  # fmt: skip


def part_shapes(config: BestRQ2Config, whole: bool) -> dict[str, TransformerShape]:
    """Sizes of each stack of blocks by the reference's name; `whole` for models that may have a predictor."""
    found = {"encoder": TransformerShape.of_encoder(config)}
    if whole and config.objective == "two_step":
        found["predictor"] = TransformerShape.of_predictor(config)
    return found


def write_config(config: BestRQ2Config, whole: bool) -> dict[str, Any]:
    """Configuration of the research module, or of a hub export for an encoder alone.

    Raises:
        ConfigError: for the first field whose value the reference cannot express.
    """
    for name, known in (_ENCODER_ONLY_VALUE | (_PRETRAINING_ONLY_VALUE if whole else {})).items():
        found = getattr(config, name)
        if found != known:
            raise ConfigError(f"{name} is {found!r}: the reference's layout has only {known!r}; export as hf instead")
    if config.position_embedding == "learned":
        raise ConfigError("position_embedding is 'learned': the layout has only tables and rotation; export as hf")
    size = [config.num_mel_bands, config.columns(config.max_samples) * config.patch_size[1]]
    spectrogram = {theirs: getattr(config, ours) for theirs, ours in _SPECTROGRAM.items()} | {"power": 2.0}
    patch = {"img_size": size, "patch_size": config.patch_size, "in_chans": 1, "embed_dim": config.hidden_size}
    parts = {part: _transformer(config, sizes, size) for part, sizes in part_shapes(config, whole).items()}
    if not whole:
        return {
            "model_type": HUB_MODEL_TYPE,
            "sampling_rate": config.sampling_rate,
            "hidden_size": config.hidden_size,
            "spectrogram_adjustment_mode": "truncate",
            "spectrogram_kwargs": spectrogram,
            "patch_embed_kwargs": patch,
            "encoder_kwargs": parts["encoder"],
        }
    masking = {"input_size": size, "patch_size": config.patch_size, "mask_ratio": config.mask_ratio}
    return {
        "vocab_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "spectrogram_adjustment_mode": "truncate",
        "net": {"spectrogram": spectrogram, "patch_embed": patch, "masking": masking, **parts},
    }


def _transformer(config: BestRQ2Config, sizes: TransformerShape, image: list[int]) -> dict[str, Any]:
    ratio = sizes.intermediate / sizes.width
    if int(ratio * sizes.width) != sizes.intermediate:  # the reference drops the fraction
        ratio = math.nextafter(ratio, math.inf)
    fields: dict[str, Any] = {
        "embed_dim": sizes.width,
        "depth": sizes.layers,
        "num_heads": sizes.heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.use_bias,
        "drop_path_rate": sizes.drop_path_rate,
        "num_patches": config.patch_rows * (image[1] // config.patch_size[1]),
        "img_size": image,
        "patch_size": config.patch_size,
        "pos_embed_type": {"rope_2d": "rope"}.get(config.position_embedding, config.position_embedding),
    }
    # Fields of our own, only where the published code has none.
    if config.activation != "gelu":
        fields["act_layer"] = config.activation
    if config.norm != "layernorm" or not config.use_bias:
        fields["norm_layer"] = config.norm
    if config.norm != "layernorm" or config.norm_eps != 1e-5:
        fields["norm_eps"] = config.norm_eps
    if config.qk_norm:
        fields["qk_norm"] = True
    return fields
