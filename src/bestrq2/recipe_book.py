"""Reader of recipes: YAML files that state only what differs from the recipes they extend.

The reader is not in the folder `recipes/` of the YAML files: importing a module of that name would replace the function
`bestrq2.recipes`.
"""

from __future__ import annotations

import copy
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from bestrq2.errors import ConfigError
from bestrq2.files import regular_file
from bestrq2.text import nearest

_FOLDER = resources.files("bestrq2") / "recipes"
_SUFFIXES = (".yaml", ".yml")
_SIZES = ("tiny", "small", "base", "large")
# Groups of settings in a recipe.
GROUPS = ("model", "loader", "optimizer", "trainer", "probe", "watch", "logging")


def recipes() -> list[str]:
    """Names of the recipes of the package, sorted."""
    return [name for name in _shipped() if not name.startswith("_")]


def recipe_names() -> str:
    """Names of the recipes in a line: those of one method and several sizes as "best-rq-2[-tiny|-small|-base]"."""
    names, shown = recipes(), []
    for name in names:
        sizes = [f"-{size}" for size in _SIZES if f"{name}-{size}" in names]
        if not any(name == f"{other}-{size}" for other in names for size in _SIZES):
            shown.append(f"{name}[{'|'.join(sizes)}]" if sizes else name)
    return ", ".join(shown)


def _shipped() -> list[str]:
    """Names of the recipes and of the fragments (`_tiny`, ...) that they extend."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def is_recipe_file(name: str) -> bool:
    """Whether a name is the path of a YAML file rather than a recipe of the package."""
    return name.endswith(_SUFFIXES)


def recipe(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe, with the settings of the recipes it extends.

    Args:
        name: one of `recipes()`, or a YAML file. Its entry `extends` names its base: a recipe, a file (relative to its
            own folder), or a list of them, of which later ones override earlier ones.

    Returns:
        `description` and groups of settings such as `model`, `loader`, `optimizer` and `trainer`. Settings that are not
        in it have the defaults of their group.

    Raises:
        ConfigError: if there is no such recipe, a file is not a recipe, or recipes extend each other in a circle.
    """
    wanted = os.fspath(name)
    if not is_recipe_file(wanted) and wanted not in recipes():
        raise ConfigError(_unknown(wanted))
    return _read(wanted, ())


def _unknown(name: str) -> str:
    hint = nearest(name, recipes()) or f"; recipes are {recipe_names()}, or a file ending in .yaml"
    return f"there is no recipe '{name}'{hint}"


def _read(name: str, chain: tuple[str, ...]) -> dict[str, Any]:
    """Settings of one recipe and of its bases; `chain` holds the recipes that extend this one."""
    if name in chain:
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join((*chain, name))}; remove one `extends`")
    chain = (*chain, name)
    settings = _load(name, chain)
    extended = settings.pop("extends", None)
    bases = [extended] if isinstance(extended, str) else extended or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{' -> '.join(chain)}: extends must be a recipe, a file or a list of them, got {extended!r}")
    for base in reversed(bases):
        beside = is_recipe_file(base) and is_recipe_file(name)
        path = os.path.normpath(Path(name).parent / Path(base).expanduser()) if beside else base
        settings = merge(_read(path, chain), settings)
    return settings


def _load(name: str, chain: tuple[str, ...]) -> dict[str, Any]:
    """Settings of one file, without those of its bases."""
    where = " -> ".join(chain)
    if is_recipe_file(name):
        try:
            text = regular_file(Path(name).expanduser()).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: this recipe cannot be read ({getattr(error, 'strerror', error)})") from error
    elif name in _shipped():
        text = _FOLDER.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"{where}: {_unknown(name)}")
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: this recipe is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: a recipe must hold groups of settings such as 'model:', got {settings!r}")
    for key, value in settings.items():
        if key not in (*GROUPS, "extends", "description"):
            raise ConfigError(
                f"{where}: a recipe has no '{key}'{nearest(str(key), GROUPS)}; it has {', '.join(GROUPS)} (data, "
                "output and seed are given on the command line)"
            )
        if key in GROUPS and not isinstance(value, dict | None):
            raise ConfigError(f"{where}: '{key}' must hold settings, one per line, got {value!r}")
    return {key: value for key, value in settings.items() if value is not None}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings `base`, overridden by `changes` group by group; neither is changed."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
