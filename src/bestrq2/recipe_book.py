"""Recipes: YAML files in `recipes/`, each stating only what differs from the one it extends.

The code does not live in `recipes/`, because importing a module of that name would put it in the place of the function
`bestrq2.recipes`.
"""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

import yaml

from bestrq2.errors import ConfigError
from bestrq2.flags import nearest

_FOLDER = resources.files("bestrq2") / "recipes"


def recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _FOLDER.iterdir()
        if entry.name.endswith(".yaml") and not entry.name.startswith("_")
    )


def recipe(name: str) -> dict[str, Any]:
    """The resolved settings of a recipe.

    Args:
        name: one of `recipes()`.

    Returns:
        `description` and the groups `model`, `loader`, `optimizer`, `trainer`; what a group does not name has the
        default of its class.

    Raises:
        ConfigError: if there is no such recipe.
    """
    if name not in recipes():
        raise ConfigError(f"there is no recipe '{name}'{nearest(name, recipes())}; recipes are {', '.join(recipes())}")
    return _read(name)


def _read(name: str) -> dict[str, Any]:
    settings = yaml.safe_load(_FOLDER.joinpath(f"{name}.yaml").read_text())
    extended = settings.pop("extends", None)
    for base in [extended] if isinstance(extended, str) else reversed(extended or []):
        settings = merge(_read(base), settings)
    return settings


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, group by group; neither is altered."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
