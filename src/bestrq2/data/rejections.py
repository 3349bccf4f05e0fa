"""The list of recordings that a run could not use, and why."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2.files import is_full

logger = logging.getLogger(__name__)

HEADER = b"path,reason\n"
"""The first line of the list."""


def rejection_line(path: str, reason: str) -> bytes:
    """A line of the list, with its line feed."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([path.replace("\n", " "), " ".join(reason.split())])
    return line.getvalue().encode("utf-8", "surrogateescape")


class ListedKeys:
    """Which keys are listed already, as hashes: millions of long ones take little memory."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def __len__(self) -> int:
        """Number of different keys."""
        return len(self._digests)

    def add(self, key: str) -> bool:
        """List a key; whether it was new."""
        before = len(self._digests)
        self._digests.add(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest())
        return len(self._digests) > before


class RejectionLog:
    """`rejected.csv` of a run: columns path and reason, each path once.

    Lines are written whole, so that a run killed at any instant leaves a readable file; a resumed run goes on with it.
    A full disk is warned about once, and the lines wait for the next ones.

    Args:
        path: the file; made with the first entry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._listed = ListedKeys()
        self._waiting = b""
        self._warned = False
        if self.path.exists():
            self._load()

    def __len__(self) -> int:
        """Recordings rejected so far."""
        return len(self._listed)

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        rows = csv.reader(io.StringIO(whole.decode("utf-8", "surrogateescape")))
        next(rows, None)
        for row in filter(None, rows):
            self._listed.add(self._key(row[0], row[-1]))

    def _key(self, path: str, reason: str) -> str:
        """What is listed once only: a path."""
        return path

    def add(self, rejected: Sequence[tuple[str, str]]) -> int:
        """Write the entries whose path is not listed yet.

        Args:
            rejected: paths and reasons.

        Returns:
            How many were new.
        """
        new = [of for of in rejected if self._listed.add(self._key(*of))]
        self._waiting += b"".join(rejection_line(*of) for of in new)
        if self._waiting:
            self._write()
        return len(new)

    def finish(self) -> None:
        """Return once all entries are on the disk.

        Raises:
            OSError: the disk is full.
        """
        if self._waiting:
            self._write()
        if self._waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        """Append what waits, wholly or not at all."""
        size = self.path.stat().st_size if self.path.exists() else 0
        content = self._waiting if size else HEADER + self._waiting
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(content) == len(content):
                    self._waiting = b""
                else:  # the disk took a part only
                    file.truncate(size)
        except OSError as error:
            if not is_full(error):
                raise
        if self._waiting and not self._warned:
            self._warned = True
            logger.warning("%s: the disk is full; rejected recordings are listed there once it has room", self.path)
