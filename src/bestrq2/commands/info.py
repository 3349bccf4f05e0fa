"""`bestrq2 info`: size, cost and origin of a model or a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bestrq2 import flags


def info(
    model: str | os.PathLike[str], cost: bool = True, data: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Describe a model or a recipe: architecture, parameters, operations and origin.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        cost: count parameters and operations, which takes seconds; without them a recipe is described at once.
        data: source of audio, for a recipe: tell hours, segments, seconds per step, and steps per epoch.

    Returns:
        Facts by name, in words.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.inference.info import model_info

    return model_info(model, cost=cost, data=None if data is None else os.fspath(data))


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 info`."""
    facts = info(**flags.parse_command(info, argv, positional=("model",)))
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
