"""The errors a user can cause, each a sentence that names the culprit and the remedy.

The command line prints them without a stack trace and exits with code 2.
"""


class BestRQ2Error(Exception):
    """Base of every error this package raises on purpose."""


class AudioError(BestRQ2Error):
    """One piece of audio cannot be used: not audio, empty, silent, damaged, or holding NaN."""


class ConfigError(BestRQ2Error):
    """A setting is unknown, out of range, or at odds with another."""


class CheckpointError(BestRQ2Error):
    """Weights cannot be loaded: damaged file, other architecture, missing or extra tensors."""


class DataError(BestRQ2Error):
    """A source of data is missing, empty, or holds nothing usable."""


class StoppedBySignal(KeyboardInterrupt):
    """Work ended early, with whole files, because a signal asked for it; not an error, but no full success either.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
