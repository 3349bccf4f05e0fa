"""Model cards: README.md of an exported model, with what its source says about data, training and scores."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bestrq2._version import __version__
from bestrq2.convert.shipped import shipped_folder
from bestrq2.convert.weights import exported_step
from bestrq2.data.prepare.summary import SUMMARY, read_summary
from bestrq2.errors import DataError
from bestrq2.evaluate.finetuned import metric_table, per_class_table, read_finetune_result
from bestrq2.evaluate.provenance import is_run_folder
from bestrq2.evaluate.result import PROBE, Result, TaskScore, read_result
from bestrq2.evaluate.score_table import format_scores
from bestrq2.evaluate.table import Table
from bestrq2.inference.cost import cost
from bestrq2.inference.info import architecture
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import (
    MULTI,
    BestRQ2ForAudioClassification,
    BestRQ2ForPreTraining,
    BestRQ2PreTrainedModel,
)
from bestrq2.recipe_book import is_recipe_file, recipes
from bestrq2.report.comparison.figures import training_figures
from bestrq2.report.curves import STAGES, runs_table
from bestrq2.report.runs import Run, find_result, read_curves, read_training
from bestrq2.report.scales import time_text
from bestrq2.run_records import initial_gflops, is_finetuned, read_settings
from bestrq2.text import counted, flops_text

TAGS = ("audio", "speech", "music", "self-supervised-learning", "audio-embeddings", "best-rq-2", "bestrq2")
CLASSIFIER_TAGS = ("audio", "audio-classification", "best-rq-2", "bestrq2")
# Classes named in the summary; the table of scores and the configuration have all.
_SHOWN = 20


@dataclass(frozen=True)
class Origin:
    """What is known about where a model comes from.

    Attributes:
        sentence: summary.
        training: name → value; empty where nothing is known, which `sentence` then says.
        figures: SVG files by name without suffix.
        probes: tables of probe scores by title.
        tests: tables of a classifier's test scores by title.
        limits: sentences.
        sections: Markdown of training, evaluation, limits and licence in place of all these.
        license: hub identifier, where none is given with the export.
        dataset: hub id of the dataset it was trained on; None for anything else.
        base_model: hub id of the model whose weights it started from; None for anything else.
    """

    sentence: str
    training: dict[str, str] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    probes: dict[str, list[TaskScore]] = field(default_factory=dict)
    tests: dict[str, Table] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    sections: str = ""
    license: str | None = None
    dataset: str | None = None
    base_model: str | None = None


def card_files(source: str, model: BestRQ2PreTrainedModel, place: str, license: str | None = None) -> dict[str, str]:
    """Model card of an exported model with its figures: {"README.md": text, "loss.svg": text, ...}.

    The card names no path of the machine it was written on.

    Args:
        source: source of the model as in `bestrq2.load`.
        model: the encoder, the whole pretraining model or the classifier that is exported.
        place: argument of `from_pretrained` and `bestrq2.load` in the examples: a hub id or a folder.
        license: hub identifier such as "mit" or "cc-by-4.0"; None where none was given.

    Raises:
        DataError: results in a run folder are damaged.
    """
    origin = origin_of(source)
    figures = {f"{name}.svg": content for name, content in origin.figures.items()}
    return {**figures, "README.md": render_card(origin, model, place, license)}


def render_card(origin: Origin, model: BestRQ2PreTrainedModel, place: str, license: str | None) -> str:
    """Markdown of the card; see `card_files`."""
    config = model.config
    classes = _classes(model)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.get_template("model_card.md.jinja").render(
        name=place.rpartition("/")[2],
        place=place,
        lead=f"{_lead(config, classes)}. {origin.sentence}",
        origin=origin,
        tables={title: format_scores(scores) for title, scores in origin.probes.items()},
        architecture=_architecture(config, classes),
        limits=origin.limits,
        license=license,
        metadata=_metadata(origin, license, bool(classes)),
        classes=classes,
        multi_label=config.problem_type == MULTI,
        with_predictor=isinstance(model, BestRQ2ForPreTraining),
        sampling_rate=config.sampling_rate,
        max_seconds=config.max_seconds,
        frame_milliseconds=1000 * config.frame_hop_samples / config.sampling_rate,
        width=model.base_model.readout.frame_width(config),
        clip_width=model.base_model.readout.clip_width(config),
        version=__version__,
    )


def _classes(model: BestRQ2PreTrainedModel) -> tuple[str, ...]:
    """Class names of a classifier; empty for an encoder."""
    if not isinstance(model, BestRQ2ForAudioClassification):
        return ()
    return tuple(model.config.id2label[number] for number in range(model.config.num_labels))


def _lead(config: BestRQ2Config, classes: tuple[str, ...]) -> str:
    method = "BEST-RQ-2" if config.objective == "two_step" else "BEST-RQ"
    lead = f"A {method} encoder of audio, {cost(config).encoder_parameters / 1e6:.2f} M parameters"
    if not classes:
        return lead
    some = "any number" if config.problem_type == MULTI else "exactly one"
    return f"{lead}, with a linear head that predicts {some} of {len(classes)} classes"


def _architecture(config: BestRQ2Config, classes: tuple[str, ...]) -> dict[str, str]:
    facts = architecture(config)
    if classes:
        more = ", … (`id2label` in config.json)" if len(classes) > _SHOWN else ""
        facts["head"] = f"mean over the frames, then linear to {len(classes)} classes"
        facts["classes"] = ", ".join(classes[:_SHOWN]) + more
    return facts


def _metadata(origin: Origin, license: str | None, classifies: bool) -> str:
    """YAML block that the hub reads."""
    task, tags = ("audio-classification", CLASSIFIER_TAGS) if classifies else ("feature-extraction", TAGS)
    optional = {
        "license": license or origin.license,
        "datasets": None if origin.dataset is None else [origin.dataset],
        "base_model": origin.base_model,
    }
    known = {name: value for name, value in optional.items() if value is not None}
    fields = {"library_name": "transformers", "pipeline_tag": task, **known, "tags": list(tags)}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


# --- where a model comes from ---


def origin_of(source: str) -> Origin:
    """Origin of a model, from its source as in `bestrq2.load`.

    Raises:
        DataError: results in a run folder are damaged.
    """
    path = Path(source)
    name = path.resolve().name if path.exists() else source
    if (folder := shipped_folder(source)) is not None:
        return _of_shipped(folder)
    if is_finetuned(path):
        return _of_finetuning(path)
    if is_run_folder(source):
        return _of_run(path, name)
    untrained = not path.is_dir() and (source in recipes() or is_recipe_file(source))
    if untrained:
        return Origin(
            f"Its weights are random: it is the untrained model of the recipe {name} from seed 0, for baselines.",
            limits=("It is not trained.",),
        )
    kind = "a reference checkpoint" if path.is_file() else "the model"
    return Origin(
        f"It was converted from {kind} `{name}`; its training is not recorded there.",
        limits=("Data, steps and scores of its training are unknown; see its source.",),
    )


def _of_shipped(folder: Path) -> Origin:
    """Origin of an encoder of the package: what its own card says from its training on."""
    _, heading, sections = (folder / "README.md").read_text(encoding="utf-8").partition("## Training\n")
    sentence = f"It is the encoder `{folder.name}` of the package bestrq2."
    return Origin(sentence, sections=heading + sections.rstrip(), license="mit")


def _of_run(folder: Path, name: str) -> Origin:
    try:
        run: Run | None = read_training(folder, unfinished=True)
    except DataError:  # a run without a logged step yet, or of which only the model was copied
        run = None
    if run is None:
        return Origin(
            f"It was pretrained in the run `{name}`, whose settings or losses cannot be read.",
            limits=("Data, steps and losses of its training are not recorded here.",),
        )
    step = exported_step(folder) or run.steps
    limits = []
    if step < run.max_steps:
        limits.append(f"Training was not finished: these weights are of step {step:,} of {run.max_steps:,}.")
    excesses = {words: run.final(f"{stage}/excess_loss") for stage, words in reversed(STAGES.items())}
    stage, excess = next(((words, one) for words, one in excesses.items() if one is not None), ("", None))
    if excess is not None and excess >= 0:
        limits.append(
            f"Its {stage} excess loss is {excess:+.3f} nats: it predicts hidden codes no better than their frequencies "
            "do."
        )
    data, init = str(run.settings["data"]), _environment(folder).get("init")
    start = "" if init is None else f"from the weights of {_initial_model(init)} "
    return Origin(
        f"It was pretrained {start}for {step:,} steps on {_public_name(data)} by the recipe {run.recipe}.",
        training=_training(folder, run, step, data),
        figures=training_figures(run),
        probes=_probes(folder, step),
        limits=tuple(limits),
        dataset=_hub_dataset(data),
        base_model=init and init.get("base_model"),
    )


def _initial_model(init: dict[str, Any]) -> str:
    """Public name of the model whose weights a run started from."""
    hub = init.get("base_model")
    return _public_name(str(init["model"])) if hub is None else f"the hub's model `{hub}`"


def _of_finetuning(folder: Path) -> Origin:
    settings, environment = read_settings(folder / "config.yaml"), _environment(folder)
    base_model, model, data = environment.get("base_model"), str(settings.get("model")), str(settings["labelled"])
    base = _public_name(model)
    if base_model is not None:
        base = f"the hub's model `{base_model}`"
    elif model in recipes() or is_recipe_file(model):
        base = f"the untrained model of the recipe {base}"
    result = read_finetune_result(folder)
    tests, limits = {}, []
    if result is None:
        limits.append("Its scores are unknown: fine-tuning was not finished, or its test scores are missing.")
    else:
        count, corpus = result.provenance["test_clips"], _public_name(data)
        title = f"On {count:,} test recordings of {corpus}, which it was not trained on, in percent:"
        tests = {title: metric_table(result), "Class by class:": per_class_table(result)}
        limits.append(
            "Its test scores are of recordings of the same labelled data; their intervals cover the choice of test "
            "recordings, not that of seeds or training recordings."
        )
    return Origin(
        f"It was fine-tuned from {base} on {_public_name(data)}.",
        training=_finetuning(settings, environment, base, data, result),
        tests=tests,
        limits=tuple(limits),
        base_model=base_model,
    )


def _finetuning(
    settings: dict[str, Any], environment: dict[str, Any], base: str, data: str, result: Result | None
) -> dict[str, str]:
    """Base model, labelled data and settings of fine-tuning."""
    known = [_public_name(data)]
    if "recordings" in environment:
        names = {"train": "training", "valid": "validation", "test": "test"}
        parts = ", ".join(f"{environment.get(split, 0):,} for {name}" for split, name in names.items())
        known.append(f"{counted(environment['recordings'], 'recording')} ({parts})")
    if result is not None:
        labels = "any number" if result.provenance["multi_label"] else "one"
        known.append(f"{len(result.provenance['classes'])} classes, {labels} per recording")
    mode, layers = settings.get("mode"), settings.get("layers")
    trained = {"linear": "the head alone", "partial": f"the head and the last {layers} blocks", "full": "everything"}
    best = None if result is None else result.provenance["best_epoch"]
    kept = "" if best is None else f"; the weights are those of epoch {best}, the best in validation"
    options = {
        "batch size": "batch_size",
        "peak learning rate": "lr",
        "layer decay": "layer_decay",
        "weight decay": "weight_decay",
        "warm-up, share of the steps": "warmup_fraction",
        "classes drawn equally often": "balanced",
        "seed": "seed",
    }
    words = {True: "yes", False: "no"}
    return {
        "fine-tuned from": base,
        "labelled data": ", ".join(known),
        "trained": f"{trained.get(str(mode), 'unknown')} (mode {mode})",
        "epochs": f"{settings.get('epochs')}{kept}",
        **{
            name: words[value] if isinstance(value := settings[key], bool) else f"{value:g}"
            for name, key in options.items()
            if key in settings
        },
        **_software(environment),
    }


def _training(folder: Path, run: Run, step: int, data: str) -> dict[str, str]:
    """Data summary, recipe, steps, cost and final losses."""
    facts = {label: cells[0] for label, cells in runs_table([read_curves(folder)])}
    gflops, environment = run.cost.training_gflops * run.step_rows * step, _environment(folder)
    begun = {"started from": environment.get("init"), "second round after": environment.get("teacher")}
    seconds, before = run.seconds(), initial_gflops(folder)
    return {
        "recipe": run.recipe,
        **{label: f"{_initial_model(model)}, sha256 {model['sha256']}" for label, model in begun.items() if model},
        "data": ", ".join([_public_name(data), *_data_summary(folder, Path(data))]),
        "steps": f"{step:,} of {run.max_steps:,}, {run.settings['loader.batch_seconds']:g} s each, in "
        f"rows of {run.model.max_seconds:g} s",
        **{name: facts[name] for name in ("learning rate", "precision", "seed") if name in facts},
        "training compute": flops_text(gflops)
        + (f" after {flops_text(before)} for the first weights" if before else ""),
        **({} if seconds is None else {"wall time": time_text(seconds)}),
        **{name: text for name, text in facts.items() if name.startswith("final ")},
        **_software(environment),
    }


def _data_summary(folder: Path, data: Path) -> list[str]:
    """Amount of training data, as far as run and corpus record it."""
    environment = _environment(folder)
    known = []
    if isinstance(recordings := environment.get("recordings"), int):
        held_out = environment.get("held_out") or 0
        known.append(counted(recordings, "recording") + (f" ({held_out:,} of them for validation)" if held_out else ""))
    if (data / SUMMARY).is_file():
        hours = float(read_summary(data)["hours_kept"])
        known.append(f"{hours:,.1f} hours" if hours >= 10 else f"{hours:.3g} hours")
    return known


def _environment(folder: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _software(environment: dict[str, Any]) -> dict[str, str]:
    if "bestrq2" not in environment:
        return {}
    versions, gpus = environment.get("packages") or {}, environment.get("gpus") or []
    hardware = f", {len(gpus)} x {gpus[0]}" if gpus else ", CPU"
    return {"trained with": f"bestrq2 {environment['bestrq2']}, torch {versions.get('torch', '?')}{hardware}"}


def _probes(folder: Path, step: int) -> dict[str, list[TaskScore]]:
    """Scores in the run folder that belong to the exported weights."""
    tables = {}
    result = find_result(folder)
    if result is not None and result.provenance.get("step") in (None, step):
        title = f"Linear probe and k-NN of X-ARES on the frozen benchmark {result.benchmark}, all of synthetic audio:"
        tables[title] = list(result.scores)
    if (folder / "probes.json").is_file():
        found = read_result(folder / "probes.json", PROBE)
        tables["Linear probe and k-NN on labelled audio (probes.json):"] = list(found.scores)
    return tables


def _public_name(data: str) -> str:
    """Name of a corpus without folders of this machine and without what may be secret in a URL."""
    if (dataset := _hub_dataset(data)) is not None:
        return f"the hub's dataset {dataset}"
    bare = data.partition("?")[0].rstrip("/")
    return f"`{re.split(r'[/:]', bare)[-1] or bare}`" if "/" in bare else f"`{bare}`"


def _hub_dataset(data: str) -> str | None:
    """USER/DATASET on the hub; None for anything else, such as a local copy."""
    name = data.removeprefix("hub:").partition("?")[0]
    is_id = data.startswith("hub:") and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    return name if is_id and not Path(name).exists() else None
