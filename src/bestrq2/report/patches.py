"""Figures of masked prediction: spectrogram, hidden patches, and predicted against true codes."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.report.scales import Axis, number_text

# Colours of a spectrogram from quiet to loud: black over purple and orange to light yellow, lightness rising evenly.
LEVEL_COLOURS = ("#06040f", "#241452", "#561a7a", "#8a2a7c", "#bb3f72", "#e65f5f", "#f98e63", "#fbc389", "#fbf7c5")
MOST_TABLE_CELLS = 512
LONG_FROM = 24


@dataclass(frozen=True)
class MaskExample:
    """One clip with hidden patches.

    Attributes:
        title: name of the clip.
        log_mel: [mel, frames] in dB; mel band 0 is the lowest.
        patch_shape: (mel bands, frames) of one patch.
        hidden: bool [rows, columns], True where the patch was hidden; row 0 holds the lowest mel bands.
        true_codes: int [rows, columns], the codes of the quantizer.
        predicted_codes: int [rows, columns], the codes of the model; only read where `hidden`.
        seconds: duration of the frames of `log_mel`.
    """

    title: str
    log_mel: NDArray[np.floating]
    patch_shape: tuple[int, int]
    hidden: NDArray[np.bool_]
    true_codes: NDArray[np.integer]
    predicted_codes: NDArray[np.integer]
    seconds: float


@torch.inference_mode()
def mask_example(model: BestRQ2ForPreTraining, waveform: np.ndarray, title: str, seed: int = 0) -> MaskExample:
    """Hide patches of one clip as in pretraining and predict their codes.

    Args:
        model: pretraining model in evaluation mode.
        waveform: float32 [samples] at the model's sampling rate; at most the longest clip of pretraining is used.
        title: name of the clip.
        seed: random seed of the mask.
    """
    config = model.config
    clip = torch.from_numpy(waveform[: config.max_samples].astype(np.float32))[None]
    patches = model.bestrq2.patches(clip)
    grid = (config.patch_rows, patches.columns)
    mask = draw_hidden_mask(config, [patches.columns], seed, 0, [0])
    output = model(clip, hidden_mask=mask)
    true_codes = model.quantizer(patches.quantizer_input)[0]
    predicted = output.logits[0].argmax(dim=-1)
    if config.num_codebooks > 1:  # the first codebook is shown
        true_codes, predicted = true_codes[..., 0], predicted[..., 0]
    predicted_codes = torch.full_like(true_codes, -1)
    predicted_codes[mask[0]] = predicted
    frames = patches.columns * config.patch_size[1]
    log_mel, _ = model.bestrq2.log_mel(clip)
    return MaskExample(
        title=title,
        log_mel=log_mel[0, :, :frames].numpy(),
        patch_shape=(config.patch_size[0], config.patch_size[1]),
        hidden=mask[0].view(grid).numpy(),
        true_codes=true_codes.view(grid).numpy(),
        predicted_codes=predicted_codes.view(grid).numpy(),
        seconds=frames * config.hop_length / config.sampling_rate,
    )


@dataclass(frozen=True)
class PatchCell:
    """One patch in units of patches: x and y of its top left corner (y downwards), and its codes.

    `codes` reads "predicted / true" where the patch was hidden, else the true code; `reading` is the text beside the
    pointer.
    """

    x: int
    y: int
    hidden: bool
    right: bool
    codes: str
    reading: str


def mask_figure(example: MaskExample) -> dict[str, Any]:
    """Geometry, image and texts of one example for the template; frames beyond the last whole patch are cut off.

    The image covers columns × rows patches exactly; `table` has the name and the cells of each row, high mel bands
    first, or is None where they are too many to read; `long` has the panels below each other; `cross` is the width and
    height, in cells, of the mark of a wrong prediction.
    """
    rows, columns = example.hidden.shape
    mel, frames = rows * example.patch_shape[0], columns * example.patch_shape[1]
    picture = np.asarray(example.log_mel, dtype=np.float64)[:mel, :frames]
    low, high = _level_range(picture)
    seconds = example.seconds * frames / example.log_mel.shape[1]
    cells = [[_cell(example, row, column, seconds / columns) for column in range(columns)] for row in range(rows)]
    bands = [f"mel {row * example.patch_shape[0]}–{(row + 1) * example.patch_shape[0] - 1}" for row in range(rows)]
    right = sum(cell.right for line in cells for cell in line)
    hidden = int(example.hidden.sum())
    return {
        "title": example.title,
        "image": _png(picture, low, high),
        "rows": rows,
        "columns": columns,
        "long": columns > LONG_FROM,
        "cross": _cross(rows, columns),
        "x_ticks": Axis(0, seconds).ticks(5),
        "y_ticks": Axis(0, mel).ticks(4),
        "cells": [cell for line in cells for cell in line],
        "hidden": hidden,
        "right": right,
        "accuracy": number_text(right / hidden if hidden else float("nan"), "percent"),
        "distinct": len(np.unique(example.true_codes)),
        "patch": f"{example.patch_shape[0]} mel bands × {1000 * seconds / columns:,.0f} ms",
        "low_db": f"{low:.0f}".replace("-", "−"),
        "high_db": f"{high:.0f} dB".replace("-", "−"),
        "column_names": [f"{column * seconds / columns:.2f} s" for column in range(columns)],
        "table": list(zip(bands, cells, strict=True))[::-1] if rows * columns <= MOST_TABLE_CELLS else None,
    }


def _cross(rows: int, columns: int) -> tuple[float, float]:
    """Width and height, in cells, of a mark that looks about square in panels as wide as the style sheet makes them."""
    width, height = (4.0 if columns > LONG_FROM else 1.7) / columns, 1.0 / rows
    size = 0.3 * min(width, height)
    return round(size / width, 3), round(size / height, 3)


def _cell(example: MaskExample, row: int, column: int, seconds_per_patch: float) -> PatchCell:
    true, predicted = int(example.true_codes[row, column]), int(example.predicted_codes[row, column])
    hidden = bool(example.hidden[row, column])
    start = column * seconds_per_patch
    bands = row * example.patch_shape[0]
    place = f"{start:.2f}–{start + seconds_per_patch:.2f} s, mel {bands}–{bands + example.patch_shape[0] - 1}"
    verdict = "right" if true == predicted else "wrong"
    seen = f"predicted {predicted}, true {true}: {verdict}" if hidden else f"visible, code {true}"
    y = example.hidden.shape[0] - 1 - row
    codes = f"{predicted} / {true}" if hidden else str(true)
    return PatchCell(column, y, hidden, hidden and true == predicted, codes, f"{seen}\n{place}")


def _level_range(picture: NDArray[np.float64]) -> tuple[float, float]:
    """Levels in dB between which colours run: nearly all of the picture, at least 1 dB apart."""
    finite = picture[np.isfinite(picture)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [2, 99.8])
    return float(low), float(max(high, low + 1))


def _png(picture: NDArray[np.float64], low: float, high: float) -> str:
    """[mel, frames] in dB as the data URI of a PNG with a palette, low frequencies at the bottom."""
    levels = np.nan_to_num(np.clip((picture[::-1] - low) / (high - low), 0, 1))
    pixels = np.round(255 * levels).astype(np.uint8)
    # every line starts with its filter, 0 for none
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, indices into a palette
    chunks = {b"IHDR": header, b"PLTE": _palette().tobytes(), b"IDAT": zlib.compress(lines, 9), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _palette() -> NDArray[np.uint8]:
    """256 colours [256, 3] from quiet to loud."""
    stops = np.array([list(bytes.fromhex(colour[1:])) for colour in LEVEL_COLOURS], dtype=np.float64)
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def level_gradient() -> str:
    """CSS gradient of the colours of a spectrogram from quiet to loud."""
    return f"linear-gradient(to right, {', '.join(LEVEL_COLOURS)})"
