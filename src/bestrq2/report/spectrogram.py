"""A clip as the model saw it: spectrogram, hidden patches, and predicted against true codes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestrq2.report.contents import MaskExample
from bestrq2.report.scales import Axis, Tick, number_text

COLOUR_MAP = "magma"
MOST_TABLE_CELLS = 512
LONG_FROM = 24


@dataclass(frozen=True)
class PatchCell:
    """One patch in units of patches: x and y of its top left corner (y downwards), and its codes.

    `codes` reads "predicted / true" where the patch was hidden, else the true code; `reading` says it in words.
    """

    x: int
    y: int
    hidden: bool
    right: bool
    codes: str
    reading: str


@dataclass(frozen=True)
class MaskFigure:
    """What the template draws for one example.

    The image covers columns × rows patches exactly; `table` has the cells by row, high mel bands first, or is None
    where they are too many to read; `long` has the panels below each other;
    `cross` is the width and height of a wrong cell's mark, in cells.
    """

    title: str
    image: str
    rows: int
    columns: int
    long: bool
    cross: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    cells: list[PatchCell]
    hidden: int
    right: int
    accuracy: str
    distinct: int
    patch: str
    low_db: str
    high_db: str
    table: list[list[PatchCell]] | None


def colour_bar(stops: int = 9) -> str:
    """CSS gradient of the spectrogram's colours from quiet to loud."""
    from matplotlib import colormaps

    colours = (255 * colormaps[COLOUR_MAP](np.linspace(0, 1, stops))[:, :3]).astype(int)
    return "linear-gradient(to right, " + ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours) + ")"


def mask_figure(example: MaskExample) -> MaskFigure:
    """Geometry, image and texts of one example; frames beyond the last whole patch are cut off."""
    rows, columns = example.hidden.shape
    mel, frames = rows * example.patch_shape[0], columns * example.patch_shape[1]
    picture = np.asarray(example.log_mel, dtype=np.float64)[:mel, :frames]
    low, high = _level_range(picture)
    seconds = example.seconds * frames / example.log_mel.shape[1]
    cells = [[_cell(example, row, column, seconds / columns) for column in range(columns)] for row in range(rows)]
    right = sum(cell.right for line in cells for cell in line)
    hidden = int(example.hidden.sum())
    return MaskFigure(
        title=example.title,
        image=_png(picture, low, high),
        rows=rows,
        columns=columns,
        long=columns > LONG_FROM,
        cross=_cross(rows, columns),
        x_ticks=Axis(0, seconds).ticks(5),
        y_ticks=Axis(0, mel).ticks(4),
        cells=[cell for line in cells for cell in line],
        hidden=hidden,
        right=right,
        accuracy=number_text(right / hidden if hidden else float("nan"), "percent"),
        distinct=len(np.unique(example.true_codes)),
        patch=f"{example.patch_shape[0]} mel bands × {1000 * seconds / columns:,.0f} ms",
        low_db=f"{low:.0f}".replace("-", "−"),
        high_db=f"{high:.0f} dB".replace("-", "−"),
        table=cells[::-1] if rows * columns <= MOST_TABLE_CELLS else None,
    )


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
    """[mel, frames] in dB as a PNG data URI, low frequencies at the bottom."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    scaled = np.nan_to_num(np.clip((picture[::-1] - low) / (high - low), 0, 1))
    buffer = io.BytesIO()
    imsave(buffer, (255 * colormaps[COLOUR_MAP](scaled)[..., :3]).astype(np.uint8), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
