"""What there is to know of a model before using it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bestrq2.convert.loading import load_encoder
from bestrq2.errors import CheckpointError, DataError
from bestrq2.inference.cost import cost
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining
from bestrq2.recipe_book import is_recipe_file, recipes
from bestrq2.run_records import flatten, is_finetuned, read_settings, read_table
from bestrq2.text import counted

ENCODERS = {"vit": "ViT", "conformer": "Conformer"}


def info(model: str | os.PathLike[str]) -> dict[str, str]:
    """Size, cost and origin of a model, as printed by `bestrq2 info`.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.

    Raises:
        CheckpointError: if there is no such model.
    """
    return {"model": str(model)} | architecture(load_encoder(model).config) | _provenance(Path(model))


def architecture(config: BestRQ2Config) -> dict[str, str]:
    """Size and cost of a model, in words.

    Those of pretraining are left out where `config.architectures` names a model without predictor and head, of which
    the configuration then knows nothing; of a classifier, mask and codes too, which it has no use for.
    """
    numbers = cost(config)
    is_whole = config.architectures in (None, [BestRQ2ForPreTraining.__name__])
    height, width = config.patch_size
    seconds = f"{config.max_seconds:g} s"
    without_head = "predictor and" if config.objective == "two_step" else "its"
    facts = {
        "objective": config.objective.replace("_", "-"),
        "encoder": f"{ENCODERS[config.encoder_type]}, {config.num_hidden_layers} layers x {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.position_embedding} positions",
        "encoder parameters": f"{numbers.encoder_parameters / 1e6:.2f} M",
        "parameters in pretraining": f"{numbers.pretraining_parameters / 1e6:.2f} M (with {without_head} head)",
        "input": f"{config.sampling_rate} Hz mono, {config.num_mel_bands} mel bands, one frame per "
        f"{1000 * config.hop_length / config.sampling_rate:.4g} ms, normalised: {config.input_normalization}",
        "patch": f"{height} mel bands x {width} frames",
        "tokens": f"{numbers.tokens_per_second:.4g} per second of audio",
        "frames": f"{numbers.frames_per_second:.4g} per second (every "
        f"{1000 * config.frame_hop_samples / config.sampling_rate:.4g} ms), {config.hidden_size} values each",
        "inference": f"{numbers.inference_gflops:.4g} GFLOPs for {seconds}",
        "training step": f"{numbers.training_gflops:.4g} GFLOPs per clip of {seconds}",
        "mask": _mask(config),
        "codes": f"{config.num_codebooks} x {config.codebook_size}, quantizer input: {config.quantizer_normalization}",
    }
    unknown = () if is_whole else ("parameters in pretraining", "training step")
    unused = ("mask", "codes") if config.architectures == [BestRQ2ForAudioClassification.__name__] else ()
    return {name: fact for name, fact in facts.items() if name not in (*unknown, *unused)}


def _mask(config: BestRQ2Config) -> str:
    """What is hidden, and of how many masks a clip."""
    low, high = (f"{100 * ratio:g}" for ratio in config.mask_ratio)
    share = f"{low} %" if low == high else f"{low} to {high} %"
    rows, columns = config.mask_block_size
    shapes = {
        "uniform": f"{share} of the patches",
        "block": f"{share} of the patches, in blocks of {rows} x {columns}",
        "span": f"spans of {columns} columns, {100 * config.mean_hidden_share:.0f} % of the patches on average",
    }
    noise = ", filled with noise" if config.mask_fill == "noise" else ""
    several = f", {config.masks_per_clip} masks a clip" if config.masks_per_clip > 1 else ""
    return shapes[config.mask_shape] + noise + several


def _provenance(run: Path) -> dict[str, str]:
    """Where a run folder's model comes from; for other models, that this is not known."""
    if not run.is_dir() and (str(run) in recipes() or is_recipe_file(str(run))):
        return {"trained": "no: a recipe, whose weights are random"}
    if not (run / "config.yaml").is_file():
        return {"trained": "not a run folder: nothing is known of its training"}
    if is_finetuned(run):
        settings = read_settings(run / "config.yaml")
        known = [(key, str(settings.get(key))) for key in ("labelled", "epochs", "seed")]
        return {"fine-tuned": f"{settings.get('mode')}, from {settings.get('model')}"} | dict(known)
    try:
        settings = flatten(read_settings(run / "config.yaml"))
        facts = {key: str(settings[key]) for key in ("recipe", "data", "seed")}
    except (DataError, KeyError) as error:
        raise CheckpointError(f"{run / 'config.yaml'}: holds no settings of a run") from error
    if (run / "metrics.csv").is_file():
        curves = read_table(run / "metrics.csv")
        if "train/loss" in curves and "train/excess_loss" in curves:
            (logged, losses), (_, excesses) = curves["train/loss"], curves["train/excess_loss"]
            steps, clips = settings["trainer.max_steps"], settings["loader.batch_size"]
            facts["trained"] = (
                f"{logged[-1]:,} of {counted(steps, 'step')} of {counted(clips, 'clip')}, loss {losses[-1]:.3f} "
                f"(excess {excesses[-1]:+.3f})"
            )
    if (run / "environment.json").is_file():
        environment = json.loads((run / "environment.json").read_text())
        versions = environment.get("packages", {})
        facts["made with"] = f"bestrq2 {environment.get('bestrq2')}, torch {versions.get('torch')}"
    return facts
