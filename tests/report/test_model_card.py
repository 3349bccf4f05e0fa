"""Model cards hold what a run records, state what is unknown, and contain no path of this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from example_runs import write_run

import bestrq2
from bestrq2 import BestRQ2Model
from bestrq2.convert.hub import write_model
from bestrq2.evaluate.finetuned import Predictions, finetune_result, write_finetune_result
from bestrq2.evaluate.metrics import wilson_interval
from bestrq2.evaluate.result import PROBE, Result, write_result
from bestrq2.report import model_card
from bestrq2.report.model_card import Origin, card_files, render_card
from bestrq2.train.finetuning import make_classifier

ENVIRONMENT = {
    "bestrq2": "0.1.0", "packages": {"torch": "2.13.0"}, "gpus": ["H100"] * 2, "recordings": 1200, "held_out": 64,
    "command": ["/home/someone/bestrq2"],
}  # fmt: skip


def card_text(source: Path | str, **changes) -> str:
    model = BestRQ2Model(bestrq2.BestRQ2Config(**bestrq2.recipe("best-rq-2-tiny")["model"]))
    return card_of_model(source, model, **changes)


def card_of_model(source: Path | str, model, **changes) -> str:
    options = {"place": "user/encoder", "license": "cc-by-4.0"} | changes
    return card_files(str(source), model, **options)["README.md"]


def metadata(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def row(card: str, name: str) -> str:
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)[1]


@pytest.fixture
def run(tmp_path) -> Path:
    folder = write_run(tmp_path / "secret" / "run-7", recipe="/home/someone/mask.yaml", seed=3)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "model").mkdir()
    (folder / "model" / "training.json").write_text('{"step": 400}')
    return folder


def test_a_run_fills_the_card(run):
    card = card_text(run)
    settings = bestrq2.recipe("best-rq-2-tiny")
    assert metadata(card)["license"] == "cc-by-4.0"
    assert metadata(card)["library_name"] == "transformers"
    assert metadata(card)["pipeline_tag"] == "feature-extraction"
    assert row(card, "recipe") == "mask"
    assert row(card, "data") == "`soundworld`, 1,200 recordings (64 of them for validation)"
    assert row(card, "seed") == "3"
    assert row(card, "steps").startswith(f"400 of 400, {settings['loader']['batch_seconds']} s each, in rows of 10 s")
    assert row(card, "trained with") == "bestrq2 0.1.0, torch 2.13.0, 2 x H100"
    assert row(card, "wall time") == "44 s"  # 0.11 s a step
    last = [line for line in (run / "metrics.csv").read_text().splitlines() if line][-1].split(",")
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    loss = float(last[header.index("validation/loss")])
    assert float(row(card, "final loss (validation)")) == pytest.approx(loss, abs=6e-4)
    assert "soundworld-2" in card
    assert re.search(r"^  language +0\.0 +65\.0 ", card, re.MULTILINE)  # speech is 5 points above the mean of 60
    assert "![loss](loss.svg)" in card
    assert 'bestrq2.load("user/encoder")' in card
    assert "2606.30700" in card
    assert "/home" not in card
    assert "secret" not in card


def test_an_exported_run_shows_its_curves(run, tiny_pretraining, tmp_path):
    tiny_pretraining().save_pretrained(run / "model")
    bestrq2.export(run, tmp_path / "out")
    figures = sorted((tmp_path / "out").glob("*.svg"))
    assert [figure.name for figure in figures] == ["codes.svg", "loss.svg"]
    for figure in figures:
        assert f"({figure.name})" in (tmp_path / "out" / "README.md").read_text()
        root = ElementTree.parse(figure).getroot()
        curves = [path for path in root.iter() if "stroke:#0067a5" in (path.get("style") or "")]
        assert len(curves) == {"loss.svg": 6, "codes.svg": 3}[figure.name] + 1  # and one in the legend


def test_unfinished_runs_and_stale_probes_are_noted(tmp_path):
    run = write_run(tmp_path / "run", steps=400, reached=220, quality=0.01)
    (run / "model").mkdir()
    (run / "model" / "training.json").write_text('{"step": 200}')
    card = card_text(run)  # its scores are of step 220
    assert "Training was not finished: these weights are of step 200 of 400." in card
    assert row(card, "steps").startswith("200 of 400")
    assert re.search(r"Its validation excess loss is \+\d\.\d+ nats", card)
    assert "This model was not probed." in card


def test_scores_on_other_tasks_are_shown(run, monkeypatch):
    monkeypatch.setattr(model_card, "training_figures", lambda run: {})
    scores = model_card.origin_of(str(run)).probes
    (run / "soundworld-2.json").unlink()
    write_result(run / "probes.json", Result(PROBE, "best-rq-2", tuple(next(iter(scores.values())))))
    card = card_text(run)
    assert "Linear probe and k-NN on labelled audio" in card
    assert "not probed" not in card


@pytest.mark.parametrize(
    ("data", "shown", "dataset"),
    [
        ("/home/someone/private/birds", "`birds`", None),
        ("../birds/", "`birds`", None),
        ("hub:someone/birds?split=train", "the hub's dataset someone/birds", "someone/birds"),
        ("hub:/data/birds", "`birds`", None),
        ("https://key:word@host.org/birds-{00..99}.tar?token=1", "`birds-{00..99}.tar`", None),
        ("soundworld:1200", "`soundworld:1200`", None),
    ],
)
def test_data_is_named_without_its_place(tmp_path, monkeypatch, data, shown, dataset):
    monkeypatch.setattr(model_card, "training_figures", lambda run: {})
    run = write_run(tmp_path / "run", changes={"data": data}, probe=None)
    card = card_text(run)
    assert row(card, "data") == shown
    assert metadata(card).get("datasets", [None])[0] == dataset
    assert not re.search(r"someone/private|word@|token=", card)


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("kind", ["recipe", "checkpoint", "folder", "hub", "empty run"])
def test_cards_of_other_sources_state_what_is_unknown(tmp_path, kind):
    (tmp_path / "model").mkdir()
    (tmp_path / "weights.ckpt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("recipe: demo\n")
    source = {"recipe": "demo", "hub": "user/model", "empty run": tmp_path / "run", "folder": tmp_path / "model"}
    said = {
        "recipe": "the untrained model of the recipe demo",
        "checkpoint": "converted from a reference checkpoint `weights.ckpt`",
        "folder": "converted from the model `model`",
        "hub": "converted from the model `user/model`",
        "empty run": "in the run `run`, whose settings or losses cannot be read",
    }
    card = card_text(source.get(kind, tmp_path / "weights.ckpt"), license=None)
    assert said[kind] in card
    assert "Data, recipe, steps and losses are unknown." in card
    assert "No licence was given" in card
    assert "license" not in metadata(card)
    assert str(tmp_path) not in card


def finetuned_run(folder: Path, multi_label: bool = False, tested: bool = True, **environment) -> Path:
    """A run as fine-tuning leaves it: four test recordings of three classes, of the last of which there is none."""
    folder.mkdir(parents=True)
    settings = {
        "model": "/home/someone/runs/big", "labelled": "/home/someone/secret/birds.csv", "output": str(folder),
        "mode": "partial", "layers": 2, "epochs": 8, "batch_size": 32, "lr": 1e-4, "weight_decay": 0.05,
        "warmup_fraction": 0.1, "layer_decay": 0.75, "balanced": True, "max_seconds": None, "seed": 5,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    facts = ENVIRONMENT | {"recordings": 1200, "train": 1100, "valid": 96, "test": 4, "base_model": None} | environment
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "metrics.csv").write_text("step,epoch,train/loss,valid/loss\n35,1,0.5,0.4\n70,2,0.3,0.3\n")
    if tested:
        targets = np.eye(3, dtype=np.float32)[[0, 0, 0, 1]]
        probabilities = np.array([[0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1]])
        predictions = Predictions(list("abcd"), targets, probabilities)
        result = finetune_result("run", ("finch", "tit", "a|b"), multi_label, 6, predictions, 0)
        write_finetune_result(folder, result, predictions)
    return folder


def classifier(tiny_config, classes=("finch", "tit", "a|b"), multi_label=False):
    encoder = BestRQ2Model(tiny_config())
    model = make_classifier(encoder, classes, multi_label, None, 0).eval()
    model.config.architectures = [type(model).__name__]  # as if loaded
    return model


def test_a_fine_tuned_run_fills_the_card_of_a_classifier(tmp_path, tiny_config):
    run = finetuned_run(tmp_path / "secret" / "run")
    card = card_of_model(run, classifier(tiny_config))
    assert metadata(card)["pipeline_tag"] == "audio-classification"
    assert "base_model" not in metadata(card)
    assert "a linear head that predicts exactly one of 3 classes. It was fine-tuned from `big` on `birds.csv`." in card
    assert row(card, "labelled data").startswith("`birds.csv`, 1,200 recordings (1,100 for training, 96 for validation")
    assert row(card, "labelled data").endswith("4 for test), 3 classes, one per recording")
    assert row(card, "classes") == "finch, tit, a\\|b"
    assert row(card, "trained") == "the head and the last 2 blocks (mode partial)"
    assert row(card, "epochs") == "8; the weights are those of epoch 6, the best in validation"
    assert (row(card, "layer decay"), row(card, "classes drawn equally often")) == ("0.75", "yes")
    low, high = wilson_interval(3, 4)
    assert row(card, "accuracy") == f"75.0 | [{100 * low:.1f}, {100 * high:.1f}] | 75.0"
    assert row(card, "balanced accuracy").startswith("83.3 | [")  # of recalls 2/3 and 1
    assert row(card, "finch") == "3 | 100.0 | 66.7 | 80.0"
    assert row(card, "a\\|b") == "0 | - | - | -"
    assert 'pipeline("audio-classification", model=place' in card
    assert 'bestrq2 predict "user/encoder" FOLDER' in card
    for absent in ("/home", "secret", ".svg", "parameters in pretraining", "training step", "probed", "final loss"):
        assert absent not in card, absent


def test_a_fine_tuned_run_of_several_classes_that_was_not_tested(tmp_path, tiny_config):
    run = finetuned_run(tmp_path / "run", tested=False, base_model="someone/encoder")
    card = card_of_model(run, classifier(tiny_config, tuple(f"c{number}" for number in range(30)), multi_label=True))
    assert metadata(card)["base_model"] == "someone/encoder"
    assert "fine-tuned from the hub's model `someone/encoder`" in card
    assert "predicts any number of 30 classes" in card
    assert row(card, "classes").endswith("c18, c19, … (`id2label` in config.json)")
    assert row(card, "epochs") == "8"
    assert "Test scores of this classifier are unknown." in card
    assert "fine-tuning was not finished" in card
    assert "always sum to 1" not in card


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_python_of_a_classifier_runs(tmp_path, tiny_config, monkeypatch, multi_label):
    model = classifier(tiny_config, multi_label=multi_label)
    run = finetuned_run(tmp_path / "run", multi_label)
    text = card_of_model(run, model, place="tuned")
    write_model(tmp_path / "tuned", model)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    probabilities = names["probabilities"]
    found = {one["label"]: one["score"] for one in names["found"]}
    assert found == pytest.approx(dict(zip(("finch", "tit", "a|b"), probabilities[0].tolist(), strict=True)), abs=1e-5)
    if multi_label:
        expected = [{name for name, share in found.items() if share >= 0.5}]
        assert [set(names["labels"][0])] == expected
    else:
        assert names["labels"][0] == max(found, key=found.get)


def test_names_cannot_break_the_card(tiny_encoder):
    origin = Origin("It.", training={"x|y": "1|2\n3"}, dataset="a: b")
    text = render_card(origin, tiny_encoder(), "a: b", "mit")
    assert metadata(text)["datasets"] == ["a: b"]
    assert "| x\\|y | 1\\|2 3 |" in text


def test_its_python_runs(tmp_path, tiny_encoder, monkeypatch):
    write_model(tmp_path / "encoder", tiny_encoder())
    text = card_text("demo", place="encoder")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks[1:]:  # the first reads a file
        exec(block, names)
    assert names["output"].pooler_output.shape == (2, 32)
    assert names["frames"].shape[-1] == 32
