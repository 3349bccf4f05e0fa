"""Time and memory of a step: what is measured on a few rows holds for many, and the batch is chosen by it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from small_run import CONFORMER, LOADER, MODEL, TRAINER, same_runs, small_pretrain

import bestrq2
from bestrq2 import cli
from bestrq2.errors import ConfigError
from bestrq2.train import step_cost
from bestrq2.train.processes import launch
from bestrq2.train.settings import PretrainConfig, resolve
from bestrq2.train.step_cost import Line, StepMeter, fitting_seconds

AUTO = {"batch_seconds": "auto"}


def small_config(**groups: object) -> PretrainConfig:
    defaults = {"model": MODEL, "loader": LOADER, "trainer": TRAINER}
    return resolve({"recipe": "demo", "data": "x", "output": "y"} | {**defaults, **groups})


def meter(config: PretrainConfig) -> StepMeter:
    return StepMeter(config, launch(config.trainer))


def with_memory(monkeypatch: pytest.MonkeyPatch, config: PretrainConfig, rows: int) -> None:
    """Let so much memory be available that a step of so many rows fits."""
    needed = 2 * meter(config).memory().at(rows) + 1
    monkeypatch.setattr(step_cost, "available_bytes", lambda device: needed)


@pytest.mark.parametrize("model", [MODEL, MODEL | CONFORMER], ids=["vit", "conformer"])
def test_the_memory_of_a_large_batch_follows_from_that_of_small_ones(model: dict, monkeypatch: pytest.MonkeyPatch):
    config = small_config(model=model)
    line = meter(config).memory()
    monkeypatch.setattr(step_cost, "_COUNTED", (7, 12))
    assert meter(config).memory().at(20) == pytest.approx(line.at(20), rel=0.02)
    assert line.fixed >= 16 * sum(parameter.numel() for parameter in meter(config).parameters)


def test_a_line_never_falls_with_the_rows():
    assert Line.through((2, 10.0), (4, 14.0)).at(8) == 22.0
    assert Line.through((2, 10.0), (4, 9.0)) == Line(9.0, 0.0)
    assert Line.through((4, 8.0), (4, 8.0)).at(6) == 12.0


@pytest.mark.parametrize(
    ("rows", "batches", "seconds"), [(1000, 1, 80.0), (1000, 5, 75.0), (9, 1, 22.5), (3, 2, 15.0), (1, 1, 2.5)]
)
def test_auto_is_the_batch_of_the_recipe_or_what_fits(
    rows: int, batches: int, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "bestrq2")
    config = small_config(loader=AUTO, trainer=TRAINER | {"accumulate_grad_batches": batches})
    with_memory(monkeypatch, config, rows)
    assert fitting_seconds(config, launch(config.trainer)) == seconds
    assert ("the batch of the recipe" if rows == 1000 else "the recipe has 80: to keep that") in caplog.text


def test_auto_gives_a_cpu_no_more_than_recipes_for_cpus_do(monkeypatch: pytest.MonkeyPatch):
    config = resolve({"recipe": "best-rq-2", "data": "x", "output": "y", "model": MODEL, "loader": AUTO})
    with_memory(monkeypatch, config, 1000)
    assert fitting_seconds(config, launch(small_config().trainer)) == 320.0


def test_auto_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch):
    config = small_config(loader=AUTO)
    monkeypatch.setattr(step_cost, "available_bytes", lambda device: 10_000)
    with pytest.raises(ConfigError, match=r"a step of one row of 2\.5 s needs about .* GB, and 5e-06 GB can be used"):
        fitting_seconds(config, launch(config.trainer))
    sharded = small_config(loader=AUTO, trainer=TRAINER | {"strategy": "fsdp"})
    with pytest.raises(ConfigError, match="auto does not work with trainer"):
        fitting_seconds(sharded, launch(config.trainer))


def test_a_run_keeps_the_number_that_auto_became(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_memory(monkeypatch, small_config(loader=AUTO), 4)
    run = small_pretrain(recordings, tmp_path / "auto", loader=AUTO, trainer={"max_steps": 4})
    assert yaml.safe_load((run / "config.yaml").read_text())["loader"]["batch_seconds"] == 10.0
    given = small_pretrain(recordings, tmp_path / "given", loader={"batch_seconds": 10}, trainer={"max_steps": 4})
    assert same_runs(run, given)
    with_memory(monkeypatch, small_config(loader=AUTO), 7)
    small_pretrain(recordings, run, loader=AUTO, resume=True)
    assert yaml.safe_load((run / "config.yaml").read_text())["loader"]["batch_seconds"] == 10.0


def test_info_tells_how_long_a_run_takes_and_how_often_it_hears_the_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a folder "demo", as `make demo` leaves it, would be taken for the model
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump({"extends": "demo", "model": MODEL, "trainer": {"max_steps": 3600}}))
    facts = bestrq2.info(recipe, cost=False, hours=2, device="cpu")
    assert facts["hears"] == "80 h, each of the 2 h 40 times"
    assert facts["time per step"].endswith("s for 32 rows of 2.5 s")
    seconds, run = float(facts["time per step"].split()[0]), float(facts["time of the run"].split()[0])
    assert run * {"s": 1, "min": 60, "h": 3600}[facts["time of the run"].split()[1]] == pytest.approx(
        3600 * seconds, rel=0.02
    )
    assert "hears" in bestrq2.info(recipe, cost=False, device="cpu")
    for words, expected in (
        (["demo", "--hours", "-1"], "hours must be above 0"),
        (["demo", "--device", "tpu:9"], "device"),
    ):
        assert cli.run(["info", *words, "--no-cost"]) == 2
        assert expected in capsys.readouterr().err
