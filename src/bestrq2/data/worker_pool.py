"""Worker processes whose results come in the order of their tasks, in bounded memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NoReturn, TypeVar

import torch

from bestrq2.data.loader import end_with_parent
from bestrq2.errors import BestRQ2Error

Task = TypeVar("Task")
Result = TypeVar("Result")

# A worker computes one task while the next one waits in its pipe.
_PER_WORKER = 2
# Tasks submitted before their turn, per worker: enough to keep all busy while one of them has a long task.
_AHEAD = 32
# Finished results that wait for their turn, in bytes. Above it, only the task whose turn it is gets done.
_HELD_BYTES = 256_000_000


class _Worker:
    """One process, its pipe, and the numbers of its tasks."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.tasks: deque[int] = deque()


class WorkerPool(Generic[Task, Result]):
    """Processes that apply a function to tasks; used as a context.

    Unlike a `ProcessPoolExecutor` it bounds the bytes of results that wait, lets some tasks go first, and names the
    task of a process that died.

    Args:
        work: the function; it, tasks and results must be picklable (on Linux the function is forked).
        count: number of processes.
        describe: describes a task, for the message about a process that died during it.
    """

    def __init__(self, work: Callable[[Task], Result], count: int, describe: Callable[[Task], str]) -> None:
        self._work = work
        self._count = count
        self._describe = describe
        self._workers: list[_Worker] = []
        self._tasks: dict[int, Task] = {}
        self._waiting: deque[int] = deque()
        self._urgent: deque[int] = deque()
        self._done: dict[int, bytes] = {}
        self._held = self._number = 0

    def __enter__(self) -> WorkerPool[Task, Result]:
        # Forked workers need no import guard in the user's script; they run no torch threads.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with _interruption_later():
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._work, os.getpid()), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # it writes no files that could be left incomplete
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()

    def in_order(self, tasks: Iterable[Task], urgent: bool = False) -> Iterator[Result]:
        """Results of some tasks, in their order.

        Args:
            tasks: the tasks, read as far ahead as keeps all processes busy.
            urgent: do them before unfinished tasks of other calls; this call must be finished first.

        Raises:
            BestRQ2Error: a process died.
        """
        coming, numbers = iter(tasks), deque[int]()
        while True:
            while len(numbers) < _AHEAD * self._count:
                try:
                    task = next(coming)
                except StopIteration:
                    break
                self._tasks[self._number] = task
                (self._urgent if urgent else self._waiting).append(self._number)
                numbers.append(self._number)
                self._number += 1
            if not numbers:
                return
            yield self._result(numbers.popleft())

    def _result(self, number: int) -> Result:
        self._assign(number)
        while number not in self._done:
            for connection in wait([worker.connection for worker in self._workers]):
                self._receive(next(worker for worker in self._workers if worker.connection is connection))
            self._assign(number)
        content = self._done.pop(number)
        self._held -= len(content)
        del self._tasks[number]
        self._assign(number + 1)
        succeeded, outcome = pickle.loads(content)
        if not succeeded:
            raise outcome
        return outcome

    def _assign(self, wanted: int) -> None:
        """Give waiting tasks to processes that have room for one."""
        while queue := self._urgent or self._waiting:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            full = self._held > _HELD_BYTES and queue[0] != wanted
            if full or len(worker.tasks) >= _PER_WORKER:
                return
            number = queue.popleft()
            worker.tasks.append(number)
            try:
                worker.connection.send(self._tasks[number])
            except OSError:
                self._died(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            content = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._died(worker)
        self._done[worker.tasks.popleft()] = content
        self._held += len(content)

    def _died(self, worker: _Worker) -> NoReturn:
        worker.process.join(5.0)
        code = worker.process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        task = self._describe(self._tasks[worker.tasks[0]]) if worker.tasks else "nothing"
        raise BestRQ2Error(
            f"a worker process died ({how}) while it read {task}; if memory ran out use fewer --num-workers, otherwise "
            "take this recording out, and run the same command again"
        )


@contextlib.contextmanager
def _interruption_later() -> Iterator[None]:
    """Deliver Ctrl-C at the end of the block, so that a process started in it can ignore it first."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, work: Callable[[Any], Any], parent: int) -> None:
    """Loop of a worker process: one task after the other until the main process ends."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends this one
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcome = True, work(task)
        except Exception as error:
            error.add_note(traceback.format_exc())
            outcome = False, error
        try:
            connection.send(outcome)
        except OSError:
            return
