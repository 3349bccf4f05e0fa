"""Command-line flags from typed signatures, YAML settings, and their errors in one sentence.

A flag has the name, type and default of a parameter, and the help of its line under "Args:" in the docstring.
jsonargparse parses and checks the values; the help page and the errors are written here.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse import ArgumentError as ParserError

from bestrq2.errors import ConfigError
from bestrq2.text import nearest

_BOOLEANS = ("true", "false", "yes", "no")
_NAMES = {int: "int", float: "number", str: "string", bool: "true or false", Path: "path", dict: "mapping"}
_EMPTY = inspect.Parameter.empty
_METAVARS = {int: "INT", float: "NUMBER", Path: "PATH"}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help page on which switches take no value and every type has a short spelling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 30})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, ActionConfigFile):
            return "--config FILE"
        if action.dest.startswith("print_"):
            return "--print-config"
        if not action.option_strings:
            return str(action.metavar or action.dest.upper())
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        flag, hint = action.option_strings[0], getattr(action, "_typehint", None)
        if _is_switch(action) and "." not in flag:
            return flag.replace("--", "--[no-]" if action.default is True else "--", 1)
        return f"{flag} {action.metavar or _metavar(hint, action.dest.split('.')[-1])}"

    def _get_help_string(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        if hint is None or not action.option_strings:
            return action.help or ""
        notes = [type_words(hint)] if get_origin(_without_none(hint)) not in (None, Literal) else []
        if not (action.required or action.default is None or action.default is False):
            notes.append(f"default: {_shown(action.default)}")
        return f"{action.help or ''} ({'; '.join(notes)})" if notes else action.help or ""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # Paragraphs are wrapped; indented ones, such as examples, stay as they are.
        parts = text.split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in parts)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Names such as best-rq-2-tiny are not broken at their hyphens.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def make_parser(command: str, description: str, usage: str | None = None) -> ArgumentParser:
    """An empty parser of one command, with `--config FILE` and `--print-config`."""
    parser = ArgumentParser(
        prog=f"bestrq2 {command}",
        usage=usage,
        description=description,
        formatter_class=_Formatter,
        print_config="--print-%s",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    parser._option_string_actions["--print-config"].help = "print all settings as YAML and exit"
    parser._positionals.title, parser._optionals.title = "arguments", "general"
    return parser


def add_arguments(
    container: Any,
    source: Callable[..., Any],
    *,
    group: str = "",
    positional: Sequence[str] = (),
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> None:
    """Add one argument per parameter of a function, or per field of a dataclass.

    Args:
        container: a parser, or an argument group of one.
        source: function or dataclass with type hints and a docstring with "Args:".
        group: prefix of the flags; "trainer" gives `--trainer.max_steps`.
        positional: parameters given without a flag.
        only: parameters to add; all by default.
        skip: parameters to leave out.
    """
    helps = document(source)[1]
    for name, parameter in inspect.signature(source).parameters.items():
        if name not in skip and (only is None or name in only):
            path = f"{group}.{name}" if group else name
            hint = _evaluated(parameter.annotation, source)
            add_argument(container, path, hint, parameter.default, helps.get(name, ""), positional=name in positional)


def add_argument(container: Any, name: str, hint: Any, default: Any, help: str, *, positional: bool = False) -> None:
    """Add one argument; it is required where `default` is `inspect.Parameter.empty`."""
    hint, required, last = _from_words(hint), default is _EMPTY, name.split(".")[-1]
    options: dict[str, Any] = {"type": hint, "help": help.replace("%", "%%")}
    if not required:
        options["default"] = default
    if positional and get_origin(hint) is list:
        options |= {"type": get_args(hint)[0], "nargs": "+" if required else "*"}
        container.add_argument(name, metavar=last.upper().removesuffix("S"), **options)
    elif positional:
        container.add_argument(name, metavar=last.upper(), **options, **({} if required else {"nargs": "?"}))
    else:
        # A dotted name is a setting of a run, spelled as in its YAML file.
        flag = name if "." in name else name.replace("_", "-")
        options |= {"metavar": _metavar(hint, last)} | ({"required": True} if required else {})
        container.add_argument(f"--{flag}", **options)


def document(source: Any) -> tuple[str, dict[str, str]]:
    """Description and help texts by parameter, from a docstring in Google style."""
    text = inspect.cleandoc(source.__doc__ or "")
    description, _, rest = text.partition("\nArgs:\n")
    arguments = re.split(r"\n(?=\S)", rest, maxsplit=1)[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", arguments, re.M | re.S)
    description = re.split(r"\n(?=(?:Returns|Raises|Yields|Example):\n)", description)[0]
    return description.strip(), {name: _trimmed(help) for name, help in entries}


def _usage(positional: argparse.Action) -> str:
    name = str(positional.metavar)
    return {"?": f"[{name}]", "+": f"{name} [{name} ...]"}.get(str(positional.nargs), name)


def _trimmed(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith("...") else text.removesuffix(".")


def parse_command(
    function: Callable[..., Any],
    argv: Sequence[str],
    *,
    name: str | None = None,
    positional: Sequence[str] = (),
    optional: Sequence[str] = (),
    usual: Sequence[str] = (),
    switches: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Parse the command line of a command that is one function.

    Args:
        function: the function behind the command; its docstring is the help page.
        argv: words after the name of the command.
        name: name of the command; that of the function by default.
        positional: parameters given without a flag.
        optional: required parameters of the function that the command line may leave out; they are then None.
        usual: parameters with a default that the usage line names nevertheless.
        switches: further switches of the command line and their help.

    Returns:
        Keyword arguments for the function, and the switches.

    Raises:
        ConfigError: as `parse_flags`.
    """
    command = name or function.__name__.replace("_", "-")
    parameters = inspect.signature(function).parameters
    required = [one for one in parameters if parameters[one].default is _EMPTY and one not in optional]
    description, helps = document(function)
    parser = make_parser(command, description)
    for one in optional:
        add_argument(parser, one, str | None, None, helps[one], positional=True)
    add_arguments(parser, function, only=positional, positional=positional, skip=optional)
    words = ["%(prog)s", *(_usage(action) for action in parser._actions if not action.option_strings)]
    words += [f"--{one.replace('_', '-')} {one.upper()}" for one in [*required, *usual] if one not in positional]
    parser.usage = " ".join([*words, "[settings]"])
    settings = parser.add_argument_group("settings")
    add_arguments(settings, function, skip=positional)
    for one, help in (switches or {}).items():
        add_argument(settings, one, bool, False, help)
    values = vars(parse_flags(parser, argv)).copy()
    values.pop("config")
    return values


def parse_flags(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line.

    Raises:
        ConfigError: for unknown flags, with the nearest known one, and for values of the wrong type.
    """
    # On the help page, --help and --config come after what a command is about.
    parser._action_groups = sorted(parser._action_groups, key=lambda group: group is parser._optionals)
    try:
        return _whole(parser, parser.parse_args(_canonical(parser, argv)))
    except (ParserError, TypeError, ValueError) as error:
        raise ConfigError(_one_sentence(error, parser)) from error


def parse_settings(parser: ArgumentParser, settings: dict[str, Any]) -> Namespace:
    """Check nested settings (`{"trainer": {"max_steps": 50}}`) as if they had been given as flags.

    Raises:
        ConfigError: as `parse_flags`.
    """
    known = [action.dest for action in parser._actions]
    settings = {key: value for key, value in settings.items() if value is not None}
    for group, values in settings.items():
        for key in [f"{group}.{key}" for key in values] if isinstance(values, dict) else [group]:
            inside = next((one for one in known if one.startswith(f"{key}.")), None)
            if inside is not None:
                raise ConfigError(f"{group}: expected settings such as {inside}, got {values!r}")
            if key not in known and group not in known:
                raise ConfigError(_unknown(key, parser))
    try:
        return _whole(parser, parser.parse_object(settings))
    except (ParserError, TypeError, ValueError) as error:
        raise ConfigError(_one_sentence(error, parser)) from error


def _canonical(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The command line with every flag in its own spelling, joined to its value as `--flag=value`."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    words = list(argv)
    found: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            return [*found, word, *words]
        if not word:  # perhaps a variable of the shell that is not set
            raise ConfigError(f"an argument is empty; write {_usage_line(parser)}")
        if not re.match(r"--|-[A-Za-z]", word):
            found.append(word)
            continue
        given, equals, value = word.partition("=")
        group, dot, name = given.partition(".")
        flag = f"{group}.{name.replace('-', '_')}" if dot else given.replace("_", "-")
        opposite = flag.replace("--no-", "--", 1)
        if flag not in actions and opposite in actions and _is_switch(actions[opposite]) and not equals:
            flag, equals, value = opposite, "=", "false"
        if flag not in actions:
            raise ConfigError(_unknown(given, parser))
        if _is_switch(actions[flag]) and not equals:
            # The spelling `--frames true` is accepted, too.
            value = words.pop(0) if words and words[0].lower() in _BOOLEANS else "true"
            equals = "="
        elif actions[flag].nargs is None and not equals:
            equals, value = "=", words.pop(0) if words and not words[0].startswith("--") else ""
        if equals and not value:
            raise ConfigError(f"{flag} has no value; write {flag} {actions[flag].metavar or 'FILE'}")
        found.append(f"{flag}{equals}{value}")
    return found


def _usage_line(parser: ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _unknown(name: str, parser: ArgumentParser) -> str:
    """The sentence on an unknown flag, or on an unknown setting in a file or from Python."""
    flags = [flag for action in parser._actions for flag in action.option_strings if not flag.endswith("+")]
    known = flags if name.startswith("-") else [action.dest for action in parser._actions]
    return f"there is no setting '{name}'{nearest(name, known) or f'; `{parser.prog} --help` lists them'}"


def _is_switch(action: argparse.Action) -> bool:
    return bool(action.option_strings) and _without_none(getattr(action, "_typehint", None)) is bool


def _whole(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """The parsed values; a YAML file may have put a single value in the place of a group."""
    for action in parser._actions:
        group, dot, _ = action.dest.partition(".")
        if dot and not isinstance(parsed.get(group), Namespace):
            raise ConfigError(f"{group}: expected settings such as {action.dest}, got {parsed.get(group)}")
    return parsed


def _evaluated(annotation: Any, source: Any) -> Any:
    # Only of parameters: the type of a result may be known to type checkers alone.
    return eval(annotation, vars(sys.modules[source.__module__])) if isinstance(annotation, str) else annotation


def _members(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _union(members: Sequence[Any]) -> Any:
    return Union[tuple(members)]  # noqa: UP007


def _without_none(hint: Any) -> Any:
    return _union([member for member in _members(hint) if member is not type(None)] or [hint])


def _from_words(hint: Any) -> Any:
    """The type that a command line gives: strings for `os.PathLike`, lists for sequences."""
    if get_origin(hint) is Sequence:
        return list[_from_words(get_args(hint)[0])]  # type: ignore[misc]
    kept = [member for member in _members(hint) if (get_origin(member) or member) is not os.PathLike]
    return _union(kept) if len(kept) < len(_members(hint)) else hint


def type_words(hint: Any) -> str:
    """A type in words: "int, string or list of ints", "one of wav, flac", "int above 0"."""
    members = [member for member in _members(hint) if member is not type(None)]
    if len(members) > 1:
        *first, last = map(type_words, members)
        return f"{', '.join(first)} or {last}"
    member, origin, parts = members[0], get_origin(members[0]), get_args(members[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin is tuple and len(parts) == 2:
        return f"pair of {_names_of(parts[0])}"
    if origin in (list, tuple, Sequence):
        return f"list of {_names_of(parts[0])}"
    if hasattr(member, "_expression"):  # a range of jsonargparse.typing
        return f"{_NAMES[member._type]} {range_in_words(member._expression)}"
    return _NAMES.get(origin or member, getattr(member, "__name__", str(member)))


def _names_of(hint: Any) -> str:
    name, _, limits = type_words(hint).partition(" ")
    return f"{name}s {limits}".strip()


def range_in_words(text: str) -> str:
    """The range in a message or type of jsonargparse: "v>=0 and v<1" as "at least 0 and below 1"; else ""."""
    found = re.search(r"v[<>=]+\S+(?: (?:and|or) v[<>=]+\S+)*", text)
    words = found[0] if found else ""
    for sign, word in (("v>=", "at least "), ("v<=", "at most "), ("v==", ""), ("v>", "above "), ("v<", "below ")):
        words = words.replace(sign, word)
    return words


def _metavar(hint: Any, name: str) -> str:
    kind = _without_none(hint)
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if kind is bool:
        return "{true,false}"
    if get_origin(kind) is tuple and len(get_args(kind)) == 2:
        return f"[{', '.join(_metavar(part, name) for part in get_args(kind))}]"
    return _METAVARS.get(getattr(kind, "_type", kind), name.upper())


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default)


_KEY = re.compile(r'Parser key "([^"]+)": (.*)')
_VALUE = re.compile(
    r"(?:Got|Given) value:\s*(.*)|Not of type \w+: (.*?) does not conform|(?:with base 10|to float): '(.*)'"
)
_REFUSED = re.compile(
    r"does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted|Key '([\w.]+)' is not expected"
)


def _one_sentence(error: Exception, parser: ArgumentParser) -> str:
    """What a user needs of an error of the parser."""
    text = " ".join(str(error).split())
    if refused := _REFUSED.search(text):
        return _unknown(next(group for group in refused.groups() if group), parser)
    if unexpected := re.search(r"[Uu]nrecognized arguments: (.*)", text):
        return (
            f"'{unexpected[1]}' is not expected; write {_usage_line(parser)}, with quotes around names that have spaces"
        )
    if missing := re.search(r"the following arguments are required: (.*)", text):
        positional = {action.dest: action.metavar for action in parser._actions if not action.option_strings}
        names = [str(positional.get(name) or f"--{name.replace('_', '-')}") for name in missing[1].split(", ")]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        return f"{listed} {'are' if names[1:] else 'is'} missing; write {_usage_line(parser)}"
    if wrong := _KEY.search(text):
        action = next((one for one in parser._actions if one.dest == wrong[1]), None)
        hint = getattr(action, "_typehint", None)
        if action is None or hint is None:
            return f"{wrong[1]}: {wrong[2]}"
        groups = (value := _VALUE.search(wrong[2])) and [one for one in value.groups() if one is not None]
        given = groups[0] or "''" if groups else ""
        got = f", got {given}" if given else ""
        if limits := range_in_words(wrong[2]):
            return f"{wrong[1]} must be {limits}{got}"
        words = type_words(hint)
        if words.startswith("one of"):
            return f"{wrong[1]} must be {words}{got}{nearest(given, get_args(_without_none(hint)))}"
        if words.startswith("pair of") and action.default is not None:
            words += f" such as {_shown(action.default)}"
        return f"{wrong[1]}: expected {words}{got}"
    return text[:1].lower() + text[1:]
