"""Options behind the name of a source, as in `audioset.h5?exclude=silent.csv`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, quote, unquote

from bestrq2.errors import ConfigError
from bestrq2.text import nearest


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """A source's name and the options behind its first question mark.

    Args:
        spec: such as "hub:user/corpus?split=test&column=audio"; values may hold %XX for letters with a meaning.

    Raises:
        ConfigError: what follows the question mark is no list of key=value.
    """
    name, mark, query = spec.partition("?")
    if not mark:
        return name, {}
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ConfigError(f"{spec}: {key or '='!r} is no option; write ?key=value, several joined by &.")
    # parse_qsl would read a plus sign, as in "c++.csv", as a space.
    return name, {key: unquote(value) for key, _, value in pairs}


def with_options(name: str, options: Mapping[str, str]) -> str:
    """The opposite of `split_options`: a name with options behind it."""
    known = dict(parse_qsl(name.partition("?")[2]))
    pairs = "&".join(f"{key}={quote(value, safe='/')}" for key, value in options.items() if key not in known)
    return f"{name}{'&' if known else '?'}{pairs}" if pairs else name


def check_keys(where: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Pass if every key is known.

    Raises:
        ConfigError: one is not; names the nearest that is.
    """
    known = list(known)
    for key in found:
        if key not in known:
            hint = nearest(key, known) or f"; known here: {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: there is no option '{key}'{hint}")
