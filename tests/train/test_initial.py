"""A run that starts from a model has its weights and architecture, and needs it no more once it has begun."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import LOADER, TRAINER, at_step, die, same_runs, weights

import bestrq2
from bestrq2.commands.pretrain import pretrain
from bestrq2.convert.export import export_reference
from bestrq2.convert.loading import load_encoder
from bestrq2.errors import ConfigError
from bestrq2.evaluate.provenance import model_provenance
from bestrq2.inference.info import model_info
from bestrq2.report.model_card import origin_of
from bestrq2.text import flops_text
from bestrq2.train.finetuning import make_classifier
from bestrq2.train.objective import build_model
from bestrq2.train.settings import resolve


def continued(source: Path, data: Path, output: Path, steps: int = 1, **options: object) -> Path:
    """A run of a few steps, so small that the weights stay what they were, from the weights of `source`."""
    trainer, loader = {**TRAINER, "max_steps": steps}, LOADER | options.pop("loader", {})
    rates = {"lr": 1e-12, "weight_decay": 0.0}
    return pretrain(init=source, data=data, output=output, trainer=trainer, loader=loader, optimizer=rates, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, undisturbed: Callable[..., Path]) -> dict[str, Path]:
    """One encoder in every form in which a run can start from it."""
    root, run = tmp_path_factory.mktemp("sources"), undisturbed()
    bestrq2.export(run, root / "whole", with_predictor=True)
    bestrq2.export(run, root / "encoder")
    encoder = bestrq2.load(root / "encoder").model
    make_classifier(encoder, ["low", "high"], False, None, 0).save_pretrained(root / "classifier")
    return {"run": run, **{name: root / name for name in ("whole", "encoder", "classifier")}}


@pytest.mark.parametrize("kind", ["run", "whole", "encoder", "classifier"])
def test_a_run_starts_from_a_model_and_takes_what_it_lacks_from_its_seed(
    kind: str, sources: dict[str, Path], recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "bestrq2")
    run = continued(sources[kind], recordings, tmp_path / "run", seed=3, loader={"statistics_clips": 0})
    config = resolve(yaml.safe_load((run / "config.yaml").read_text()))
    assert (config.init, config.recipe) == (str(sources[kind]), "demo" if kind == "run" else "best-rq-2")
    assert config.model.hidden_size == 32
    whole = kind in ("run", "whole")
    expected = build_model(config).state_dict() | {
        name: value for name, value in weights(sources["run"]).items() if whole or name.startswith("bestrq2.")
    }
    found = weights(run)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)
    words = "encoder, predictor, head and quantizer" if whole else "predictor, mask token and head are initialised"
    assert words in caplog.text


def test_a_reference_checkpoint_is_a_start_too(tiny_pretraining, recordings: Path, tmp_path: Path):
    tiny_pretraining(max_seconds=2.5).save_pretrained(tmp_path / "model")
    export_reference(str(tmp_path / "model"), tmp_path / "released.safetensors")
    run = continued(tmp_path / "released.safetensors", recordings, tmp_path / "run")
    before, after = load_file(tmp_path / "model" / "model.safetensors"), weights(run)
    assert all(torch.allclose(value, after[name], rtol=0, atol=1e-9) for name, value in before.items())


def test_statistics_are_those_of_the_new_corpus_unless_the_model_s_are_kept(
    sources: dict[str, Path], tmp_path: Path, recordings: Path
):
    quiet = tmp_path / "data"
    shutil.copytree(recordings, quiet)
    for path in quiet.glob("0[2-9].wav"):
        path.unlink()
    runs = {
        clips: continued(sources["run"], quiet, tmp_path / f"{clips}", loader={"statistics_clips": clips})
        for clips in (0, 4)
    }
    mean = "bestrq2.statistics.mean"
    before, kept, own = (weights(run)[mean] for run in (sources["run"], runs[0], runs[4]))
    assert torch.equal(before, kept)
    assert (own - before).abs().max() > 0.1


def test_what_does_not_fit_is_listed(
    sources: dict[str, Path], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a folder "demo", as `make demo` leaves it, would be taken for the model
    changes = {"hidden_size": 64, "hop_length": 320, "mask_ratio": [0.5, 0.5]}
    with pytest.raises(ConfigError) as caught:
        continued(sources["encoder"], recordings, tmp_path / "run", model=changes)
    assert "model.hop_length is 625 there, 320 in the settings; model.hidden_size is 32 there, 64" in str(caught.value)
    assert "mask_ratio" not in str(caught.value)
    other = {"predictor_num_layers": 2}
    with pytest.raises(ConfigError, match=r"predictor_num_layers is 1 there, 2.*start from its encoder alone"):
        continued(sources["run"], recordings, tmp_path / "run", model=other)
    assert continued(sources["encoder"], recordings, tmp_path / "run", model=other).is_dir()
    with pytest.raises(ConfigError, match="demo: a recipe has no trained weights; give it as --recipe"):
        continued(Path("demo"), recordings, tmp_path / "random")
    with pytest.raises(ConfigError, match="statistics_clips 0 keeps the statistics of the model in --init"):
        pretrain(recipe="demo", data=recordings, output=tmp_path / "none", loader={"statistics_clips": 0})


def test_a_killed_run_resumes_exactly_without_the_model_and_tells_its_origin(
    sources: dict[str, Path], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    shutil.copytree(sources["run"], source)
    whole = continued(source, recordings, tmp_path / "whole", steps=6)
    with monkeypatch.context() as patch:
        at_step(patch, 3, die)
        with pytest.raises(RuntimeError, match="killed"):
            continued(source, recordings, tmp_path / "run", steps=6)
    source.rename(tmp_path / "gone")
    resumed = pretrain(**yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()), resume=True)
    assert same_runs(whole, resumed)
    origin = json.loads((resumed / "environment.json").read_text())["init"]
    assert (origin["model"], origin["recipe"], origin["step"]) == (str(source), "demo", 6)
    assert len(origin["sha256"]) == 64
    provenance = model_provenance(resumed, load_encoder(resumed).config)
    assert provenance["training_gflops"] == pytest.approx(2 * origin["training_gflops"])  # as many steps as the source
    assert f"trained with {flops_text(origin['training_gflops'])}" in model_info(resumed)["started from"]
    assert "for the first weights" in origin_of(str(resumed)).training["training compute"]
    assert "`source`" in origin_of(str(resumed)).sentence
    assert str(source) in model_info(resumed)["started from"]


def test_resuming_an_existing_run_wins_over_init(
    sources: dict[str, Path], undisturbed: Callable[..., Path], recordings: Path, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(undisturbed(), run)
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"output": run, "init": sources["encoder"]}
    settings["trainer"]["max_steps"] = 8
    pretrain(**settings, resume=True)
    assert "init" not in yaml.safe_load((run / "config.yaml").read_text())
    assert "init" not in json.loads((run / "environment.json").read_text())
