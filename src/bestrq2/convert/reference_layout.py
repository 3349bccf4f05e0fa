"""Names, shapes and fixed tensors of the reference's state dicts, for import and export alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq2.errors import CheckpointError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.log_mel import mel_filters
from bestrq2.model.transformer import TransformerShape

# The patch embedding's weight: every reference module has it, so it tells what stands before all keys.
ANCHOR = "patch_embed.patch_embed.proj.weight"
# Types that float32 holds exactly; a checkpoint's tensors must be of one of them.
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
WINDOW, FILTERS = "spectrogram.mel_spec.spectrogram.window", "spectrogram.mel_spec.mel_scale.fb"

_RENAMED = (
    ("bestrq2.encoder.", "encoder."),
    ("bestrq2.patch_embedding.", "patch_embed.patch_embed.proj."),
    ("predictor_input.", "predictor_input_proj."),
    ("quantizer.projection", "quantizer.P"),
    ("quantizer.codebook", "quantizer.CB"),
)


def reference_key(key: str, config: BestRQ2Config) -> str:
    """The reference's name of one tensor of our pretraining model."""
    head = "rq_proj." if config.objective == "two_step" else "output_proj."
    for ours, theirs in (*_RENAMED, ("head.", head)):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def reference_shape(key: str, shape: torch.Size, config: BestRQ2Config) -> list[int]:
    """The shape that one of our tensors has in the reference, which holds the same values in the same order."""
    if key == "bestrq2.patch_embedding.weight":
        return [shape[0], 1, *config.patch_size]  # a convolution over whole patches is a linear map
    return list(shape[1:] if key.startswith("quantizer.") else shape)


@dataclass(frozen=True)
class FixedTensor:
    """A buffer that follows from the configuration; worked out only when asked for, as its size may be nonsense."""

    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def transformers(config: BestRQ2Config, whole: bool) -> dict[str, TransformerShape]:
    """Sizes of each stack of blocks by the reference's name; `whole` says whether a predictor may be among them."""
    found = {"encoder": TransformerShape.of_encoder(config)}
    if whole and config.objective == "two_step":
        found["predictor"] = TransformerShape.of_predictor(config)
    return found


def fixed_tensors(config: BestRQ2Config, whole: bool) -> dict[str, FixedTensor]:
    """Window, mel filters and sine-cosine tables, float32, by the reference's names."""
    bands = (config.num_mel_bands, config.mel_min_hz, config.mel_max_hz, config.sampling_rate)
    fixed = {
        WINDOW: FixedTensor((config.win_length,), lambda: torch.hann_window(config.win_length)),
        FILTERS: FixedTensor(
            (config.n_fft // 2 + 1, config.num_mel_bands),
            lambda: mel_filters(config.n_fft, *bands, torch.device("cpu")),
        ),
    }
    if config.position_embedding == "sincos":
        rows, columns = config.patch_rows, config.columns(config.max_samples)
        for part, shape in transformers(config, whole).items():
            fixed[f"{part}.pos_embed"] = FixedTensor(
                (1, rows * columns, shape.width),
                lambda width=shape.width: _sine_cosine(rows, columns, width),  # type: ignore[misc]
            )
    return fixed


def _sine_cosine(rows: int, columns: int, width: int) -> Tensor:
    """Our `sine_cosine_positions` in float32 from end to end, which gives the last bits that the reference stores."""
    quarter = width // 4
    frequencies = 1.0 / 10_000.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    row = torch.arange(rows, dtype=torch.float32)[:, None, None] * frequencies
    column = torch.arange(columns, dtype=torch.float32)[None, :, None] * frequencies
    size = (rows, columns, quarter)
    angles = torch.cat([row.expand(size), column.expand(size)], dim=-1).flatten(0, 1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[None]


def rotary_frequencies(config: BestRQ2Config, shape: TransformerShape) -> dict[str, Tensor]:
    """Rotary frequencies of one stack of blocks, float32, by the last part of their names; none without rotation.

    In two dimensions the rows (`h`) and the columns (`w`) turn half of a head each. With time alone all of it turns.
    """
    if not config.position_embedding.startswith("rope"):
        return {}
    two_dimensional = config.position_embedding == "rope_2d"
    turned = shape.width // shape.heads // (2 if two_dimensional else 1)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    names = ("inv_freq_h", "inv_freq_w") if two_dimensional else ("inv_freq_t",)
    return dict.fromkeys(names, frequencies)


# Feed-forward parts with a gate, whose names alone say which matrix is which: (gate, value, output).
_SEPARATE = (("fc1_g", "fc1_x", "fc2"), ("gate_proj", "up_proj", "down_proj"))
_FEED_FORWARD = re.compile(r"((?:encoder|predictor)\.blocks\.\d+\.mlp)\.(\w+)\.(weight|bias)")


def join_gates(state: Mapping[str, Tensor], gate: str | None, gate_field: str) -> dict[str, Tensor]:
    """Bring every spelling of SwiGLU that is unambiguous to our own: `fc1` with the gate in its first half, `fc2`.

    The layout of the release with SwiGLU (BEST-RQ-2.1) was never seen. A wrong order of gate and value still loads and
    embeds, only badly, so each spelling is taken only where name and shape leave one reading:

    - `fc1_g`, `fc1_x`, `fc2` (timm) and `gate_proj`, `up_proj`, `down_proj` (Llama in transformers) say it themselves.
    - `w1`, `w2`, `w3`: wherever these names are used `w1` is the gate; of the others, the output is the one whose rows
      are the model's width (Llama: `w2`, DINOv3: `w3`). Where both are square nothing tells them apart.
    - `w12`, `w3` (DINOv2, xformers): the first half of `w12` is the gate by definition of that layer.
    - `fc1`, `fc2` with twice as many rows in `fc1` as columns in `fc2`: timm alone has both orders under these names
      (`GluMlp` with `gate_last` true and false), so the configuration must say which.

    Args:
        state: the reference's state dict without prefix.
        gate: where a packed `fc1` has its gate, "first" or "last"; None where the configuration does not say.
        gate_field: how messages name the field of `gate`.

    Raises:
        CheckpointError: for an order that nothing tells.
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
    """Replace the tensors of one kind in one feed-forward part; what fits no spelling stays and is reported later."""

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
                    f"'{key('fc1')}' {list(first)} holds gate and value of a SwiGLU, and nothing says in which order; "
                    f"where you know it, say {gate_field}: first or last"
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
    return tensor.dtype in WEIGHTS and tensor.ndim > 0


def _by_shape(names: set[str], rows_and_columns: Callable[[str], tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Spellings with numbered matrices, (gate, value, output) or (both, output)."""
    if names == {"w12", "w3"}:
        yield "w12", "w3"
    if names == {"w1", "w2", "w3"}:
        width_last = rows_and_columns("w1")[::-1]
        outputs = [name for name in ("w2", "w3") if rows_and_columns(name) == width_last]
        if len(outputs) == 1:
            yield "w1", "w3" if outputs == ["w2"] else "w2", outputs[0]
