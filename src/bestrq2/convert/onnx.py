"""ONNX export of the encoder, from log-mel spectrogram to frames, for use without torch.

Its front end is `numpy_front_end.py`, which is copied beside the graph.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.convert import numpy_front_end
from bestrq2.convert.loading import load_encoder
from bestrq2.convert.readout import set_readout
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.files import disk_errors, write_folder
from bestrq2.model.attention import Record
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.readout import Readout

logger = logging.getLogger(__name__)

MODEL_FILE, INT8_FILE, FRONT_END_FILE = "model.onnx", "model.int8.onnx", "front_end.py"
INPUTS, OUTPUTS = ("log_mel", "frames_per_clip"), ("frames", "clip", "frame_mask")
TOLERANCE = 1e-4
"""Largest error of the graph, relative to the largest output of torch."""
_OPSET = 18
# Protobuf files are limited to 2 GiB; the graph is small beside the weights.
_MOST_BYTES = 2**31 - 2**24


class SpectrogramEncoder(nn.Module):
    """Log-mel spectrograms to embeddings, with no control flow on values or sizes.

    Patches are indexed in the widest grid, that of a clip of `max_seconds`, so that all positions are constants of the
    graph.
    """

    grid: Tensor

    def __init__(self, model: BestRQ2Model) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.widest = config.columns(config.max_samples)
        grid = torch.arange(config.patch_rows * self.widest).view(config.patch_rows, self.widest)
        self.register_buffer("grid", grid)

    def forward(self, log_mel: Tensor, frames_per_clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed a padded batch.

        Args:
            log_mel: float32 [B, bands, T] in dB; values after the end of a clip are never read.
            frames_per_clip: int64 [B], frames inside each clip, at least one patch.

        Returns:
            frames float32 [B, T', D] and clip float32 [B, D'] of the model's readout, frame_mask bool [B, T'].
        """
        model = self.model
        patches = model.spectrogram_patches(log_mel, frames_per_clip, padded=True)
        places = self.grid[:, : patches.columns].flatten()
        tokens = model.patch_embedding(patches.encoder_input)
        positions = model.encoder.added_positions(self.widest, tokens.device)
        if positions is not None:
            tokens = tokens + positions[places]
        record = Record([])
        states = model.encoder(tokens, self.widest, places[None], patches.valid, record)
        output = model.pooled(states, patches, record.hidden_states)
        return output.last_hidden_state, output.pooler_output, output.frame_attention_mask


def export_onnx(source: str, output: Path, int8: bool = False, readout: Mapping[str, Any] | None = None) -> Path:
    """Export an encoder as a folder that embeds audio with onnxruntime and numpy.

    `model.onnx` maps `log_mel` float32 [batch, bands, frames] in dB and `frames_per_clip` int64 [batch] to `frames`
    float32 [batch, columns, width], `clip` float32 [batch, clip width] and `frame_mask` bool [batch, columns], as wide
    as the readout makes them; batch and frames are free, up to `max_seconds`. Normalisation is part of the graph. Its
    metadata hold the settings of `front_end.py`, which turns audio into its input. Nothing is written unless
    onnxruntime agrees with torch.

    Args:
        source: model as in `bestrq2.load`.
        output: new or empty folder.
        readout: options of `set_readout`; None for the model's own readout.
        int8: also write `model.int8.onnx`, with weights of 8 bits: smaller, with the errors measured in `docs/onnx.md`.

    Returns:
        The folder.

    Raises:
        ConfigError: if onnx is not installed, the encoder is a Conformer or too large, or `output` cannot be written
            or exists.
        CheckpointError: as `bestrq2.load`.
        BestRQ2Error: if the outputs of the graph differ from those of torch.
    """
    _require_packages()
    output = Path(output)
    with disk_errors(output):
        _check_output(output)
    model = load_encoder(source).float()
    set_readout(model, **(readout or {}))
    _check_model(source, model)

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        _write_graph(source, model, folder / MODEL_FILE)
        error = check_graph(model, folder / MODEL_FILE)
        if not error <= TOLERANCE:
            raise BestRQ2Error(
                f"{source}: the ONNX graph is off by {error:.1e} of the largest value, allowed are {TOLERANCE:g}; "
                "nothing was written; try other versions of torch, onnxscript or onnxruntime"
            )
        logger.info("%s: off by at most %.1e of the largest value", MODEL_FILE, error)
        if int8:
            _write_int8(folder / MODEL_FILE, folder / INT8_FILE)
            error = check_graph(model, folder / INT8_FILE)
            if not np.isfinite(error):
                raise BestRQ2Error(f"{source}: with weights of 8 bits embeddings are not finite; export without them")
            logger.info("%s: off by at most %.1e of the largest value", INT8_FILE, error)
        front_end = Path(numpy_front_end.__file__).read_text(encoding="utf-8")
        (folder / FRONT_END_FILE).write_text(front_end, encoding="utf-8")

    with disk_errors(output):
        write_folder(output.absolute(), fill)
    return output


def front_end_settings(config: BestRQ2Config) -> dict[str, Any]:
    """Arguments of `numpy_front_end.FrontEnd` for a model."""
    same = ("sampling_rate", "hop_length", "mel_min_hz", "mel_max_hz", "spectra")
    return {
        **{name: getattr(config, name) for name in same},
        "patch_frames": config.patch_size[1],
        "max_samples": config.max_samples,
        "pooling": Readout.of(config).pooling,
    }


def check_graph(model: BestRQ2Model, path: Path) -> float:
    """Largest error of a graph against torch, relative to the largest output.

    Batches of one to three clips of unequal length, from one sample to `max_seconds`. Infinite where shapes or masks
    differ, or values are not finite.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return max(_error(model, session, lengths) for lengths in _lengths_to_check(model.config))


def _lengths_to_check(config: BestRQ2Config) -> Iterator[list[int]]:
    """Lengths of the clips of each checked batch (samples)."""
    patch, longest = max(1, (config.patch_size[1] - 1) * config.hop_length), config.max_samples
    middle = (patch + longest) // 2
    yield [patch]
    yield [middle + 1]
    yield [patch + 2 * config.hop_length, patch]
    yield [longest, 1, middle - 1]


@torch.inference_mode()
def _error(model: BestRQ2Model, session: Any, lengths: list[int]) -> float:
    waveforms, inside = _sounds(lengths, model.config.sampling_rate)
    expected = model(waveforms, inside)
    log_mel, frames = model.log_mel(waveforms, inside.sum(dim=1))
    # Values after the end of a clip must not matter.
    behind = torch.arange(log_mel.shape[-1]) >= frames[:, None]
    log_mel = log_mel.masked_fill(behind[:, None], 77.0)
    found = session.run(list(OUTPUTS), dict(zip(INPUTS, (log_mel.numpy(), frames.numpy()), strict=True)))
    if not np.array_equal(found[2], expected.frame_attention_mask.numpy()):
        return np.inf
    errors = []
    for output, yardstick in zip(found, (expected.last_hidden_state, expected.pooler_output), strict=False):
        if output.shape != yardstick.shape or not np.isfinite(output).all():
            return np.inf
        errors.append(np.abs(output - yardstick.numpy()).max() / yardstick.abs().max().item())
    return float(max(errors))


def _sounds(lengths: list[int], rate: int) -> tuple[Tensor, Tensor]:
    """Sweeps in swelling noise, padded: float32 [B, S], and bool [B, S], true inside the clips."""
    rng = np.random.default_rng(0)
    seconds = np.arange(max(lengths)) / rate
    sounds = []
    for index in range(len(lengths)):
        sweep = np.sin(2 * np.pi * (150 * (index + 1) + 0.04 * rate * seconds) * seconds)
        noise = rng.standard_normal(len(seconds)) * (1.1 + np.sin(5 * seconds + index))
        sounds.append(0.2 * sweep + 0.03 * noise)
    inside = torch.arange(len(seconds)) < torch.tensor(lengths)[:, None]
    return torch.from_numpy(np.stack(sounds)).float() * inside, inside


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'bestrq2[onnx]'") from error


def _check_output(output: Path) -> None:
    if output.suffix == ".onnx":
        raise ConfigError(f"{output}: an ONNX export is a folder with {MODEL_FILE} in it; name a folder")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; name a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output}: is not empty; name a folder that does not exist yet")


def _check_model(source: str, model: BestRQ2Model) -> None:
    if model.config.encoder_type != "vit":
        raise ConfigError(
            f"{source}: encoder_type is '{model.config.encoder_type}', whose relative positions cannot be exported to "
            "ONNX; export a model with encoder_type 'vit', or use --format hf"
        )
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if size > _MOST_BYTES:
        raise ConfigError(f"{source}: weights of {size / 2**30:.1f} GiB do not fit an ONNX file of at most 2 GiB")


def _write_graph(source: str, model: BestRQ2Model, path: Path) -> None:
    import onnx

    config = model.config
    width, bands = config.patch_size[1], config.num_mel_bands
    encoder = SpectrogramEncoder(model).eval()
    most = width * encoder.widest + width - 1
    example = min(2 * width + 1, most)
    inputs = torch.zeros(2, bands, example), torch.tensor([example, width])
    batch, frames = torch.export.Dim("batch", min=1), torch.export.Dim("frames", min=width, max=most)
    try:
        with _quiet():
            program = torch.onnx.export(
                encoder,
                inputs,
                dynamo=True,
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes=({0: batch, 2: frames}, {0: batch}),
                opset_version=_OPSET,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise BestRQ2Error(f"{source}: torch cannot export this architecture to ONNX: {first}") from error
    assert program is not None  # only without dynamo there is none
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {numpy_front_end.SETTINGS_KEY: json.dumps(front_end_settings(config))})
    onnx.save_model(proto, str(path))
    onnx.checker.check_model(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which reports its passes on every stream; our own checks report what matters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _write_int8(path: Path, output: Path) -> None:
    """Quantise the weights of the blocks; the patch embedding, which reads decibels, keeps its precision."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(path)).graph
    weights = {weight.name for weight in graph.initializer}
    # Nodes are in the order of computation.
    patch_embedding = next(node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights)
    with _quiet():
        quantize_dynamic(
            path,
            output,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 7 bits: with 8, sums overflow on processors without VNNI
            nodes_to_exclude=[patch_embedding],
        )
