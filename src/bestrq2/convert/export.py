"""Export of models: hub folder, ONNX or reference layout, and upload to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bestrq2.convert.hub import check_upload, upload, write_model
from bestrq2.convert.loading import load_classification, load_encoder, load_pretraining, load_whole_or_encoder
from bestrq2.convert.readout import set_readout
from bestrq2.convert.reference import write_reference
from bestrq2.errors import ConfigError
from bestrq2.files import disk_errors, write_folder, write_text
from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2Model
from bestrq2.text import nearest

FORMATS = ("hf", "onnx", "reference")

AnyModel = BestRQ2Model | BestRQ2ForPreTraining | BestRQ2ForAudioClassification
Describe = Callable[[AnyModel], Mapping[str, str]]
"""Further text files of a hub folder, such as README.md, by name, for the exported model."""


def export_model(
    source: str,
    output: Path,
    *,
    format: str = "hf",
    with_predictor: bool = False,
    int8: bool = False,
    readout: Mapping[str, Any] | None = None,
    describe: Describe | None = None,
) -> Path:
    """Write a model in one of `FORMATS`; see `bestrq2.export` for the arguments.

    `readout` has the options layers, frequency and pooling; None or an option that is None keeps the model's own.

    Raises:
        ConfigError: for an unknown format, an option of another format, or an output that cannot be written.
        CheckpointError: if the model cannot be loaded.
    """
    check_format(format, with_predictor=with_predictor, int8=int8)
    readout = {name: value for name, value in (readout or {}).items() if value is not None}
    if format == "hf":
        _write_hub_folder(source, output, with_predictor, readout, describe)
    elif format == "onnx":
        from bestrq2.convert.onnx import export_onnx

        export_onnx(source, output, int8, readout)
    elif readout:
        raise ConfigError(f"{next(iter(readout))} cannot be stored in the reference layout; leave it out")
    else:
        export_reference(source, output)
    return output


def export_reference(source: str, output: Path) -> Path:
    """Write a model as a checkpoint of the reference implementation; see `write_reference`.

    A source with predictor and quantizer becomes the state dict of the research module, other sources the encoder
    alone. A reference checkpoint that was loaded comes back bit for bit.
    """
    write_reference(load_whole_or_encoder(source), output)
    return output


def push_model(
    source: str,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_predictor: bool = False,
    describe: Describe | None = None,
) -> str:
    """Upload a model in hub format and return its URL; see `bestrq2.push` for the arguments, `upload` for errors."""
    check_upload(repository)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _write_hub_folder(source, folder, with_predictor, {}, describe)
        return upload(folder, repository, private, revision)


def check_format(format: str, **options: bool) -> None:
    """Raise a ConfigError for an unknown format, or a given option that belongs to another one."""
    if format not in FORMATS:
        hint = nearest(format, FORMATS) or f"; formats are {', '.join(FORMATS)}"
        raise ConfigError(f"there is no format '{format}'{hint}")
    for name, given in options.items():
        owner = "onnx" if name == "int8" else "hf"
        if given and format != owner:
            raise ConfigError(f"{name} belongs to format {owner} and has no effect on {format}; leave it out")


def _write_hub_folder(
    source: str, output: Path, with_predictor: bool, readout: Mapping[str, Any], describe: Describe | None
) -> None:
    with disk_errors(output):
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output}: is a file; name a folder to write the model to")
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"{output}: is not empty; name a new folder, or delete this one first")
        output.parent.mkdir(parents=True, exist_ok=True)
        model = _load_for_hub(source, with_predictor)
        if readout and isinstance(model, BestRQ2ForAudioClassification):
            raise ConfigError(
                f"{source}: its classifier was trained on its own readout; leave {next(iter(readout))} out, or export "
                "the model that it was fine-tuned from"
            )
        set_readout(model.base_model, **readout)
        files = {} if describe is None else describe(model)

        def fill(folder: Path) -> None:
            write_model(folder, model)
            for name, content in files.items():
                write_text(folder / name, content)

        write_folder(output.resolve(), fill)


def _load_for_hub(source: str, with_predictor: bool) -> AnyModel:
    """The encoder alone, the whole pretraining model, or the classifier of a fine-tuned model."""
    encoder = load_encoder(source)
    if encoder.config.architectures != [BestRQ2ForAudioClassification.__name__]:
        return load_pretraining(source) if with_predictor else encoder
    if with_predictor:
        raise ConfigError(
            f"{source}: is a fine-tuned classifier, which has no predictor; leave --with-predictor out, or export the "
            "model that it was fine-tuned from"
        )
    return load_classification(source)
