"""`bestrq2 export`: write a model as a hub folder, as ONNX or in the reference layout."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bestrq2 import flags
from bestrq2.errors import ConfigError

if TYPE_CHECKING:
    from bestrq2.convert.export import AnyModel


def export(
    model: str | os.PathLike[str],
    output: Path,
    format: Literal["hf", "onnx", "reference"] = "hf",
    with_predictor: bool = False,
    license: str | None = None,
    int8: bool = False,
    layers: int | list[int] | str | None = None,
    frequency: Literal["mean", "concat"] | None = None,
    pooling: str | None = None,
) -> Path:
    """Export a model: a folder in hub format, an ONNX encoder, or a checkpoint in the reference layout.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        output: new or empty folder for "hf" and "onnx", a .safetensors file for "reference".
        format: "hf" (folder with weights, configuration, code and model card, which transformers loads with or without
            this package), "onnx" (the encoder, from log-mel spectrogram to frames) or "reference" (checkpoint of the
            reference implementation). Of a fine-tuned model "hf" exports the classifier, the others its encoder.
        with_predictor: for "hf", include predictor, head and quantizer, so that pretraining can continue.
        license: for "hf", license identifier in the model card, such as "mit" or "cc-by-4.0".
        int8: for "onnx", also write a model with weights quantised to 8 bits.
        layers: for "hf" and "onnx", layer or layers that the exported model takes its frames from, as in `bestrq2
            embed`, from then on in all commands and in transformers; "output" by default.
        frequency: likewise, the "mean" of the rows of patches along frequency or "concat".
        pooling: likewise, what the vector of a clip holds of its frames, such as "mean" or "mean+std".

    Returns:
        The output.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.convert.export import check_format, export_model

    source, output = os.fspath(model), Path(output)
    check_format(format, license=license is not None)
    describe = describe_model(source, os.path.basename(os.path.abspath(output)), license)
    readout = {"layers": layers, "frequency": frequency, "pooling": pooling}
    return export_model(
        source, output, format=format, with_predictor=with_predictor, int8=int8, readout=readout, describe=describe
    )


def describe_model(source: str, place: str, license: str | None) -> Callable[[AnyModel], dict[str, str]]:
    """A function from an exported model to its model card, for `export_model` and `push_model`.

    Args:
        source: model as in `bestrq2.load`.
        place: name of the folder or repository in the examples of the card.
        license: license identifier, or None.

    Raises:
        ConfigError: for an invalid license identifier.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ConfigError(f"license is '{license}'; write an identifier of the hub such as mit or cc-by-4.0")

    def describe(model: AnyModel) -> dict[str, str]:
        from bestrq2.report.model_card import card_files

        return card_files(source, model, place, license)

    return describe


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 export`."""
    print(export(**flags.parse_command(export, argv, positional=("model", "output"))))
