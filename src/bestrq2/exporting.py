"""Models out of the house: as a hub folder with its card, as ONNX, in the reference's layout, or onto the hub."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from bestrq2 import flags
from bestrq2.convert.hub import write_model
from bestrq2.convert.loading import load_encoder, load_pretraining
from bestrq2.convert.upload import check_upload, upload
from bestrq2.errors import ConfigError
from bestrq2.files import disk_errors, write_folder, write_text
from bestrq2.inference.classifier import load_classifier
from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2Model
from bestrq2.report.model_card import card_files

FORMATS = ("hf", "onnx", "reference")


def export(
    model: str | os.PathLike[str],
    output: Path,
    format: str = "hf",
    with_predictor: bool = False,
    license: str | None = None,
    int8: bool = False,
) -> Path:
    """Write a model in a format that others read.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        output: what to write: a new or empty folder for "hf" and "onnx", a .safetensors file for "reference".
        format: "hf" (a folder with weights, configuration, code and model card, which transformers loads with or
            without this package), "onnx" (the encoder from log-mel), or "reference" (the reference's own checkpoint).
            Of a fine-tuned model, "hf" writes the classifier and the others its encoder.
        with_predictor: of "hf", write predictor, head and quantizer too, so that pretraining can go on.
        license: of "hf", the identifier that the model card gives, such as "mit" or "cc-by-4.0".
        int8: of "onnx", quantise the weights to 8 bits as well.

    Returns:
        The output.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    source, output = os.fspath(model), Path(output)
    _check_options(format, with_predictor, license, int8)
    if format == "hf":
        _export_folder(source, output, with_predictor, license, place=output.resolve().name)
    elif format == "onnx":
        from bestrq2.convert.onnx import export_onnx

        export_onnx(source, output, int8)
    else:
        from bestrq2.convert.reference_export import export_reference

        export_reference(source, output)
    return output


def push(
    model: str | os.PathLike[str],
    repository: str,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    with_predictor: bool = False,
) -> str:
    """Export a model in the format "hf" and upload it to the Hugging Face hub in one commit.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        repository: "USER/MODEL" on the hub; made where there is none.
        private: whether a new repository is private.
        license: identifier that the model card gives, such as "mit" or "cc-by-4.0".
        revision: branch to upload to; the main one by default.
        with_predictor: upload predictor, head and quantizer too, so that pretraining can go on.

    Returns:
        URL of the model.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    _check_options("hf", with_predictor, license, int8=False)
    check_upload(repository)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _export_folder(os.fspath(model), folder, with_predictor, license, place=repository)
        return upload(folder, repository, private, revision)


def _check_options(format: str, with_predictor: bool, license: str | None, int8: bool) -> None:
    if format not in FORMATS:
        hint = flags.nearest(format, FORMATS) or f"; formats are {', '.join(FORMATS)}"
        raise ConfigError(f"there is no format '{format}'{hint}")
    given = {"hf": {"with_predictor": with_predictor, "license": license is not None}, "onnx": {"int8": int8}}
    for owner, options in given.items():
        for name, is_given in options.items():
            if is_given and format != owner:
                raise ConfigError(f"{name} belongs to the format {owner} and means nothing to {format}; leave it out")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ConfigError(f"license is '{license}'; write an identifier of the hub such as mit or cc-by-4.0")


def _load(source: str, with_predictor: bool) -> BestRQ2Model | BestRQ2ForPreTraining | BestRQ2ForAudioClassification:
    """What goes into a hub folder: the encoder, the whole pretraining model, or the classifier where there is one."""
    encoder = load_encoder(source)
    if encoder.config.architectures != [BestRQ2ForAudioClassification.__name__]:
        return load_pretraining(source) if with_predictor else encoder
    if with_predictor:
        raise ConfigError(
            f"{source}: is a fine-tuned classifier, which has no predictor; leave --with-predictor out, or export the "
            "model that it was fine-tuned from"
        )
    return load_classifier(source, "cpu").model


def _export_folder(source: str, output: Path, with_predictor: bool, license: str | None, place: str) -> None:
    """Write the hub folder; `place` is what its card calls it."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; name a folder to write the model to")
    with disk_errors(output):
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"{output}: is not empty; name a new folder, or delete this one first")
        output.parent.mkdir(parents=True, exist_ok=True)
        model = _load(source, with_predictor)
        card = card_files(source, model, place, license)

        def fill(folder: Path) -> None:
            write_model(folder, model)
            for name, text in card.items():
                write_text(folder / name, text)

        write_folder(output.resolve(), fill)
