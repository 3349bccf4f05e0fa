"""Errors of the package. Each message is one sentence that names the file or setting, what was found, and what to do.

The command line prints them without a stack trace and exits with code 2 for wrong input, 1 for a failing machine.
"""


class BestRQ2Error(Exception):
    """Base of all errors of this package; raised itself where a disk, a network or another process fails.

    Attributes:
        exit_code: exit code of a command that the error ends.
    """

    exit_code = 1


class AudioError(BestRQ2Error):
    """Audio that cannot be used: another format, empty, silent, damaged, or with NaN."""

    exit_code = 2


class ConfigError(BestRQ2Error):
    """A setting that is unknown, out of range, or contradicts another."""

    exit_code = 2


class CheckpointError(BestRQ2Error):
    """Weights that cannot be loaded: damaged file, other architecture, missing or extra tensors."""

    exit_code = 2


class DataError(BestRQ2Error):
    """A source of data that is missing, empty or unusable."""

    exit_code = 2


class StoppedBySignal(KeyboardInterrupt):
    """Work ended early by a signal, with all files whole.

    Attributes:
        signal: signal number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
