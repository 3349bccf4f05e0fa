"""Running the benchmark's command, and what it leaves behind when it is cut short."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from bestrq2.errors import BestRQ2Error
from bestrq2.evaluate.xares_llm.harness import last_error

logger = logging.getLogger(__name__)

# Seconds that the benchmark has to end when this process is told to.
_GRACE = 20.0
_KEPT_LINES = 200
_PIPE, _MERGED = subprocess.PIPE, subprocess.STDOUT


def run_harness(command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Run the benchmark to its end; what it says goes to standard error and into a file.

    Raises:
        BestRQ2Error: it fails; the sentence has the last error that it named.
    """
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            list(command), env=environment, text=True, errors="replace", stdout=_PIPE, stderr=_MERGED
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kept.append(line)
                file.write(line)
                file.flush()
                sys.stderr.write(line)
            code = process.wait()
        except BaseException:  # Ctrl-C too: nothing of ours goes on behind the user's back
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code:
        raise BestRQ2Error(f"xares_llm ended with code {code}: {last_error(list(kept))} (all it said: {log})")


def drop_unfinished(folder: Path) -> bool:
    """Delete checkpoints of a training that was cut short, and caches of scores that are no whole files.

    The benchmark takes any checkpoint for a finished training and would score it, and cannot go on from one.

    Args:
        folder: what the benchmark wrote for one model and task.

    Returns:
        Whether a finished training is there.
    """
    finished = False
    for checkpoint in sorted(folder.glob("*/checkpoint-*")):
        step, steps = _progress(checkpoint)
        if steps and step >= steps:
            finished = True
            continue
        logger.warning("%s: training ended at step %d of %d and cannot be continued; deleted", checkpoint, step, steps)
        shutil.rmtree(checkpoint)
    if not finished:
        for cache in folder.glob("*/score_*.yaml"):  # of a checkpoint that is gone
            cache.unlink()
    for cache in folder.glob("*/score_*.yaml"):
        if not cache.read_text(encoding="utf-8", errors="replace").strip():
            cache.unlink()
    return finished


def _progress(checkpoint: Path) -> tuple[int, int]:
    """Steps done and steps to do; (0, 0) where it does not say so."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
