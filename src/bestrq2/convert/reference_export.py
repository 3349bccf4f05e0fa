"""Our models back into the layout of the reference implementation, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bestrq2.convert.loading import configuration_beside, load_encoder
from bestrq2.convert.reference import is_hub_export, load_reference, load_reference_encoder
from bestrq2.convert.reference_config import HUB_MODEL_TYPE, read_config
from bestrq2.convert.reference_layout import (
    fixed_tensors,
    reference_key,
    reference_shape,
    rotary_frequencies,
    transformers,
)
from bestrq2.convert.weights import UNREADABLE, load_model_folder
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.files import check_writable, disk_errors, whole_file, write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2Model
from bestrq2.model.transformer import TransformerShape

# Fields of which the reference knows one value only; those of the encoder, and those of its pretraining.
_ENCODER_ONLY_VALUE = {"encoder_type": "vit", "input_normalization": "none"}
_PRETRAINING_ONLY_VALUE = {
    "quantizer_normalization": "none",
    "num_codebooks": 1,
    "mask_shape": "uniform",
    "masks_per_clip": 1,
    "predictor_context_positions": False,
}


def export_reference(source: str, output: Path) -> Path:
    """Write a model as a checkpoint of the reference implementation.

    What `bestrq2.load_reference` reads from it is the same model bit for bit, and a reference checkpoint that was
    loaded comes back as it was. Buffers that follow from the configuration (window, mel filters, position tables,
    rotary frequencies) are not kept by our models; they are worked out anew as the reference does, in float32, so where
    another processor once rounded one of them differently, its last bit follows this machine.

    Args:
        source: a run, a model folder, a reference checkpoint with its configuration beside it, a hub id or a recipe.
            With predictor and quantizer it becomes the research module's state dict, otherwise the encoder alone.
        output: a `.safetensors` file; the configuration is written beside it as `.json`: the research module's, or for
            an encoder alone that of a hub export (`model_type: audio_embeddings`).

    Returns:
        `output`.

    Raises:
        ConfigError: if the reference cannot express the model (the field is named), or `output` cannot be written.
        CheckpointError: if the source cannot be loaded.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: a reference checkpoint is written as .safetensors; name such a file")
    check_writable(output)
    model = _load(source)
    config = model.config
    whole = isinstance(model, BestRQ2ForPreTraining)
    _refuse_inexpressible(config, whole)
    with disk_errors(output):
        write_text(output.with_suffix(".json"), json.dumps(reference_config(config, whole), indent=1) + "\n")
        with whole_file(output) as temporary:
            save_file(reference_state(model), temporary, metadata={"format": "pt"})
    return output


def _load(source: str) -> BestRQ2ForPreTraining | BestRQ2Model:
    """The whole pretraining model where the source holds one, else its encoder."""
    path = Path(source)
    if path.is_file():
        config = configuration_beside(path)
        if read_config(config).get("model_type") is None:
            return load_reference(path, config)
        return load_reference_encoder(path, config)
    folder = path / "model" if (path / "model").is_dir() else path
    if folder.is_dir() and not is_hub_export(folder) and _holds_quantizer(folder):
        return load_model_folder(folder, BestRQ2ForPreTraining)
    return load_encoder(source)


def _holds_quantizer(folder: Path) -> bool:
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                if any(key.startswith("quantizer.") for key in file.keys()):  # noqa: SIM118
                    return True
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error}); copy or export them again") from error
    return False


def _refuse_inexpressible(config: BestRQ2Config, whole: bool) -> None:
    """Raise for the first field whose value the reference has no word for."""
    for name, known in (_ENCODER_ONLY_VALUE | (_PRETRAINING_ONLY_VALUE if whole else {})).items():
        found = getattr(config, name)
        if found != known:
            raise ConfigError(f"{name} is {found!r}: the reference's layout knows only {known!r}; export as hf instead")
    if config.position_embedding == "learned":
        raise ConfigError("position_embedding is 'learned': the layout has only tables and rotation; export as hf")


def reference_state(model: BestRQ2ForPreTraining | BestRQ2Model) -> dict[str, Tensor]:
    """The state dict that the reference module with the same weights has, its fixed buffers included."""
    config = model.config
    whole = isinstance(model, BestRQ2ForPreTraining)
    before = "" if whole else "bestrq2."
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if "statistics." not in key:
            shape = reference_shape(before + key, value.shape, config)
            state[reference_key(before + key, config)] = value.reshape(shape)
    if config.activation == "swiglu":
        _name_gates(state)
    state |= {key: fixed.value() for key, fixed in fixed_tensors(config, whole).items()}
    for part, sizes in transformers(config, whole).items():
        places = [f"{part}.rope", *(f"{part}.blocks.{block}.attn.rope" for block in range(sizes.layers))]
        for name, frequencies in rotary_frequencies(config, sizes).items():
            state |= {f"{place}.{name}": frequencies for place in places}
    # Tensors that share memory cannot be saved.
    return {key: value.detach().to("cpu").clone().contiguous() for key, value in sorted(state.items())}


def _name_gates(state: dict[str, Tensor]) -> None:
    """Give gate and value of SwiGLU each their name, the one spelling that leaves no question of order."""
    for key in [key for key in state if ".mlp.fc1." in key]:
        gate, value = state.pop(key).chunk(2)
        state[key.replace(".fc1.", ".fc1_g.")], state[key.replace(".fc1.", ".fc1_x.")] = gate, value


def reference_config(config: BestRQ2Config, whole: bool) -> dict[str, Any]:
    """The configuration of the research module, or of a hub export where there is only the encoder."""
    size = [config.num_mel_bands, config.columns(config.max_samples) * config.patch_size[1]]
    spectrogram = {
        "sample_rate": config.sampling_rate,
        "n_fft": config.n_fft,
        "win_length": config.win_length,
        "hop_length": config.hop_length,
        "n_mels": config.num_mel_bands,
        "f_min": config.mel_min_hz,
        "f_max": config.mel_max_hz,
        "power": 2.0,
    }
    patch = {"img_size": size, "patch_size": config.patch_size, "in_chans": 1, "embed_dim": config.hidden_size}
    parts = {part: _transformer(config, sizes, size) for part, sizes in transformers(config, whole).items()}
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
    if int(ratio * sizes.width) != sizes.intermediate:  # the reference drops what lies behind the point
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
    # Words of our own, only where the published code has none.
    if config.activation != "gelu":
        fields["act_layer"] = config.activation
    if config.norm != "layernorm" or not config.use_bias:
        fields["norm_layer"] = config.norm
    if config.norm != "layernorm" or config.norm_eps != 1e-5:
        fields["norm_eps"] = config.norm_eps
    if config.qk_norm:
        fields["qk_norm"] = True
    return fields
