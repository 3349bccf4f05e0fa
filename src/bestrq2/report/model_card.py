"""The model card of an exported model, as the hub shows it: README.md with its metadata in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bestrq2._version import __version__
from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.score_table import format_scores
from bestrq2.evaluate.table import Table

TAGS = ("audio", "speech", "music", "self-supervised-learning", "audio-embeddings", "best-rq-2", "bestrq2")
CLASSIFIER_TAGS = ("audio", "audio-classification", "best-rq-2", "bestrq2")


@dataclass(frozen=True)
class ModelCard:
    """What a model card says; it names no path of the machine it was written on.

    Attributes:
        name: of the model.
        place: what `from_pretrained` and `bestrq2.load` are given in the examples.
        lead: what the model is, in a sentence or two.
        architecture: name → value.
        training: name → value; empty where nothing is known of it, which `lead` then says.
        figures: names of PNG files in the folder, "loss" for loss.png.
        probes: tables of probe scores under their titles.
        tests: of a classifier, tables of test scores under their titles: rows of cells, the header first.
        limits: sentences.
        license: identifier of the hub, as "mit" or "cc-by-4.0"; None where none was given.
        dataset: id of the hub's dataset it was trained on; None for anything else.
        base_model: id of the hub's model it was fine-tuned from; None for anything else.
        with_predictor: whether pretraining can go on from it.
        classes: names of the classes of a classifier; empty for an encoder.
        multi_label: whether a recording may have any number of classes.
        sampling_rate: Hz.
        width: values in an embedding.
    """

    name: str
    place: str
    lead: str
    architecture: dict[str, str]
    sampling_rate: int
    width: int
    training: dict[str, str] = field(default_factory=dict)
    figures: Sequence[str] = ()
    probes: dict[str, list[TaskScore]] = field(default_factory=dict)
    tests: dict[str, Table] = field(default_factory=dict)
    limits: Sequence[str] = ()
    license: str | None = None
    dataset: str | None = None
    base_model: str | None = None
    with_predictor: bool = False
    classes: Sequence[str] = ()
    multi_label: bool = False


def render_card(card: ModelCard) -> str:
    """The card as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it is no HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    tables = {title: format_scores(scores) for title, scores in card.probes.items()}
    template = environment.get_template("model_card.md.jinja")
    return template.render(card=card, metadata=_metadata(card), tables=tables, version=__version__)


def _metadata(card: ModelCard) -> str:
    """What the hub reads, as YAML."""
    task, tags = ("audio-classification", CLASSIFIER_TAGS) if card.classes else ("feature-extraction", TAGS)
    fields: dict[str, object] = {"library_name": "transformers", "pipeline_tag": task}
    if card.license is not None:
        fields["license"] = card.license
    if card.dataset is not None:
        fields["datasets"] = [card.dataset]
    if card.base_model is not None:
        fields["base_model"] = card.base_model
    return yaml.safe_dump({**fields, "tags": list(tags)}, sort_keys=False, allow_unicode=True)
