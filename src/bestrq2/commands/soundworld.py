"""`bestrq2 soundworld`: write the synthetic corpus and its labelled tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bestrq2 import flags


def write_soundworld(
    output: Path, clips: int = 200, seed: int = 0, format: Literal["folder", "xares"] = "folder"
) -> None:
    """Write SoundWorld, a synthetic corpus of speech, music and environmental sound with labelled tasks.

    Args:
        output: new or empty folder to write, or one that this command wrote.
        clips: labelled clips per task, and unlabelled clips.
        seed: random seed of the sounds.
        format: "folder" (WAV files, one folder per class) or "xares" (tars and task files that X-ARES reads).

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.soundworld import write_corpus

    write_corpus(output, clips=clips, seed=seed, format=format)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 soundworld`."""
    values = flags.parse_command(write_soundworld, argv, name="soundworld", positional=("output",))
    write_soundworld(**values)
    print(values["output"])
