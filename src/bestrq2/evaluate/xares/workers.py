"""Worker processes that run the harness side by side, one task each at a time.

A worker that dies fails its task alone. Requests go to its standard input as lines of JSON; answers come back as lines
of JSON on what was its standard output at the start, and everything that the harness prints goes to a log.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from bestrq2.convert.weights import first_line
from bestrq2.errors import BestRQ2Error, CheckpointError

_REPORT_SECONDS = 1.0
# The harness sets two threads per process; where cores are fewer, threads that spin while they wait double the time.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TQDM_MININTERVAL": "10"}


class WorkerPool:
    """Workers that start when needed and stop when the block ends.

    Args:
        jobs: number of workers.
        environments: environment variables for the workers, in turn, such as the GPU that each sees.
    """

    def __init__(self, jobs: int, environments: Sequence[Mapping[str, str]] = ({},)) -> None:
        self.environments = environments
        self._threads = ThreadPoolExecutor(jobs)
        self._workers: dict[int, _Worker] = {}  # by thread
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for worker in self._workers.values():
                worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def run(self, requests: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the answers to all requests as they come, with the index of the request.

        An answer has "done" or "failed" if it is the last one to its request, and "encoded" and "of" before that.
        """
        answers: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        for place, request in enumerate(requests):
            self._threads.submit(self._ask, place, request, answers.put)
        left = len(requests)
        while left:
            place, content = answers.get()
            left -= _is_last(content)
            yield place, content

    def _ask(self, place: int, request: dict[str, Any], put: Callable[[tuple[int, dict[str, Any]]], None]) -> None:
        """Have the worker of this thread answer a request."""
        try:
            for content in self._worker().ask(request):
                put((place, content))
        except (BestRQ2Error, OSError) as error:
            with self._lock:
                worker = self._workers.pop(threading.get_ident(), None)
            if worker is not None:
                worker.kill()
                worker.close()
            put((place, {"failed": str(error)}))

    def _worker(self) -> _Worker:
        """The worker of this thread, kept from one request to the next."""
        with self._lock:
            if self._closed:
                raise BestRQ2Error("the work was stopped")
            worker = self._workers.get(threading.get_ident())
            if worker is None:
                worker = _Worker(self.environments[len(self._workers) % len(self.environments)])
                self._workers[threading.get_ident()] = worker
            return worker


def _is_last(content: Mapping[str, Any]) -> bool:
    return "done" in content or "failed" in content


class _Worker:
    """One worker process; Ctrl-C on the terminal does not reach it, the end of its input does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**_ENVIRONMENT, **os.environ, **environment}, start_new_session=True,
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the answers to one request.

        Raises:
            BestRQ2Error: the process ended before the last one.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            content = json.loads(line)
            yield content
            if _is_last(content):
                return
        raise BestRQ2Error(self._death(request))

    def _death(self, request: dict[str, Any]) -> str:
        code = self._process.wait()
        if code < 0:
            hint = "; memory may have run out: use fewer --jobs" if -code == signal.SIGKILL else ""
            return f"its process was ended by signal {-code}{hint} (log in {request['log']})"
        assert self._process.stderr is not None
        lines = self._process.stderr.read().strip().splitlines()
        reason = f": {lines[-1]}" if lines else ""
        return f"its process ended with code {code}{reason} (log in {request['log']})"

    def kill(self) -> None:
        """End the process and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Close the pipes; only for the thread that reads from them."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.close()


def main() -> None:
    """Run a worker: answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    _redirect_output(Path(os.devnull))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    requests: queue.Queue[str] = queue.Queue()
    # Forked processes close sys.stdin, and would wait forever for a thread that reads from it.
    lines = os.fdopen(os.dup(0))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    threading.Thread(target=_listen, args=(lines, requests), daemon=True).start()
    harness: dict[str, str] = {}
    while True:
        request = json.loads(requests.get())
        _redirect_output(Path(request["log"]))
        try:
            harness = harness or _load_harness(Path(request["work"]))
            answer = {"done": _answer(request, answers), **harness}
        except BestRQ2Error as error:
            answer = {"failed": str(error)}
        except Exception as error:
            logging.exception("the harness failed")
            answer = {"failed": f"{type(error).__name__}: {first_line(error)} (in full in {request['log']})"}
        _write(answers, answer)


def _listen(lines: TextIO, requests: queue.Queue[str]) -> None:
    for line in lines:
        requests.put(line)
    os._exit(0)  # the main process is gone: end at once, whatever is running


def _load_harness(work: Path) -> dict[str, str]:
    """Import the harness; models that it fetches into the current folder go to `work`."""
    from bestrq2._torchaudio import provide_torchaudio

    torchaudio = provide_torchaudio()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    try:
        import xares.task  # noqa: F401
    except ImportError as error:
        raise BestRQ2Error(f"the X-ARES harness cannot be imported: {first_line(error)}") from error
    return {"torchaudio": torchaudio}


def _answer(request: dict[str, Any], answers: TextIO) -> Any:
    from bestrq2.evaluate.xares.scoring import Job, score_task
    from bestrq2.evaluate.xares.tasks import describe
    from bestrq2.inference.embedder import load, weights_hash

    if request["do"] == "describe":
        return [describe(path) for path in request["files"]]
    reported = 0.0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            _write(answers, {"encoded": done, "of": total})

    embedder = load(request["model"])
    if weights_hash(embedder.model) != request["weights_sha256"]:
        raise CheckpointError(f"{request['model']}: the weights are not those of the model; delete it and run again")
    return score_task(Job(**request["job"]), embedder, report)


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _redirect_output(log: Path) -> None:
    """Send everything that is printed from here on, also by child processes, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
