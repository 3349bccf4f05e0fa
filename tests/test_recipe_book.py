"""Recipes of users: YAML files that extend others, and what is wrong with them said in words."""

from __future__ import annotations

from pathlib import Path

import pytest

import bestrq2
from bestrq2 import BestRQ2Config
from bestrq2.errors import ConfigError
from bestrq2.recipe_book import GROUPS
from bestrq2.train import settings
from bestrq2.train.settings import parse_arguments, resolve

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def write(tmp_path):
    def written(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return written


def test_a_recipe_file_overrides_the_recipe_it_extends(write):
    write("wide.yaml", "extends: best-rq-2-tiny\nmodel: {hidden_size: 96}\n")
    path = write("ablation.yaml", "extends: wide.yaml\nmodel: {mask_ratio: [0.8, 0.8]}\ntrainer: {max_steps: 7}\n")
    base, found = bestrq2.recipe("best-rq-2-tiny"), bestrq2.recipe(path)
    assert found["model"] == {**base["model"], "hidden_size": 96, "mask_ratio": [0.8, 0.8]}
    assert found["trainer"] == {**base["trainer"], "max_steps": 7}
    assert found["optimizer"] == base["optimizer"]


def test_the_last_of_several_bases_wins(write):
    write("a.yaml", "model: {hidden_size: 96}")
    write("b.yaml", "model: {hidden_size: 48, num_hidden_layers: 3}")
    path = write("c.yaml", "extends: [best-rq-2-tiny, b.yaml, a.yaml]")
    model = bestrq2.recipe(path)["model"]
    assert (model["hidden_size"], model["num_hidden_layers"], model["codebook_size"]) == (96, 3, 2048)


def test_a_relative_base_is_resolved_from_the_file_that_names_it(write):
    write("inner/base.yaml", "extends: best-rq-2-tiny\nmodel: {hidden_size: 96}")
    write("inner/step.yaml", "extends: base.yaml")
    path = write("outer.yaml", "extends: inner/step.yaml")
    assert bestrq2.recipe(path)["model"]["hidden_size"] == 96


def test_a_circle_of_recipe_files_is_refused_with_its_chain(write):
    first = write("first.yaml", "extends: second.yaml")
    second = write("second.yaml", "extends: third.yaml")
    third = write("third.yaml", "extends: first.yaml")
    with pytest.raises(ConfigError) as error:
        bestrq2.recipe(first)
    assert f"{first} -> {second} -> {third} -> {first}" in str(error.value)


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("best-rq-2-tyni", "there is no recipe 'best-rq-2-tyni'; did you mean 'best-rq-2-tiny'?"),
        ("gone.yaml", "cannot be read (No such file or directory)"),
        ("[1, 2]", "extends must be a recipe, a file or a list of them, got [1, 2]"),
    ],
)
def test_an_unknown_base_is_refused_with_its_chain(write, base, sentence):
    middle = write("middle.yaml", f"extends: {base}")
    path = write("top.yaml", "extends: middle.yaml")
    with pytest.raises(ConfigError) as error:
        bestrq2.recipe(path)
    assert f"{path} -> {middle}" in str(error.value)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {mask_ration: [0.8, 0.8]}", "no setting 'model.mask_ration'; did you mean 'model.mask_ratio'?"),
        ("model: {hidden_size: wide}", "model.hidden_size: expected int, got wide"),
        ("model: {hidden_size: 97}", "hidden_size (97) must be a multiple of num_attention_heads"),
        ("- a list", "a recipe must hold groups of settings"),
        ("model: {", "this recipe is not YAML"),
    ],
)
def test_errors_in_a_recipe_file_are_named(write, text, sentence):
    path = write(
        "mine.yaml", text if text.startswith("-") or text.endswith("{") else f"extends: best-rq-2-tiny\n{text}"
    )
    with pytest.raises(ConfigError) as error:
        parse_arguments(["--recipe", path, "--data", "x", "--output", "y"])
    assert sentence in str(error.value)


def test_flags_override_a_recipe_file_and_config_yaml_is_self_contained(write):
    path = write("mine.yaml", "extends: best-rq-2-tiny\nmodel: {hidden_size: 96}")
    config, _ = parse_arguments(["--recipe", path, "--data", "x", "--output", "y", "--model.mask_ratio", "[0.7, 0.7]"])
    assert config.model.hidden_size == 96
    assert config.model.mask_ratio == [0.7, 0.7]
    Path(path).unlink()
    again = resolve(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_load_accepts_a_recipe_file(write):
    path = write("mine.yaml", "extends: best-rq-2-tiny\nmodel: {hidden_size: 96, num_hidden_layers: 1}")
    assert bestrq2.load(path).config.hidden_size == 96


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/[!_]*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_file_of_the_examples_is_valid(path):
    model = bestrq2.recipe(path)["model"]
    assert BestRQ2Config(**model).patch_rows >= 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 3", "a recipe has no 'seed'"),
        ("modle: {hidden_size: 96}", "a recipe has no 'modle'; did you mean 'model'?"),
        ("optimizer: 5", "'optimizer' must hold settings, one per line, got 5"),
        ("model: [1, 2]", "'model' must hold settings, one per line, got [1, 2]"),
    ],
)
def test_an_unknown_group_of_settings_is_refused_wherever_recipes_are_read(write, text, sentence):
    path = write("mine.yaml", f"extends: best-rq-2-tiny\n{text}")
    for take in (bestrq2.recipe, bestrq2.load):
        with pytest.raises(ConfigError) as error:
            take(path)
        assert sentence in str(error.value)


def test_a_missing_recipe_file_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        bestrq2.load(str(tmp_path / "gone.yaml"))


def test_a_recipe_may_set_every_group_of_a_run():
    assert set(GROUPS) == {"model", *settings.GROUPS}
