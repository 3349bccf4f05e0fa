"""Flags and YAML files to values, with errors of one sentence that name the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse import ArgumentError as ParserError

from bestrq2.errors import ConfigError


def make_parser(command: str, description: str) -> ArgumentParser:
    """An empty parser of one command, with `--config FILE` and `--print-config`."""
    parser = ArgumentParser(
        prog=f"bestrq2 {command}", description=description, print_config="--print-%s", exit_on_error=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings.")
    return parser


def parse_flags(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line.

    Raises:
        ConfigError: for unknown flags, with the nearest known one, and for values of the wrong type.
    """
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in argv:
        flag = argument.split("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in known:
            raise ConfigError(f"there is no setting '{flag}'{nearest(flag, known)}")
    try:
        return parser.parse_args(list(argv))
    except (ParserError, TypeError, ValueError) as error:
        raise ConfigError(_one_sentence(error, known)) from error


def parse_settings(parser: ArgumentParser, settings: dict[str, Any]) -> Namespace:
    """Check nested settings (`{"trainer": {"max_steps": 50}}`) as if they had come as flags.

    Raises:
        ConfigError: as `parse_flags`.
    """
    known = [action.dest for action in parser._actions]
    settings = {key: value for key, value in settings.items() if value is not None}
    for group, values in settings.items():
        for key in [f"{group}.{key}" for key in values] if isinstance(values, dict) else [group]:
            if key not in known:
                raise ConfigError(f"there is no setting '{key}'{nearest(key, known)}")
    try:
        return parser.parse_object(settings)
    except (ParserError, TypeError, ValueError) as error:
        raise ConfigError(_one_sentence(error, known)) from error


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint that names the known key most like `name`; empty where none is alike."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


_WRONG_TYPE = re.compile(r'Parser key "([^"]+)": (.*)')
_REFUSED_KEY = re.compile(
    r"does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted|Key '([\w.]+)' is not expected"
    r"|[Uu]nrecognized arguments: -*([\w.]+)"
)


def _one_sentence(error: Exception, known: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    if refused := _REFUSED_KEY.search(text):
        key = next(group for group in refused.groups() if group).split(".")[-1]
        return f"there is no setting '{key}'{nearest(key, [option.lstrip('-').split('.')[-1] for option in known])}"
    if wrong := _WRONG_TYPE.search(text):
        details = re.sub(r"Expected an? <class '(?:\w+\.)*(\w+)'>\.", r"expected \1,", wrong[2])
        return f"{wrong[1]}: {details.replace('Got value:', 'got')}"
    return text
