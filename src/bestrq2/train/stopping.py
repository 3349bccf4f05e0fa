"""Stopping between two steps when somebody asks for it: Ctrl-C, a scheduler, a machine that goes away."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bestrq2.errors import StoppedBySignal
from bestrq2.train.processes import Agreement

logger = logging.getLogger(__name__)

# Ctrl-C; the notice of a scheduler that takes the machine away; SLURM's early notice (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the signal that asks a run to stop; a second Ctrl-C does not wait for the step to end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopping = False
        self._agreement: Agreement | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise StoppedBySignal("at once", number)
            return
        self.signal = number
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        logger.warning("%s: stopping after this step%s", signal.Signals(number).name, again)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this block signals are remembered here."""
        if threading.current_thread() is not threading.main_thread():
            yield  # whoever runs the thread stops it
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.take_over()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Put our handlers (back) in place: Lightning installs its own, which would broadcast from within a handler."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def connect(self) -> None:
        """From now on all processes of the run stop at the same step."""
        self._agreement = Agreement()

    def agreed(self) -> bool:
        """Whether to stop after this step; every process must ask once a step."""
        assert self._agreement is not None
        self.stopping = self._agreement.reached(self.signal is not None)
        return self.stopping

    def close(self) -> None:
        """No more steps follow."""
        if self._agreement is not None:
            self._agreement.close()
            self._agreement = None

    def error(self, place: Any) -> StoppedBySignal:
        """What to raise when the run has stopped with its state saved."""
        return StoppedBySignal(f"stopped {place}, and saved; add --resume to continue", self.signal or signal.SIGTERM)
