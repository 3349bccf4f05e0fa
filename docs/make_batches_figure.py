"""Draws docs/figures/batches.svg with the segments and rows of the package: python docs/make_batches_figure.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import bestrq2
from bestrq2.data.rows import Segment, SegmentRows, Segments, columns_of

NAMES = ["music, 23.4 s", "field, 12.9 s", "speech, 4.4 s", "3.2 s", "2.6 s", "1.9 s", "1.4 s"]
SECONDS = [23.4, 12.9, 4.4, 3.2, 2.6, 1.9, 1.4]
COLOURS = ["#0067a8", "#c8500f", "#3f7d3a", "#8a5aa8", "#b8860b", "#2a9d9d", "#a83c5a"]
INK, GREY, RATE, SCALE, LONGEST = "#1c1e26", "#d9d6cf", 16_000, 17, 10
WIDTH, HEIGHT = 960, 420


def bar(x: float, y: float, width: float, height: float, colour: str, text: str = "", edge: str = "white") -> str:
    """A rectangle with a word in it, where there is room."""
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}" stroke="{edge}"/>'
    if not text or width < 6 * len(text):
        return shape
    return shape + label(x + width / 2, y + height / 2 + 4, text, "white", "middle")


def label(x: float, y: float, text: str, colour: str = INK, anchor: str = "start", weight: str = "normal") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'


def recordings(segments: Segments, x: float, y: float, epoch: int) -> Iterator[str]:
    """All recordings with their cuts in an epoch."""
    numbers = segments.recordings()
    for recording, name in enumerate(NAMES):
        top = y + 22 * recording
        for number in np.flatnonzero(numbers == recording):
            segment = segments(int(number), epoch)
            yield bar(
                x + segment.start / RATE * SCALE, top, segment.samples / RATE * SCALE, 18, COLOURS[recording],
                f"{segment.samples / RATE:.3g}",
            )  # fmt: skip
        if epoch == 0:
            yield label(x - 8, top + 13, name, anchor="end")


def packed(rows: SegmentRows, x: float, y: float, epoch: int) -> Iterator[str]:
    """Rows with their clips in an epoch."""
    unit = LONGEST * SCALE / rows.capacity
    for row in range(len(rows)):
        yield bar(x, y + 22 * row, LONGEST * SCALE, 18, GREY)
        place = x
        for segment in rows.segments(epoch, row):
            width = unit * int(columns_of(np.array([segment.samples]), CONFIG)[0])
            text = f"{segment.samples / RATE:.3g}"
            yield bar(place, y + 22 * row, width, 18, COLOURS[segment.recording], text)
            place += width


def padded(x: float, y: float) -> Iterator[str]:
    """One crop of each recording in a row of its own."""
    for row, seconds in enumerate(SECONDS):
        yield bar(x, y + 22 * row, LONGEST * SCALE, 18, GREY)
        yield bar(x, y + 22 * row, min(seconds, LONGEST) * SCALE, 18, COLOURS[row])


def attention(rows: SegmentRows, x: float, y: float) -> Iterator[str]:
    """Which columns of a row attend to which: blocks on the diagonal, one for each clip."""
    row = max(range(len(rows)), key=lambda number: len(rows.segments(0, number)))
    clips: list[Segment] = rows.segments(0, row)
    unit = 130 / rows.capacity
    yield bar(x, y, 130, 130, GREY)
    place = 0.0
    for clip in clips:
        width = unit * int(columns_of(np.array([clip.samples]), CONFIG)[0])
        yield bar(x + place, y + place, width, round(width, 1), COLOURS[clip.recording])
        place += width


CONFIG = bestrq2.BestRQ2Config(**bestrq2.recipe("best-rq-2-tiny")["model"])


def main() -> None:
    """Write the picture."""
    lengths = np.array([round(seconds * RATE) for seconds in SECONDS])
    segments = Segments(lengths, LONGEST * RATE, 1, seed=3)
    rows = SegmentRows(segments, CONFIG, 3)
    left, middle, right = 110, 320, 545
    parts = [
        label(left, 22, "Recordings, cut into segments: epoch 1", weight="bold"),
        *recordings(segments, left, 34, 0),
        label(right, 22, "epoch 2: the cuts move", weight="bold"),
        *recordings(segments, right, 34, 1),
        label(left, 222, "One crop of each, padded", weight="bold"),
        *padded(left, 234),
        label(middle, 222, "Packed rows: epoch 1", weight="bold"),
        *packed(rows, middle, 234, 0),
        label(right, 222, "epoch 2: the same widths", weight="bold"),
        *packed(rows, right, 234, 1),
        label(right + 220, 222, "Attention in the last row", weight="bold"),
        *attention(rows, right + 220, 234),
    ]
    style = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    page = f'<svg xmlns="http://www.w3.org/2000/svg" {style}><rect width="100%" height="100%" fill="white"/>'
    path = Path(__file__).parent / "figures" / "batches.svg"
    path.write_text("\n".join([page, *parts, "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    main()
