"""Readout of an encoder: from the states of patches to frames, and from frames to one vector per clip."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from .fields import ModelFields
from .kernels import to_device
from .packing import Packing

Layers: TypeAlias = "int | str | Sequence[int]"
Groups: TypeAlias = tuple[tuple[tuple[int | None, float], ...], ...]

FREQUENCIES = ("mean", "concat")
# A deviation of 0 has no gradient.
_LEAST_VARIANCE = 1e-20
_LAYER = re.compile(r"(output|-?\d+)(?::(\d+\.?\d*|\.\d+))?")


@dataclass(frozen=True)
class Readout:
    """What frames and clips are made of; `BestRQ2Config.readout` holds the settings that differ from the defaults.

    Attributes:
        layers: "output" (after the final norm), the number of a layer (0 is the input of the first block, n the output
            of block n, -1 that of the last before the final norm), "mean" (of all blocks), or several layers: "3,6"
            averages them, "3:0.2,6:0.8" with weights, which are divided by their sum, and "3+6" concatenates them.
        frequency: what a frame holds of the rows of patches along frequency: their "mean", or "concat", all of them
            one after the other, lowest band first.
        pooling: what a clip holds of its frames: "mean", "std" (standard deviation), "max", "quarters" (means of the
            four quarters of the clip), "attention" (weighted mean, see `pool`), or several concatenated: "mean+std".
        groups: weights of the layers in every concatenated part, with their indices into the hidden states, None for
            the output; they follow from `layers`.
    """

    layers: str = "output"
    frequency: str = "mean"
    pooling: str = "mean"
    groups: Groups = field(default=(((None, 1.0),),), repr=False)

    @classmethod
    def of(
        cls,
        config: ModelFields,
        layers: Layers | None = None,
        frequency: str | None = None,
        pooling: str | None = None,
    ) -> Readout:
        """The readout of a model, with the settings that are not None in place of its own.

        Args:
            config: a `BestRQ2Config`, or fields, whose readout is the default.
            layers: as the attribute; a list of numbers averages these layers.
            frequency: as the attribute.
            pooling: as the attribute.

        Raises:
            ValueError: unknown setting, or the encoder has no such layer.
        """
        given = {"layers": layers, "frequency": frequency, "pooling": pooling}
        settings = {**(getattr(config, "readout", None) or {})}
        settings |= {name: value for name, value in given.items() if value is not None}
        text = _as_text(settings.get("layers", cls.layers))
        groups = None if text is None else _groups(text, config.num_hidden_layers)
        if text is None or groups is None:
            blocks = config.num_hidden_layers
            raise ValueError(
                f"layers must be 'output', 'mean' or whole numbers from {-blocks - 1} to {blocks} (0 is the input of "
                f"the first of {blocks} blocks), averaged as in '0,{blocks}' or '0:0.3,{blocks}:0.7' or concatenated "
                f"as in '0+{blocks}', got {settings['layers']!r:.80}"
            )
        readout = cls(**{**settings, "layers": text, "groups": groups})
        if readout.frequency not in FREQUENCIES:
            raise ValueError(f"frequency must be one of {', '.join(FREQUENCIES)}, got {readout.frequency!r}")
        parts = readout.pooling.split("+") if isinstance(readout.pooling, str) else []
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(_POOLINGS):
            raise ValueError(
                f"pooling must be one of {', '.join(_POOLINGS)}, or several joined by +, such as mean+std, "
                f"got {readout.pooling!r}"
            )
        return readout

    def settings(self) -> dict[str, str]:
        """All settings by name."""
        return {"layers": self.layers, "frequency": self.frequency, "pooling": self.pooling}

    def changes(self) -> dict[str, str]:
        """Settings that differ from the defaults, by name."""
        return {name: value for name, value in self.settings().items() if value != getattr(Readout, name)}

    def frame_width(self, config: ModelFields) -> int:
        """Values per frame."""
        return config.hidden_size * len(self.groups) * (config.patch_rows if self.frequency == "concat" else 1)

    def clip_width(self, config: ModelFields) -> int:
        """Values per clip."""
        return self.frame_width(config) * sum(4 if part == "quarters" else 1 for part in self.pooling.split("+"))

    @property
    def needs_hidden_states(self) -> bool:
        """Whether it reads more than the encoder's output."""
        return any(layer is not None for group in self.groups for layer, _ in group)

    def frames(self, output: Tensor, hidden_states: Sequence[Tensor] | None, rows: int) -> Tensor:
        """Frames of a batch.

        Args:
            output: [B, N, D], output of the encoder, N = rows * columns patches, padding included.
            hidden_states: input of the first block and output of every block, [B, N, D] each; None where
                `needs_hidden_states` is False.
            rows: patches per column.

        Returns:
            [B, columns, `frame_width`], at least float32; frames of padding are not blanked.
        """
        wide = torch.promote_types(output.dtype, torch.float32)
        parts = []
        for group in self.groups:
            states = [output if layer is None else (hidden_states or ())[layer] for layer, _ in group]
            mixed = states[0].to(wide)
            if len(group) > 1:
                mixed = mixed * group[0][1]
                for state, (_, weight) in zip(states[1:], group[1:], strict=True):
                    mixed = mixed + state.to(wide) * weight
            parts.append(mixed)
        grid = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).unflatten(1, (rows, -1))
        return grid.mean(dim=1) if self.frequency == "mean" else grid.transpose(1, 2).flatten(2)


def pool(frames: Tensor, inside: Tensor, pooling: str) -> Tensor:
    """Pool frames to one vector per clip.

    "attention" averages with the weights softmax(sqrt(D) cos(frame, mean frame)), which is scaled dot-product attention
    of the mean frame to all frames after normalisation to root mean square 1; frames unlike the rest of the clip count
    less. The first of "quarters" has the frames from 0 to T / 4, rounded down, and so on, at least one each.

    Args:
        frames: [B, T, D], 0 where `inside` is False.
        inside: bool [B, T], True for frames of the clip, at least one; they come first.
        pooling: as in `Readout`.

    Returns:
        [B, D times the number of means, deviations, maxima and quarters], at least float32.
    """
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))  # in float16 sums over a long clip overflow
    mean = wide.sum(dim=1) / inside.sum(dim=1, keepdim=True)
    return torch.cat([_POOLINGS[part](wide, inside, mean) for part in pooling.split("+")], dim=-1)


def _deviation(frames: Tensor, inside: Tensor, mean: Tensor) -> Tensor:
    centred = (frames - mean[:, None]).masked_fill(~inside[..., None], 0.0)
    return (centred.square().sum(dim=1) / inside.sum(dim=1, keepdim=True)).clamp_min(_LEAST_VARIANCE).sqrt()


def _maximum(frames: Tensor, inside: Tensor, mean: Tensor) -> Tensor:
    return frames.masked_fill(~inside[..., None], float("-inf")).amax(dim=1)


def _quarters(frames: Tensor, inside: Tensor, mean: Tensor) -> Tensor:
    count = inside.sum(dim=1, keepdim=True)
    place = torch.arange(frames.shape[1], device=frames.device)
    means = []
    for part in range(4):
        first = torch.div(part * count, 4, rounding_mode="floor")
        end = torch.maximum(first + 1, torch.div((part + 1) * count, 4, rounding_mode="floor"))
        member = ((first <= place) & (place < end))[..., None]
        means.append((frames * member).sum(dim=1) / member.sum(dim=1))
    return torch.cat(means, dim=-1)


def _attention(frames: Tensor, inside: Tensor, mean: Tensor) -> Tensor:
    # Not as matrix products, which autocast would round to 16 bits.
    norms = frames.square().sum(dim=2).sqrt() * mean.square().sum(dim=1, keepdim=True).sqrt()
    scores = math.sqrt(frames.shape[2]) * (frames * mean[:, None]).sum(dim=2) / norms.clamp_min(1e-12)
    weights = scores.masked_fill(~inside, float("-inf")).softmax(dim=1)
    return (frames * weights[..., None]).sum(dim=1)


_POOLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda frames, inside, mean: mean,
    "std": _deviation,
    "max": _maximum,
    "quarters": _quarters,
    "attention": _attention,
}


def clips_of_rows(frames: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Take the clips out of packed rows: frames [R, C, D] to [clips, C, D], row by row, and bool [clips, C].

    Frames of empty columns are left out; those after the end of a clip are 0.
    """
    rows, columns = (packing.segments != 0).nonzero(as_tuple=True)
    counts = packing.clips()
    numbers = packing.segments[rows, columns] - 1 + (counts.cumsum(0) - counts)[rows]
    places = packing.positions[rows, columns]
    inside = torch.zeros(int(counts.sum()), frames.shape[1], dtype=torch.bool, device=numbers.device)
    inside[numbers, places] = True
    rows, columns, numbers, places = (to_device(one, frames.device) for one in (rows, columns, numbers, places))
    clips = frames.new_zeros(*inside.shape, frames.shape[2])
    return clips.index_put((numbers, places), frames[rows, columns]), to_device(inside, frames.device)


def _as_text(layers: Layers) -> str | None:
    """Layers as a string; None for a value of the wrong type."""
    if isinstance(layers, str):
        return layers.replace(" ", "")
    numbers = [layers] if isinstance(layers, int) else layers
    whole = isinstance(numbers, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    return ",".join(map(str, numbers)) if whole else None


def _groups(layers: str, blocks: int) -> Groups | None:
    """`Readout.groups` of layers; None where the text has another form, or names a layer that does not exist."""
    groups = []
    for part in layers.split("+"):
        group: dict[int | None, float] = {}
        items = [str(index) for index in range(1, blocks + 1)] if part == "mean" else part.split(",")
        for item in items:
            found = _LAYER.fullmatch(item)
            if found is None or (found[1] != "output" and not -blocks - 1 <= int(found[1]) <= blocks):
                return None
            index = None if found[1] == "output" else int(found[1]) % (blocks + 1)
            group[index] = group.get(index, 0.0) + float(found[2] or 1.0)
        total = sum(group.values())
        if not 0 < total < math.inf:
            return None
        groups.append(tuple((index, weight / total) for index, weight in group.items()))
    return tuple(groups)
