"""Settings: ranges of values and pairs of settings are checked wherever the values come from."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bestrq2.errors import ConfigError
from bestrq2.flags import parse_flags
from bestrq2.train.settings import (
    FinetuneConfig,
    LoaderConfig,
    OptimizerConfig,
    TrainerConfig,
    build_config,
    parse_arguments,
    pretrain_parser,
    resolve,
)

BASE = {"recipe": "demo", "data": "x", "output": "y"}


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("trainer.max_steps", 0, "trainer.max_steps must be above 0, got 0"),
        ("trainer.devices", 0, "trainer.devices must be above 0 or -1, got 0"),
        ("trainer.strategy", "ddq", "trainer.strategy must be one of auto, fsdp, got ddq"),
        ("trainer.gradient_clip_val", 0.0, "trainer.gradient_clip_val must be above 0, got 0.0"),
        ("trainer.precision", "bf16-true", "trainer.precision must keep weights and targets in float32"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas must be at least 0 and below 1, got 1.0"),
        ("optimizer.final_lr_ratio", 1.5, "optimizer.final_lr_ratio must be at least 0 and at most 1, got 1.5"),
        ("loader.num_workers", -1, "loader.num_workers must be at least 0, got -1"),
        ("probe.clips", 1, "probe.clips must be at least 2, got 1"),
        ("seed", -1, "seed must be at least 0, got -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limits_by_flags_and_by_dictionaries(
    setting: str, value: Any, expected: str
):
    group, _, name = setting.rpartition(".")
    with pytest.raises(ConfigError) as caught:
        resolve({**BASE, **({group: {name: value}} if group else {name: value})})
    assert expected in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*["--recipe", "demo", "--data", "x", "--output", "y"], f"--{setting}={value}"])
    assert expected in str(caught.value)


def test_every_number_is_finite_and_in_range_or_refused_in_a_sentence_that_names_it():
    parser, values = pretrain_parser("demo"), ("nan", "inf", "-inf", "1e400", "-1", "0", "abc", "")
    numbers = [action for action in parser._actions if action.metavar in ("INT", "NUMBER", "[NUMBER, NUMBER]")]
    assert len(numbers) > 40
    for action in numbers:
        for value in values:
            try:
                flags = ["--data", "x", "--output", "y", f"--{action.dest}={value}"]
                found = build_config(parse_flags(parser, flags)).to_dict()
            except ConfigError as error:
                sentence = str(error)
                assert action.dest.rpartition(".")[2] in sentence
                assert "\n" not in sentence
                assert value == "0" or any(word in sentence for word in (" got ", "has no value", " must "))
                continue
            for key in action.dest.split("."):
                found = found[key]
            assert math.isfinite(found), (action.dest, value)
            assert value in ("0", "-1")


def test_groups_made_in_python_are_checked_as_well():
    for make, expected in (
        (lambda: TrainerConfig(max_steps=0), r"trainer\.max_steps must be above 0, got 0"),
        (lambda: TrainerConfig(strategy="fsp"), r"trainer\.strategy must be one of auto, fsdp.*did you mean 'fsdp'"),
        (lambda: OptimizerConfig(betas=(0.1, 1.0)), r"optimizer\.betas must be at least 0 and below 1"),
        (lambda: OptimizerConfig(lr=float("inf")), r"optimizer\.lr must be finite"),
        (lambda: FinetuneConfig("m", "l", Path("o"), epochs=0), "epochs must be above 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=expected):
            make()
    assert type(LoaderConfig(batch_seconds=8).batch_seconds) is float


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"trainer": {"strategy": "fsdp", "ema": True}}, "trainer.ema does not work with trainer.strategy fsdp"),
        ({"trainer": {"strategy": "fsdp", "devices": -1}}, "needs a number in trainer.devices"),
        (
            {"trainer": {"accumulate_grad_batches": 3}, "loader": {"batch_seconds": 39}},
            "(39) makes 8 rows of 5 s, which must be a multiple of trainer.accumulate_grad_batches (3)",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_named(groups: dict[str, Any], expected: str):
    with pytest.raises(ConfigError) as caught:
        resolve({**BASE, **groups})
    assert expected in str(caught.value)


def test_a_configuration_written_as_yaml_is_read_back_and_removed_fields_are_ignored():
    config = resolve({**BASE, "trainer": {"max_steps": 7, "ema": True}, "optimizer": {"betas": [0.9, 0.95]}})
    written = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert resolve(written).to_dict() == config.to_dict()
    written["probe"]["max_share"], written["logging"]["mlflow"] = 0.05, None
    assert resolve(written).to_dict() == config.to_dict()


def test_a_resumed_run_keeps_what_is_not_given_and_takes_what_is(tmp_path: Path):
    config = resolve(
        {**BASE, "output": str(tmp_path), "seed": 5, "model": {"hidden_size": 96}, "trainer": {"ema": True}}
    )
    stored, given = config.to_dict(), tmp_path / "given.yaml"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    given.write_text("trainer: {max_steps: 900}\n")
    stored["trainer"] |= {"max_steps": 900, "keep_last": 4}
    flags = ["--output", str(tmp_path), "--resume", "--config", str(given), "--trainer.keep_last", "4"]
    assert parse_arguments(flags)[0].to_dict() == stored
    groups = {"trainer": {"max_steps": 900, "keep_last": 4}}
    assert resolve({"data": None, "output": str(tmp_path), "resume": True, **groups}).to_dict() == stored


def test_settings_are_read_without_torch():
    code = (
        "import sys\nfrom bestrq2.train.settings import parse_arguments\n"
        "parse_arguments('--recipe demo --data x --output y --trainer.max_steps 3'.split())\n"
        "assert not {'torch', 'transformers', 'numpy', 'lightning_fabric'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
