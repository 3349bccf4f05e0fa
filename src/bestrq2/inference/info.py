"""Facts about a model: architecture, cost and origin, as `bestrq2 info` prints them.

A recipe is described without importing torch unless its cost is counted.
"""

from __future__ import annotations

import csv
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from bestrq2.convert.shipped import shipped_folder, shipped_training
from bestrq2.errors import CheckpointError, ConfigError, DataError
from bestrq2.model.fields import FIELD_TYPES, ModelFields
from bestrq2.recipe_book import is_recipe_file, recipe, recipes
from bestrq2.text import counted, flops_text, nearest

ENCODERS = {"vit": "ViT", "conformer": "Conformer"}
# Names of classes in `config.architectures`, which name the kind of model in a folder.
_WHOLE, _CLASSIFIER = "BestRQ2ForPreTraining", "BestRQ2ForAudioClassification"


def model_info(model: str | os.PathLike[str], cost: bool = True, data: str | None = None) -> dict[str, str]:
    """Size, cost and origin of a model, as printed by `bestrq2 info`.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        cost: count parameters and operations.
        data: source of audio, for what a run of a recipe would hear of it; None for none.

    Raises:
        CheckpointError: if there is no such model.
        ConfigError: `data` is given for something other than a recipe.
    """
    name = os.fspath(model)
    if not Path(name).is_dir() and (name in recipes() or is_recipe_file(name)):
        origin = {"trained": "no: a recipe, whose weights are random"}
        heard = {} if data is None else _of_corpus(name, data)
        return {"model": name} | architecture(_recipe_fields(name), cost) | origin | heard
    if data is not None:
        raise ConfigError(f"--data belongs to a recipe, and {name} is none; a run folder tells about its own data")
    from bestrq2.convert.loading import load_encoder

    return {"model": name} | architecture(load_encoder(model).config, cost) | _provenance(model)


def _of_corpus(name: str, data: str) -> dict[str, str]:
    """What a run of a recipe hears of a corpus."""
    from bestrq2.data.loader import training_rows
    from bestrq2.data.open_source import open_source
    from bestrq2.data.rows import describe_rows
    from bestrq2.data.sources import split_source

    fields, loader = _recipe_fields(name), recipe(name).get("loader", {})
    source = open_source(data)
    training, _ = split_source(source, loader.get("validation_clips", 64), 0)
    rows = max(1, round(loader.get("batch_seconds", 2560) / fields.max_seconds))
    return {"data": data} | describe_rows(training_rows(training, fields, 0), len(training), rows, fields)


def _recipe_fields(name: str) -> ModelFields:
    """The architecture of a recipe or recipe file."""
    values, fields = recipe(name).get("model", {}), ModelFields()
    for key in values:
        if key not in FIELD_TYPES:
            raise ConfigError(f"recipe {name}: model: there is no field '{key}'{nearest(key, FIELD_TYPES)}")
    try:
        fields.set_fields(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"recipe {name}: model: {error}") from error
    return fields


def architecture(config: ModelFields, cost: bool = True) -> dict[str, str]:
    """Size and cost of a model, in words.

    Facts about pretraining are left out where `config.architectures` names a model without predictor and head; for a
    classifier those about mask and codes, too.

    Args:
        config: a `BestRQ2Config`, or the fields of one.
        cost: count parameters and operations, for which torch is imported.
    """
    height, width = config.patch_size
    counts = _costs(config) if cost else {}
    per_frame, per_clip = _widths(config)
    facts = {
        "objective": config.objective.replace("_", "-"),
        "encoder": f"{ENCODERS[config.encoder_type]}, {config.num_hidden_layers} layers x {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.position_embedding} positions",
        "encoder parameters": counts.get("encoder parameters", ""),
        "parameters in pretraining": counts.get("parameters in pretraining", ""),
        "input": f"{config.sampling_rate} Hz mono, {_bands(config)}, one frame per "
        f"{1000 * config.hop_length / config.sampling_rate:.4g} ms, normalised: {config.input_normalization}",
        "patch": f"{height} mel bands x {width} frames",
        "tokens": f"{config.patch_rows * config.sampling_rate / config.frame_hop_samples:.4g} per second of audio",
        "frames": f"{config.sampling_rate / config.frame_hop_samples:.4g} per second (every "
        f"{1000 * config.frame_hop_samples / config.sampling_rate:.4g} ms), {per_frame}",
        "clips": per_clip,
        "inference": counts.get("inference", ""),
        "training step": counts.get("training step", ""),
        "mask": _mask(config),
        "codes": f"{config.num_codebooks} x {config.codebook_size}, quantizer input: {config.quantizer_normalization}",
    }
    architectures = getattr(config, "architectures", None)
    unknown = () if architectures in (None, [_WHOLE]) else ("parameters in pretraining", "training step")
    unused = ("mask", "codes") if architectures == [_CLASSIFIER] else ()
    known = {name: fact for name, fact in facts.items() if fact and name not in (*unknown, *unused)}
    return known | (_classes(config) if architectures == [_CLASSIFIER] else {})


def _widths(config: ModelFields) -> tuple[str, str]:
    """Values per frame and per clip, by the readout of the model."""
    width, rows = config.hidden_size, config.patch_rows
    if not getattr(config, "readout", None):
        wide = f" ({rows * width} with frequency concat)" if rows > 1 else ""
        return f"{width} values each{wide}", f"{width} values each, pooling mean"
    from bestrq2.model.readout import Readout  # imports torch

    own = Readout.of(config)
    frame = f"{own.frame_width(config)} values each, layers {own.layers}, frequency {own.frequency}"
    return frame, f"{own.clip_width(config)} values each, pooling {own.pooling}"


def _classes(config: Any) -> dict[str, str]:
    """What a classifier tells apart."""
    names = [str(name) for _, name in sorted(config.id2label.items())]
    several = config.problem_type == "multi_label_classification"
    others = f" and {len(names) - _CLASSES:,} others" if len(names) > _CLASSES else ""
    return {
        "task": "any number of classes per recording" if several else "one class per recording",
        "classes": f"{len(names):,}: {', '.join(names[:_CLASSES])}{others}",
    }


def _costs(config: ModelFields) -> dict[str, str]:
    """Parameters and operations, in words."""
    from bestrq2.inference.cost import cost
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config

    if not isinstance(config, BestRQ2Config):
        config = BestRQ2Config(**{name: getattr(config, name) for name in FIELD_TYPES})
    numbers, seconds = cost(config), f"{config.max_seconds:g} s"
    without_head = "predictor and" if config.objective == "two_step" else "its"
    return {
        "encoder parameters": f"{numbers.encoder_parameters / 1e6:.2f} M",
        "parameters in pretraining": f"{numbers.pretraining_parameters / 1e6:.2f} M (with {without_head} head)",
        "inference": f"{numbers.inference_gflops:.4g} GFLOPs for {seconds}",
        "training step": f"{numbers.training_gflops:.4g} GFLOPs per clip of {seconds}",
    }


def _mask(config: ModelFields) -> str:
    """The mask: share of what is hidden, and what replaces it."""
    low, high = (f"{100 * ratio:g}" for ratio in config.mask_ratio)
    share = f"{low} %" if low == high else f"{low} to {high} %"
    noise = ", filled with noise" if config.mask_fill == "noise" else ""
    return f"{share} of the patches{noise}"


# Top folders that are named with their hours; the others are counted.
_FOLDERS = 20
# Classes of a classifier that are named.
_CLASSES = 20


def _hours_heard(path: Path) -> str:
    """Hours that a run has heard, of each top folder where there are several; "" where that was not recorded."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            hours = [(row["folder"], float(row["seconds"]) / 3600) for row in csv.DictReader(file)]
    except (OSError, csv.Error, KeyError, TypeError, ValueError):
        return ""
    parts = [f"{folder} {each:.2f}" for folder, each in hours[:_FOLDERS]]
    if others := hours[_FOLDERS:]:
        parts.append(f"{counted(len(others), 'other folder')} {sum(each for _, each in others):.2f}")
    listed = f": {', '.join(parts)}" if len(hours) > 1 else ""
    return f"{sum(each for _, each in hours):.2f} h{listed}"


def _provenance(model: str | os.PathLike[str]) -> dict[str, str]:
    """Origin of the model of a run folder; for other models, that it is unknown."""
    from bestrq2.run_records import is_finetuned, read_metrics, read_run_settings, read_settings

    if (folder := shipped_folder(model)) is not None:
        training = shipped_training(model)
        facts = {key: str(training[key]) for key in ("recipe", "data", "seed")}
        steps, seconds = counted(training["steps"], "step"), training["batch_seconds"]
        facts["trained"] = f"{training['step']:,} of {steps} of {seconds:g} s"
        if before := training.get("initial_gflops"):
            facts["trained"] += f", after {flops_text(before)} for its first weights"
        return facts | {"model card": str(folder / "README.md")}
    run = Path(model)
    if not (run / "config.yaml").is_file():
        return {"trained": "unknown: not a run folder"}
    if is_finetuned(run):
        settings = read_settings(run / "config.yaml")
        known = [(key, str(settings.get(key))) for key in ("labelled", "epochs", "seed")]
        return {"fine-tuned": f"{settings.get('mode')}, from {settings.get('model')}"} | dict(known)
    try:
        settings = read_run_settings(run / "config.yaml")
        facts = {key: str(settings[key]) for key in ("recipe", "data", "seed")}
    except (DataError, KeyError) as error:
        raise CheckpointError(f"{run / 'config.yaml'}: holds no settings of a run") from error
    if (run / "metrics.csv").is_file():
        curves = read_metrics(run / "metrics.csv")
        losses = [
            f", {words} loss {curves[f'{stage}/loss'][1][-1]:.3f} (excess {curves[f'{stage}/excess_loss'][1][-1]:+.3f})"
            for stage, words in (("train", "training"), ("validation", "validation"))
            if f"{stage}/loss" in curves and f"{stage}/excess_loss" in curves
        ]
        if losses:
            step = max(int(logged[-1]) for name, (logged, _) in curves.items() if not name.startswith("probe/"))
            steps, seconds = settings["trainer.max_steps"], settings["loader.batch_seconds"]
            facts["trained"] = f"{step:,} of {counted(steps, 'step')} of {seconds:g} s{''.join(losses)}"
    if hours := _hours_heard(run / "heard.csv"):
        facts["heard"] = hours
    if (run / "environment.json").is_file():
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged: a fact less
            environment = json.loads((run / "environment.json").read_text())
            for label, name in (("started from", "init"), ("second round after", "teacher")):
                if name in environment:
                    facts[label] = "{model} (sha256 {sha256})".format(**environment[name])
                    if "training_gflops" in environment[name]:
                        facts[label] += f", trained with {flops_text(environment[name]['training_gflops'])}"
            facts["made with"] = f"bestrq2 {environment['bestrq2']}, torch {environment['packages']['torch']}"
            facts |= environment.get("heard", {})
    return facts


def _bands(config: ModelFields) -> str:
    """The mel bands of every window."""
    if not config.short_mel_bands:
        return f"{config.num_mel_bands} mel bands"
    milliseconds = 1000 / config.sampling_rate
    return " and ".join(f"{bands} mel bands of {window * milliseconds:.4g} ms" for _, window, bands in config.spectra)
