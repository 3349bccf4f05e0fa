"""How a recipe, files and flags become one validated configuration of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from bestrq2.errors import ConfigError
from bestrq2.flags import make_parser, parse_flags, parse_settings
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.fields import FIELD_TYPES, ModelFields
from bestrq2.recipe_book import is_recipe_file, recipe, recipes
from bestrq2.train.settings import DEFAULT_RECIPE, GROUPS, PretrainConfig, check_settings

_DATA = (
    'folder of audio or of tars, file, list (.txt, .csv, .jsonl), pattern ("shards/*.tar"), mixture (.yaml), HDF5 '
    '(.h5), Hub dataset ("hub:NAME"), remote tars ("https://host/shard-{000..099}.tar"), or "soundworld"'
)


def pretrain_parser(name: str = DEFAULT_RECIPE) -> ArgumentParser:
    """A parser of everything a run can be told, with the values of a recipe as defaults."""
    parser = make_parser("pretrain", "Pretrain an encoder on unlabelled audio.")
    parser.add_argument("--recipe", default=name, help=f"one of {', '.join(recipes())}, or a YAML file on top of one")
    parser.add_argument("--data", type=str | None, help=_DATA)
    parser.add_argument("--output", type=str | None, help="run folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order, crops and masks")
    _add_model_arguments(parser)
    for group, kind in GROUPS.items():
        parser.add_class_arguments(kind, group)
    parser.set_defaults(_defaults(parser, name))
    return parser


def _defaults(parser: ArgumentParser, name: str) -> dict[str, Any]:
    """The settings of a recipe by dotted name, their names and types checked."""
    settings = recipe(name)
    settings.pop("description", None)
    try:
        parse_settings(parser, settings)
    except ConfigError as error:
        raise ConfigError(f"recipe {name}: {error}") from error
    return {f"{group}.{key}": value for group, values in settings.items() for key, value in values.items()}


def _add_model_arguments(parser: ArgumentParser) -> None:
    """Add one flag per architecture field, with its type and the help of its docstring."""
    group = parser.add_argument_group("The architecture")
    entries = re.findall(r"^        (\w+): (.*?)(?=^        \w+: |^    \Z|\Z)", ModelFields.__doc__ or "", re.M | re.S)
    helps = {name: " ".join(text.split()) for name, text in entries}
    for name, hint in FIELD_TYPES.items():
        default = getattr(ModelFields, name)
        group.add_argument(f"--model.{name}", type=hint, default=default, help=helps[name])


def parse_arguments(argv: Sequence[str]) -> tuple[PretrainConfig, bool]:
    """Flags (and the files they name) to a configuration, and whether to resume.

    Raises:
        ConfigError: for unknown flags, wrong values, or values at odds with each other.
    """
    parser = pretrain_parser(_recipe_of(argv))
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    parsed = parse_flags(parser, argv)
    resume = parsed.pop("resume")
    return build_config(parsed), resume


def resolve(settings: dict[str, Any]) -> PretrainConfig:
    """Nested settings, such as those of `config.yaml` or of a notebook, laid over their recipe.

    Raises:
        ConfigError: as `parse_arguments`.
    """
    return build_config(parse_settings(pretrain_parser(_base_of(settings)), settings))


def _recipe_of(argv: Sequence[str]) -> str:
    """The recipe the flags (or the YAML file they name) ask for: its values are the defaults of all others."""
    found: dict[str, str] = {}
    for flag in ("--recipe", "--config"):
        for index, argument in enumerate(argv):
            if argument == flag and index + 1 < len(argv):
                found[flag] = argv[index + 1]
            elif argument.startswith(f"{flag}="):
                found[flag] = argument.split("=", 1)[1]
    if "--recipe" not in found and "--config" in found:
        path = Path(found["--config"])
        try:
            loaded = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
        if isinstance(loaded, dict):
            return _base_of(loaded)
    return found.get("--recipe", DEFAULT_RECIPE)


def _base_of(settings: dict[str, Any]) -> str:
    """The recipe that settings start from.

    The config.yaml of a run states every setting: it needs no recipe, and so outlives a recipe file that has gone. What
    later versions add has defaults that change nothing.
    """
    name = str(settings.get("recipe") or DEFAULT_RECIPE)
    gone = is_recipe_file(name) and not Path(name).expanduser().is_file()
    return DEFAULT_RECIPE if gone and {"data", "seed", "model", *_STATED} <= set(settings) else name


_STATED = ("loader", "optimizer", "trainer", "probe")


def build_config(parsed: Namespace) -> PretrainConfig:
    """Validate parsed settings as a whole.

    Raises:
        ConfigError: for values out of range or at odds with each other.
    """
    settings = parsed.as_dict()
    for name in ("data", "output"):
        if not settings.get(name):
            raise ConfigError(f"--{name} is missing: say {_MISSING[name]}")
    groups = {name: kind(**settings[name]) for name, kind in GROUPS.items()}
    try:
        model = BestRQ2Config(**settings["model"])
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    config = PretrainConfig(
        recipe=settings["recipe"],
        data=settings["data"],
        output=Path(settings["output"]),
        seed=settings["seed"],
        model=model,
        **groups,
    )
    check_settings(config)
    return config


_MISSING = {
    "data": "where the audio is, a folder for instance",
    "output": "which folder the run shall be written to",
}
