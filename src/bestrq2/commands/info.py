"""`bestrq2 info`: size, cost and origin of a model or a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2 import flags
from bestrq2.errors import ConfigError


def info(
    model: str | os.PathLike[str],
    cost: bool = True,
    data: str | os.PathLike[str] | None = None,
    hours: float | None = None,
    device: str | None = None,
) -> dict[str, str]:
    """Describe a model or a recipe: architecture, parameters, operations and origin; of a classifier classes and score.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        cost: count parameters and operations, which takes seconds; without them a recipe is described at once.
        data: source of audio, for a recipe: tell hours, segments, seconds per step, and steps per epoch.
        hours: audio of a corpus (h), for a recipe: measure training steps for some seconds, and tell how long a run
            takes, how often it hears the corpus, and its memory.
        device: device of that run, such as "cpu" or "cuda:0"; CUDA if available, else the CPU.

    Returns:
        Facts by name, in words.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.inference.info import model_info

    facts = model_info(model, cost=cost, data=None if data is None else os.fspath(data))
    if "fine-tuned" in facts:
        from bestrq2.evaluate.finetuned import read_finetune_result, score_in_words

        if (result := read_finetune_result(Path(model))) is not None:
            facts["score"] = score_in_words(result)
    if hours is None and device is None:
        return facts
    if not facts.get("trained", "").startswith("no:"):
        raise ConfigError(f"--hours and --device belong to a recipe, and {os.fspath(model)} is none")
    from bestrq2.train.step_cost import run_estimate

    return facts | run_estimate(os.fspath(model), hours, device)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 info`."""
    facts = info(**flags.parse_command(info, argv, positional=("model",)))
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
