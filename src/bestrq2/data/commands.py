"""What commands write, read with patience that has an end."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

# Seconds for a killed process to go.
GRACE = 5.0


class Command:
    """The output of a running command, as a file that can be read once; when it is closed, the command is killed.

    Args:
        pipe: webdataset's `Pipe` to the command; if that leads a session of its own, all of the session is killed.
        timeout: seconds without a byte after which the command counts as stalled.
    """

    def __init__(self, pipe: Any, timeout: float) -> None:
        # Held, because webdataset waits up to two hours for the command when its own object goes.
        self._pipe, self._timeout = pipe, timeout
        self._process: subprocess.Popen[bytes] = pipe.proc
        self._parent = os.getpid()

    def read(self, size: int) -> bytes:
        """The next bytes, fewer than asked for only before the end or a stall.

        Raises:
            TimeoutError: the command stalls.
            CalledProcessError: it failed; what it wrote before has been read.
        """
        pieces: list[bytes] = []
        while size > 0 and wait([self._pipe.stream], self._timeout):
            piece = os.read(self._pipe.stream.fileno(), size)
            if not piece:
                if not pieces:
                    self._check_end()
                return b"".join(pieces)
            pieces.append(piece)
            size -= len(piece)
        if size > 0 and not pieces:
            raise TimeoutError
        return b"".join(pieces)

    def _check_end(self) -> None:
        try:
            code = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        if code not in self._pipe.ignore_status:
            raise subprocess.CalledProcessError(code, self._process.args)

    def close(self) -> None:
        """End the command, whether it still writes, stalls or is done."""
        if self._parent != os.getpid():
            return  # a forked process must not end what its parent reads
        if self._process.poll() is None:
            self._kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self._pipe.stream.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            if os.getpgid(self._process.pid) == self._process.pid:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def __del__(self) -> None:
        self.close()
