"""A process that runs the harness for another one: `python -m bestrq2.evaluate.xares.worker`.

Requests come as lines of JSON on standard input, answers go as lines of JSON to what was standard output at the start;
what the harness prints goes to a log. It ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from bestrq2.convert.weights import first_line
from bestrq2.errors import BestRQ2Error, CheckpointError

_REPORT_SECONDS = 1.0


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    _print_to(Path(os.devnull))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    requests: queue.Queue[str] = queue.Queue()
    # Processes forked from here close sys.stdin, and would wait for ever for a thread that reads from it.
    lines = os.fdopen(os.dup(0))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    threading.Thread(target=_listen, args=(lines, requests), daemon=True).start()
    harness: dict[str, str] = {}
    while True:
        request = json.loads(requests.get())
        _print_to(Path(request["log"]))
        try:
            harness = harness or _load_harness(Path(request["work"]))
            answer = {"done": _answer(request, answers), **harness}
        except BestRQ2Error as error:
            answer = {"failed": str(error)}
        except Exception as error:
            logging.exception("the harness failed")
            answer = {"failed": f"{type(error).__name__}: {first_line(error)} (in full in {request['log']})"}
        _say(answers, answer)


def _listen(lines: TextIO, requests: queue.Queue[str]) -> None:
    for line in lines:
        requests.put(line)
    os._exit(0)  # whoever asked is gone, whatever is at work here


def _load_harness(work: Path) -> dict[str, str]:
    """Import it; models it fetches from the hub land in `work`, as they do in the current folder of its users."""
    from bestrq2.evaluate.xares.torchaudio_stand_in import provide_torchaudio

    torchaudio = provide_torchaudio()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    try:
        import xares.task  # noqa: F401
    except ImportError as error:
        raise BestRQ2Error(f"the X-ARES harness cannot be imported: {first_line(error)}") from error
    return {"torchaudio": torchaudio}


def _answer(request: dict[str, Any], answers: TextIO) -> Any:
    from bestrq2.evaluate.xares import task_files

    if request["do"] == "describe":
        return [task_files.describe(path) for path in request["files"]]
    return _score(request, answers)


def _score(request: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    from bestrq2.evaluate.xares.scoring import Job, as_json, score_task
    from bestrq2.inference.embedder import load, weights_hash

    said = 0.0

    def report(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _REPORT_SECONDS:
            said = time.monotonic()
            _say(answers, {"encoded": done, "of": total})

    embedder = load(request["model"])
    if weights_hash(embedder) != request["weights_sha256"]:
        raise CheckpointError(f"{request['model']}: the weights are not those of the model; delete it and run again")
    return as_json(score_task(Job(**request["job"]), embedder, report))


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _print_to(log: Path) -> None:
    """Let all that is printed from here on, also by child processes, go to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    main()
