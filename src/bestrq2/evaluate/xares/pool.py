"""Processes that run the harness side by side, a task each at a time; one that dies fails its task alone."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from bestrq2.errors import BestRQ2Error


class Answer(NamedTuple):
    """What a worker says of a request.

    Attributes:
        place: of the request in the list.
        content: "done" and more, or "failed", or "encoded" and "of" while it is at work.
    """

    place: int
    content: dict[str, Any]

    @property
    def is_last(self) -> bool:
        """Whether no more follows of this request."""
        return "done" in self.content or "failed" in self.content


class WorkerPool:
    """Workers that are started when needed and stopped when the block ends.

    Args:
        jobs: how many work at once.
        environments: variables for the workers, in turn, such as the GPU that each sees.
    """

    def __init__(self, jobs: int, environments: Sequence[Mapping[str, str]] = ({},)) -> None:
        self.jobs, self.environments = jobs, environments
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for worker in self._workers.values():
                worker.kill()

    def run(self, requests: Sequence[dict[str, Any]]) -> Iterator[Answer]:
        """Answers to all requests, as they come."""
        answers: queue.Queue[Answer] = queue.Queue()
        waiting: queue.Queue[int] = queue.Queue()
        for place in range(len(requests)):
            waiting.put(place)
        for lane in range(min(self.jobs, len(requests))):
            arguments = (lane, requests, waiting, answers.put)
            threading.Thread(target=self._work, args=arguments, daemon=True).start()
        left = len(requests)
        while left:
            answer = answers.get()
            left -= answer.is_last
            yield answer

    def _work(
        self,
        lane: int,
        requests: Sequence[dict[str, Any]],
        waiting: queue.Queue[int],
        put: Callable[[Answer], None],
    ) -> None:
        """One lane: a worker and the requests that it takes from the queue, until that is empty."""
        while not self._closed:
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                for content in self._worker(lane).ask(requests[place]):
                    put(Answer(place, content))
            except (BestRQ2Error, OSError) as error:
                self._drop(lane)
                put(Answer(place, {"failed": str(error)}))

    def _worker(self, lane: int) -> _Worker:
        """That of a lane, kept from one call of `run` to the next."""
        with self._lock:
            if self._closed:
                raise BestRQ2Error("the work was stopped")
            if lane not in self._workers:
                self._workers[lane] = _Worker(self.environments[lane % len(self.environments)])
            return self._workers[lane]

    def _drop(self, lane: int) -> None:
        """Forget a worker that died."""
        with self._lock:
            worker = self._workers.pop(lane, None)
        if worker is not None:
            worker.kill()
            worker.close()


class _Worker:
    """One process of the harness; Ctrl-C on the terminal does not reach it, the end of its input does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bestrq2.evaluate.xares.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "TQDM_MININTERVAL": "10", **environment}, start_new_session=True,
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answers to one request, to the last.

        Raises:
            BestRQ2Error: the process ended before.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            content = json.loads(line)
            yield content
            if "done" in content or "failed" in content:
                return
        raise BestRQ2Error(self._death(request))

    def _death(self, request: dict[str, Any]) -> str:
        code = self._process.wait()
        if code < 0:
            hint = "; memory may have run out: use fewer --jobs" if -code == signal.SIGKILL else ""
            return f"its process was ended by signal {-code}{hint} (log in {request['log']})"
        assert self._process.stderr is not None
        said = self._process.stderr.read().strip().splitlines()
        reason = f": {said[-1]}" if said else ""
        return f"its process ended with code {code}{reason} (log in {request['log']})"

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Close the pipes to it; for whoever read from them."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.close()
