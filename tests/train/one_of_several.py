"""One process of a small run of several, started by the tests: python one_of_several.py OUTPUT SOURCE SETTINGS.

SETTINGS is JSON: {"trainer": {...}, "probe": {...}, "stop": [rank, step] or null, "resume": bool, "memory": bytes that
each process finds available for a batch of any size, or null}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from small_run import small_pretrain

from bestrq2.errors import BestRQ2Error, StoppedBySignal
from bestrq2.train import loop, step_cost


def stop_at(patch: pytest.MonkeyPatch, rank: int, step: int) -> None:
    """Let one process receive SIGTERM in that step."""
    original = loop.Run.give_warnings

    def stopping(run: loop.Run, now: int) -> None:
        if run.fabric.global_rank == rank and now == step:
            signal.raise_signal(signal.SIGTERM)
        original(run, now)

    patch.setattr(loop.Run, "give_warnings", stopping)


def main() -> None:
    output, source, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    print(f"process {os.getpid()}", flush=True)
    if settings.get("stop"):
        stop_at(pytest.MonkeyPatch(), *settings["stop"])
    loader = {}
    if memory := settings.get("memory"):
        loader = {"batch_seconds": "auto"}
        pytest.MonkeyPatch().setattr(
            step_cost, "available_bytes", lambda device: memory[int(os.environ["SLURM_PROCID"])]
        )
    try:
        small_pretrain(
            source,
            output,
            trainer=settings["trainer"],
            model={"drop_path_rate": 0.0},
            loader=loader,
            probe=settings["probe"],
            resume=settings["resume"],
        )
    except StoppedBySignal as error:
        print(f"stopped: {error}", file=sys.stderr)
    except BestRQ2Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
