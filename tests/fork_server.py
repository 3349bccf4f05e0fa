"""Processes for tests in milliseconds: a server that has imported everything forks one child per command.

A fresh interpreter spends about eight seconds of processor time on importing torch, transformers and scikit-learn. A
child of this server starts in 0.05 s and is otherwise a process of its own: arguments, working directory, environment,
standard streams, process group, default signal handlers, and the interpreter's normal way to its exit code. Tests use
the fixtures `run_cli`, `start_cli`, `run_python` and `start_python`.

Limits. What is read while modules are imported was read in the server: `OMP_NUM_THREADS` (1), `HF_ENDPOINT`,
`HF_HUB_OFFLINE`, the presence of an optional package. Tests of import times, of missing packages and of such variables
need a fresh interpreter. A command that executes itself again (several devices, torchrun) starts fresh interpreters.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

IMPORTED_FIRST = (
    "soundfile", "soxr", "av", "pyarrow.parquet", "torch", "transformers", "sklearn.linear_model", "sklearn.neighbors",
    "jsonargparse", "lightning_fabric", "torch.utils.tensorboard", "bestrq2",
)  # fmt: skip
# One thread per process: threads do not survive a fork. pyarrow's allocator would start one while it is imported.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
PID = struct.Struct("q")
STDOUT = subprocess.STDOUT


@dataclass(frozen=True)
class Finished:
    """Exit code and output of a process that has ended; a negative exit code is the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


class Child:
    """A running command, much like `subprocess.Popen`; it leads a process group of its own.

    `stdout` and `stderr` are the text written so far, at any time.
    """

    def __init__(self, pid: int, status: int, output: IO[bytes] | None, errors: IO[bytes] | None):
        self.pid = pid
        self.returncode: int | None = None
        self._status, self._output, self._errors = status, output, errors

    @property
    def stdout(self) -> str:
        return _content(self._output)

    @property
    def stderr(self) -> str:
        return _content(self._errors)

    def poll(self) -> int | None:
        """Exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Exit code; raises `subprocess.TimeoutExpired` if the process still runs after so many seconds."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.stdout, self.stderr)
            status = os.read(self._status, PID.size)
            os.close(self._status)
            if not status:
                raise RuntimeError("the fork server ended unexpectedly")
            self.returncode = os.waitstatus_to_exitcode(PID.unpack(status)[0])
        return self.returncode

    def finish(self, timeout: float = 60.0) -> Finished:
        """Wait for the end; exit code and all output."""
        return Finished(self.wait(timeout), self.stdout, self.stderr)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 60.0) -> Any:
        """The first true value of `condition()`; fails if the process ends before or the time is over."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            ended = self.poll() is not None
            if ended and (value := condition()):
                break
            assert not ended, f"ended early with exit code {self.returncode}: {self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {self.stdout}\n{self.stderr}"
            time.sleep(0.01)
        return value

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def kill_group(self) -> None:
        """SIGKILL to the process and to what it has started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for the end of the process and release its files."""
        self.wait()
        for file in (self._output, self._errors):
            if file is not None:
                file.close()


def _content(file: IO[bytes] | None) -> str:
    # os.pread: the offset is shared with the child, which goes on writing.
    return "" if file is None else os.pread(file.fileno(), 2**31 - 1, 0).decode(errors="replace")


class ForkServer:
    """Client side: starts the server process at the first use and asks it for children."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start_cli(self, arguments: Sequence[object], **options: Any) -> Child:
        """Start `bestrq2 ARGUMENTS...`; options as in `start_python`."""
        return self._start("cli", arguments, **options)

    def start_python(self, arguments: Sequence[object], **options: Any) -> Child:
        """Start `python ARGUMENTS...`, where the first argument is a script, or -c before code.

        Options:
            cwd: working directory; default: the current one
            env: changes of the current environment; None removes a variable
            stdin, stdout, stderr: file descriptors or open files; by default nothing can be read, and output is kept
                for `Child.stdout` and `Child.stderr`; `stderr=STDOUT` puts both into `Child.stdout`
        """
        if str(arguments[0]) == "-c":
            return self._start("code", arguments[1:], **options)
        return self._start("script", arguments, **options)

    def _start(
        self,
        kind: str,
        arguments: Sequence[object],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str | None] | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
    ) -> Child:
        changed = {**os.environ, **ENVIRONMENT, **(env or {})}
        request = {
            "kind": kind,
            "arguments": [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in arguments],
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "env": {name: value for name, value in changed.items() if value is not None},
        }
        output = tempfile.TemporaryFile() if stdout is None else None  # noqa: SIM115
        errors = tempfile.TemporaryFile() if stderr is None else None  # noqa: SIM115
        read_status, write_status = os.pipe()
        with tempfile.TemporaryFile() as file, open(os.devnull, "rb") as nothing:
            file.write(json.dumps(request).encode())
            file.seek(0)
            out = output if stdout is None else stdout
            streams = (stdin or nothing, out, out if stderr == STDOUT else errors if stderr is None else stderr)
            numbers = [each if isinstance(each, int) else each.fileno() for each in streams]
            server = self._connect()
            socket.send_fds(server, [b"+"], [file.fileno(), write_status, *numbers])
            os.close(write_status)
            answer = server.recv(PID.size)
        if not answer:
            raise RuntimeError("the fork server ended unexpectedly")
        return Child(PID.unpack(answer)[0], read_status, output, errors)

    def _connect(self) -> socket.socket:
        if self._socket is None:
            self._socket, other = socket.socketpair()
            with other:
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(other.fileno())],
                    env={**os.environ, **ENVIRONMENT},
                    pass_fds=[other.fileno()],
                    start_new_session=True,
                )
            if self._socket.recv(1) != b"+":
                raise RuntimeError("the fork server could not be started; its error is on the error stream")
        return self._socket

    def close(self) -> None:
        """End the server and every child that still runs."""
        if self._socket is not None:
            assert self._process is not None
            self._socket.close()
            self._process.wait(timeout=30)


def _import_everything() -> None:
    for name in IMPORTED_FIRST:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    package = importlib.import_module("bestrq2")
    for module in pkgutil.walk_packages(package.__path__, "bestrq2."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    tasks = Path("/proc/self/task")
    if tasks.is_dir():
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        assert len(names) == 1, f"threads would not survive a fork: {names}"


def _serve(control: socket.socket) -> dict[str, Any]:
    """Fork a child per request until the client is gone; returns in the children only, with what they are to run."""
    running: dict[int, int] = {}  # process -> pipe that its exit status is written to
    ready, wakeup = os.pipe()
    for pipe in (ready, wakeup):
        os.set_blocking(pipe, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup)  # the end of a child wakes select()
    gc.freeze()  # a garbage collection in a child then does not copy the memory of all that was imported
    control.sendall(b"+")
    while True:
        readable, _, _ = select.select([control, ready], [], [])
        if ready in readable:
            os.read(ready, 4096)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with contextlib.suppress(BrokenPipeError):
                        os.write(running[pid], PID.pack(status))
                    os.close(running.pop(pid))
        if control in readable:
            message, received, _, _ = socket.recv_fds(control, 1, 5)
            if not message:
                for pid in running:
                    with contextlib.suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            # A signal sent to the child before it has its own handlers waits instead of being ignored.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pid = os.fork()
            if pid == 0:
                for number in (control.detach(), ready, wakeup, received[1], *running.values()):
                    os.close(number)
                return _become_a_process(received[0], received[2:])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            with contextlib.suppress(OSError):  # both sides set it, so that neither has to wait for the other
                os.setpgid(pid, pid)
            running[pid] = received.pop(1)
            for number in received:
                os.close(number)
            control.sendall(PID.pack(pid))


def _become_a_process(request_file: int, streams: Sequence[int]) -> dict[str, Any]:
    """Give a forked child what an interpreter has at its start; returns the request."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with os.fdopen(request_file) as file:
        request = json.load(file)
    for target, number in enumerate(streams):
        os.dup2(number, target)
        os.close(number)
    os.chdir(request["cwd"])
    before = set(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in before]
    # The server's own objects stay alive, as logging handlers may hold them; closing them would close the descriptors.
    sys.modules["fork_server"] = sys.modules["__main__"]
    sys.modules["fork_server"].streams = (sys.stdin, sys.stdout, sys.stderr)  # type: ignore[attr-defined]
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    # Generators seeded once in the server would give all children the same "random" numbers.
    for module, name in (("numpy.random", "seed"), ("torch", "seed")):
        if module in sys.modules:
            getattr(sys.modules[module], name)()
    # Last: Python drops a KeyboardInterrupt in the finaliser of a file, and files are replaced above.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return request


def _run(kind: str, arguments: list[str]) -> None:
    """Run a command line as `__main__`; exceptions and SystemExit leave through the interpreter as usual."""
    main = types.ModuleType("__main__")
    if kind == "script":
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    elif kind == "code":
        sys.argv, sys.path[0] = ["-c", *arguments[1:]], ""
        sys.modules["__main__"] = main
        exec(compile(arguments[0], "<string>", "exec"), vars(main))
    else:
        # The console script's path, so that a command which executes itself again finds itself.
        script = Path(sys.executable).with_name("bestrq2")
        sys.argv = [str(script), *arguments]
        sys.path.pop(0)
        sys.modules["__main__"] = main
        importlib.import_module("bestrq2.cli").main()


if __name__ == "__main__":
    _import_everything()
    wanted = _serve(socket.socket(fileno=int(sys.argv[1])))
    _run(wanted["kind"], wanted["arguments"])
