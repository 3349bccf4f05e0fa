"""Safe reading of weights and model folders; nothing is ever unpickled."""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as hub_logging

from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.files import regular_file, write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2PreTrainedModel

# File in a model folder with the training step of its weights.
EXPORTED = "training.json"

# Errors of the readers of safetensors for other files, or for types unknown to PyTorch.
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError)

ModelClass = TypeVar("ModelClass", bound=BestRQ2PreTrainedModel)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file, or of a `.ckpt`/`.pt`/`.pth`/`.bin` file with weights only.

    Raises:
        CheckpointError: if the file is missing, truncated, of another format, or holds pickled objects.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; name a .safetensors or .ckpt file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except UNREADABLE as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); copy or download it again"
            ) from error
    loaded = _read_plain(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(_is_named_tensor(key, value) for key, value in state.items()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return dict(state)


def _read_plain(path: Path) -> Any:
    _refuse_compressed(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes raise any kind of error in the reader of pickles
        raise CheckpointError(
            f"{path}: not a file of plain tensors (it is damaged or holds pickled objects, which are never loaded); "
            "convert it to .safetensors where you trust it"
        ) from error


def _is_named_tensor(key: Any, value: Any) -> bool:
    """Whether it is a named dense tensor in memory: not meta, sparse or quantised, nor expanded by its strides."""
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _refuse_compressed(path: Path) -> None:
    """Refuse a compressed archive, which could fill the memory; PyTorch stores tensors uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return  # loading reports what is wrong
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"{path}: unpacks to {unpacked} bytes, more than its size; convert it to .safetensors")


def write_exported_step(folder: Path, step: int) -> None:
    """Write the training step of the weights into their model folder."""
    write_text(folder / EXPORTED, json.dumps({"step": step}) + "\n")


def exported_step(run: Path) -> int | None:
    """Training step of the weights in a run's model folder; None where it is unknown."""
    try:
        return int(json.loads((run / "model" / EXPORTED).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_model_folder(folder: str | Path, model_class: type[ModelClass]) -> ModelClass:
    """Load a folder in hub format (or a hub id) as the encoder, the whole pretraining model or a classifier.

    Raises:
        CheckpointError: if the folder is not a BEST-RQ-2 model, or its weights are damaged, missing, misshaped, a
            pickle, not finite or not of floating point.
    """
    _check_folder(folder, issubclass(model_class, BestRQ2ForPreTraining))
    try:
        with quiet_hub():
            model, report = model_class.from_pretrained(
                str(folder), output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # foreign settings and bytes raise any kind of error in transformers
        raise CheckpointError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    problems = {kind: sorted(map(str, report.get(f"{kind}_keys") or [])) for kind in ("missing", "unexpected")}
    beyond = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    if model.base_model is not model and beyond <= set(problems["missing"]):
        remedy = "name a run folder or a folder exported with --with-predictor"
        if model_class is BestRQ2ForAudioClassification:
            remedy = "name a run of `bestrq2 finetune`"
        raise CheckpointError(f"{folder}: holds an encoder without the rest of a {model_class.__name__}; {remedy}")
    problems["misshaped"] = sorted(str(key[0]) for key in report.get("mismatched_keys") or [])
    raise_for_keys(str(folder), problems)
    _refuse_integers(model, _headers(_downloaded(folder)) or {}, str(folder))
    refuse_not_finite(model, str(folder))
    # Callers here request what they read, whatever the stored configuration requests for others.
    model.config.return_dict, model.config.output_hidden_states, model.config.output_attentions = True, False, False
    return model.eval()


def load_kept_checkpoint(path: Path, model_class: type[ModelClass]) -> ModelClass:
    """Load the encoder or the whole pretraining model of a checkpoint that a run kept, RUN/checkpoints/step-*.ckpt.

    These are the weights that the run would have exported at that step: averaged ones where it averages.

    Raises:
        CheckpointError: if the file is damaged, or is not of the model in its run folder.
    """
    state = _read_plain(path)
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise CheckpointError(f"{path}: holds no training state")
    weights = state.get("average") or {name.removeprefix("model."): one for name, one in state["state_dict"].items()}
    model = model_class(BestRQ2Config.from_pretrained(str(path.parents[1] / "model"))).eval()
    if not issubclass(model_class, BestRQ2ForPreTraining):
        prefix = f"{model.base_model_prefix}."
        weights = {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is not a checkpoint of the model in {path.parents[1]}") from error
    refuse_not_finite(model, str(path))
    model.config.architectures = [BestRQ2ForPreTraining.__name__]
    return model


def refuse_not_finite(model: nn.Module, source: str) -> None:
    """Refuse a model with weights or buffers that are NaN or infinite.

    Raises:
        CheckpointError: names the first such tensor.
    """
    for name, value in model.state_dict().items():
        # one pass over the memory; NaN is passed on
        if value.numel() and not all(math.isfinite(extreme) for extreme in value.aminmax()):
            raise CheckpointError(
                f"{source}: the tensor '{name}' holds weights that are NaN or infinite; take an earlier checkpoint"
            )


def _refuse_integers(model: BestRQ2PreTrainedModel, headers: Mapping[str, _Header], source: str) -> None:
    """Refuse stored integers where the model has floating point, to which transformers would convert them."""
    prefix = f"{model.base_model_prefix}."
    floating = {name.removeprefix(prefix) for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, header in sorted(headers.items()):
        if name.removeprefix(prefix) in floating and "F" not in header.dtype:
            raise CheckpointError(
                f"{source}: the tensor '{name}' is of type {header.dtype}, expected floating point; export the model "
                "again without quantisation"
            )


def raise_for_keys(source: str, problems: dict[str, list[str]]) -> None:
    """Raise a CheckpointError that lists the tensors of each kind of problem, if there are any."""
    found = [f"{kind} {len(keys)}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        listed = "".join(letter if letter.isprintable() else "?" for letter in "; ".join(found))
        raise CheckpointError(f"{source}: the tensors do not fit the architecture ({listed})")


def refuse_oversized(config: BestRQ2Config, elements: int, source: str, whole: bool) -> None:
    """Refuse a configuration of a model far larger than its weights, before its memory is allocated.

    Args:
        config: the architecture.
        elements: number of values in the weights.
        source: name of the weights in messages.
        whole: whether predictor, head and quantizer are built, too.

    Raises:
        CheckpointError: if the model needs more than eight times as many values, plus a million.
    """
    needed = _model_values(config, whole)
    if needed > 8 * elements + 1_000_000:
        raise CheckpointError(
            f"{source}: the configuration asks for a model of about {needed:.3g} values, but the weights hold "
            f"{elements}; check its sizes"
        )


def refuse_beyond_memory(config: BestRQ2Config, whole: bool) -> None:
    """Refuse an architecture whose random weights would not fit the memory of this machine, before it is allocated.

    Raises:
        ConfigError: the model needs more.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    needed, memory = 4 * _model_values(config, whole), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"the architecture needs about {needed / 1e9:.3g} GB for its weights, and this machine has "
            f"{memory / 1e9:.3g} GB of memory; check its sizes"
        )


def _model_values(config: BestRQ2Config, whole: bool) -> int:
    """About the number of values in a model, without norms and biases."""

    def blocks(count: int, width: int, intermediate: int) -> int:
        return count * (4 * width * width + 2 * width * intermediate)

    width, bands = config.hidden_size, config.num_mel_bands
    needed = blocks(config.num_hidden_layers, width, config.intermediate_size) + config.patch_values * width + bands
    if config.position_embedding == "learned":
        needed += config.patch_rows * config.max_columns * width
    if config.encoder_type == "conformer":
        channels = config.conformer_channels
        needed += 9 * channels[0] * (channels[1] + 1) + channels[1] * bands * width
        needed += config.num_hidden_layers * config.conformer_kernel_size * width
    if whole:
        last = config.hidden_size
        if config.objective == "two_step":
            last = config.predictor_hidden_size
            needed += blocks(config.predictor_num_layers, last, config.predictor_intermediate_size) + width * last
            if config.position_embedding == "learned":
                needed += config.patch_rows * config.max_columns * last
        codes = config.codebook_size * (config.codebook_dim + last)
        needed += config.num_codebooks * (codes + config.patch_values * config.codebook_dim)
    return needed


class _Header(NamedTuple):
    """Size and type ("F32", "I8", ...) of a stored tensor."""

    values: int
    dtype: str


def _headers(folder: Path) -> dict[str, _Header] | None:
    """Headers of the tensors in a folder's weights; None where one cannot be read."""
    found: dict[str, _Header] = {}
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    stored = file.get_slice(key)
                    found[key] = _Header(math.prod(stored.get_shape()), stored.get_dtype())
    except UNREADABLE:
        return None
    return found


def _downloaded(folder: str | Path) -> Path:
    """The folder itself, or that of a hub id in the cache of the hub's client."""
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(str(folder), "config.json")
    return Path(config).parent if isinstance(config, str) else Path(folder)


def _check_folder(folder: str | Path, whole: bool) -> None:
    path = Path(folder)
    if not path.is_dir():
        return  # a hub id
    for file in (*path.glob("*.json"), *path.glob("*.safetensors")):
        try:
            regular_file(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); export the model again") from error
    config_file = path / "config.json"
    if not config_file.is_file():
        if (path / "model.onnx").is_file():
            raise CheckpointError(
                f"{folder}: holds an ONNX graph, which onnxruntime runs; name the model that it was exported from"
            )
        raise CheckpointError(f"{folder}: no config.json in it; name a run folder or an exported model folder")
    try:
        config: Any = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_file}: expected a mapping of settings, found {type(config).__name__}")
        if config.get("model_type") != BestRQ2Config.model_type:
            raise CheckpointError(
                f"{config_file}: model_type is {reprlib.repr(config.get('model_type'))}, expected "
                f"{BestRQ2Config.model_type!r}"
            )
        architecture = BestRQ2Config(**{key: value for key, value in config.items() if key != "model_type"})
    except CheckpointError:
        raise
    except Exception as error:  # invalid or deeply nested JSON, or any value under a known key
        raise CheckpointError(f"{config_file}: {first_line(error)}") from error
    if not list(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.glob("*.bin"))
        extra = f"; {pickles[0]} is a pickle, which is never loaded: convert it where you trust it" if pickles else ""
        raise CheckpointError(f"{folder}: no .safetensors weights in it{extra}")
    if (headers := _headers(path)) is not None:
        refuse_oversized(architecture, sum(one.values for one in headers.values()), str(folder), whole)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence progress bars and load reports of transformers, which our own errors replace."""
    bars, level = hub_logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hub_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars:
            hub_logging.enable_progress_bar()
