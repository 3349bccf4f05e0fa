"""Draws docs/figures/method.png from one SoundWorld clip and the real quantizer: python docs/make_method_figure.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import bestrq2
from bestrq2 import soundworld
from bestrq2.model.masking import draw_hidden_mask

BLUE, ORANGE, GREY, INK = "#0067a8", "#c8500f", "#d9d6cf", "#1c1e26"


def main() -> None:
    config = bestrq2.BestRQ2Config(**bestrq2.recipe("demo")["model"])
    model = bestrq2.BestRQ2ForPreTraining(config)
    clip = torch.from_numpy(soundworld.clip(0, 1, seconds=5.0))[None]
    patches = model.bestrq2.patches(clip)
    rows, columns = config.patch_rows, patches.columns
    codes = model.quantizer(patches.quantizer_input)[0, :, 0].view(rows, columns).numpy()
    hidden = draw_hidden_mask(config, [columns], seed=4, step=0, places=[0]).view(rows, columns).numpy()
    log_mel = model.bestrq2.log_mel(clip)[0][0, :, : columns * config.patch_size[1]].numpy()

    figure = Figure(figsize=(12, 4.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, 12), ylim=(0, 4.6))
    page.axis("off")

    spectrum = figure.add_axes((0.02, 0.48, 0.19, 0.38))
    seen = figure.add_axes((0.27, 0.48, 0.19, 0.38))
    named = figure.add_axes((0.79, 0.30, 0.19, 0.38))
    for axes in (spectrum, seen):
        axes.imshow(log_mel, origin="lower", aspect="auto", cmap="magma")
    cover = np.ma.masked_where(~np.kron(hidden, np.ones(config.patch_size, bool)), np.ones_like(log_mel))
    seen.imshow(cover, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=5)
    named.imshow(np.where(hidden, 1.0, np.nan), origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=4)
    for row, column in zip(*np.nonzero(hidden), strict=True):
        named.text(column, row, str(codes[row, column]), ha="center", va="center", fontsize=5.5, color=INK)
    for axes, height, width in ((spectrum, 16, 16), (seen, 16, 16), (named, 1, 1)):
        axes.set_xticks(np.arange(0, columns * width + 1, width) - 0.5, labels=[])
        axes.set_yticks(np.arange(0, rows * height + 1, height) - 0.5, labels=[])
        axes.grid(color="white", linewidth=0.8)
        axes.tick_params(length=0)
    spectrum.set_title("log-mel, cut into patches", fontsize=9, color=INK)
    seen.set_title("a part is hidden", fontsize=9, color=INK)
    named.set_title("codes of the hidden patches", fontsize=9, color=INK)

    def box(x: float, y: float, width: float, title: str, text: str, colour: str) -> None:
        shape = FancyBboxPatch((x, y), width, 0.82, boxstyle="round,pad=0.04", facecolor="white", edgecolor=colour)
        page.add_patch(shape)
        page.text(x + width / 2, y + 0.55, title, ha="center", va="center", fontsize=9.5, color=colour, weight="bold")
        page.text(x + width / 2, y + 0.24, text, ha="center", va="center", fontsize=7, color=INK)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: float = 0.0) -> None:
        style = f"arc3,rad={bend}"
        page.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, connectionstyle=style)
        )

    box(5.85, 3.25, 1.45, "1 contextualize", "encoder sees the\nvisible patches only", BLUE)
    box(7.75, 3.25, 1.45, "2 predict", "light predictor adds\nmask tokens", ORANGE)
    box(
        4.7,
        0.55,
        2.6,
        "frozen targets",
        "random projection, then the nearest of a\nrandom codebook: a code per patch",
        "#5b5e66",
    )
    arrow((2.55, 3.05), (3.2, 3.05))
    arrow((5.55, 3.5), (5.78, 3.6))
    arrow((7.35, 3.66), (7.7, 3.66))
    arrow((9.25, 3.66), (10.4, 3.42), bend=-0.25)
    arrow((1.4, 2.1), (4.6, 0.95), colour="#5b5e66", bend=0.25)
    arrow((7.4, 0.95), (10.4, 1.3), colour="#5b5e66", bend=0.2)
    page.text(6.57, 2.75, "kept: this is the model you use", ha="center", fontsize=8, color=BLUE)
    page.text(8.47, 2.45, "dropped after pretraining", ha="center", fontsize=8, color=ORANGE)
    page.text(9.85, 3.95, "named by the model", ha="center", fontsize=7.5, color=INK)
    page.text(9.3, 0.55, "must equal", ha="center", fontsize=7.5, color=INK)
    figure.savefig(Path(__file__).parent / "figures" / "method.png")


if __name__ == "__main__":
    main()
