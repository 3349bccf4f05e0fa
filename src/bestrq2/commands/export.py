"""`bestrq2 export`: write a model as a hub folder, as ONNX or in the reference layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2 import flags


def export(
    model: str | os.PathLike[str],
    output: Path,
    format: str = "hf",
    with_predictor: bool = False,
    license: str | None = None,
    int8: bool = False,
) -> Path:
    """Export a model: a folder in hub format, an ONNX encoder, or a checkpoint in the reference layout.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        output: new or empty folder for "hf" and "onnx", a .safetensors file for "reference".
        format: "hf" (folder with weights, configuration, code and model card, which transformers loads with or without
            this package), "onnx" (the encoder, from log-mel spectrogram to frames) or "reference" (checkpoint of the
            reference implementation). Of a fine-tuned model "hf" exports the classifier, the others its encoder.
        with_predictor: for "hf", include predictor, head and quantizer, so that pretraining can continue.
        license: for "hf", license identifier in the model card, such as "mit" or "cc-by-4.0".
        int8: for "onnx", also write a model with weights quantised to 8 bits.

    Returns:
        The output.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2 import exporting

    return exporting.export(model, output, format, with_predictor, license, int8)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 export`."""
    print(export(**flags.parse_command(export, argv, positional=("model", "output"))))
