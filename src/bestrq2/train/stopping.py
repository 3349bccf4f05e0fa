"""Stopping a run by a signal: Ctrl-C, a scheduler, a machine that is taken away.

While steps are taken, a signal is remembered and the run stops after the step, with its state saved. At any other time,
as while the data is opened, there is nothing to save and the run ends at once. Either way `StoppedBySignal` is raised,
from which the command line makes its exit code: 128 and the number of the signal.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bestrq2.errors import StoppedBySignal
from bestrq2.train.processes import Agreement

logger = logging.getLogger(__name__)

# Ctrl-C; the notice of a scheduler that takes the machine away; SLURM's early notice (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Signals that ask a run to stop.

    Attributes:
        signal: number of the first signal received; None for none so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._steps = False
        self._agreement: Agreement | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.signal is None
        if first:
            self.signal = number
        if not self._steps or (number == signal.SIGINT and not first):
            raise StoppedBySignal("at once; with --resume the same command goes on from what is saved", number)
        if first:
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            logger.warning("%s: stopping after this step%s", signal.Signals(number).name, again)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive signals in this block; outside of the main thread, which alone gets any, nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Let signals wait in this block until `agreed` is asked, between two steps.

        Raises:
            StoppedBySignal: one has come before. An exception that a handler raises is lost where Python calls it
                within a destructor, so it is raised again here.
        """
        if self.signal is not None:
            raise StoppedBySignal("before the first step", self.signal)
        self._agreement, self._steps = Agreement(), True
        try:
            yield
        finally:
            self._steps = False
        self._agreement.close()

    def agreed(self) -> bool:
        """Whether to stop after this step, the same step in all processes; every process must ask once a step."""
        assert self._agreement is not None
        return self._agreement.reached(self.signal is not None)

    def error(self, place: str) -> StoppedBySignal:
        """The exception of a run that has stopped with its state saved."""
        return StoppedBySignal(f"stopped {place}, and saved; add --resume to continue", self.signal or signal.SIGTERM)
