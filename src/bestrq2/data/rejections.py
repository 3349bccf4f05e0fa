"""The list of recordings that a run could not use, and why."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2.files import is_full

logger = logging.getLogger(__name__)


class RejectionLog:
    """`rejected.csv` of a run: columns path and reason, each path once.

    Lines are written whole, so that a run killed at any instant leaves a readable file; a resumed run goes on with it.
    A full disk is warned about once, and the lines wait for the next ones.

    Args:
        path: the file; made with the first entry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._paths: set[str] = set()
        self._waiting = b""
        self._warned = False
        if self.path.exists():
            self._load()

    def __len__(self) -> int:
        """Recordings rejected so far."""
        return len(self._paths)

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        rows = list(csv.reader(io.StringIO(whole.decode("utf-8", "surrogateescape"))))
        self._paths = {self._key(row[0], row[-1]) for row in rows[1:] if row}

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
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        before = len(self._paths)
        for path, reason in rejected:
            if (key := self._key(path, reason)) not in self._paths:
                self._paths.add(key)
                writer.writerow([path.replace("\n", " "), " ".join(reason.split())])
        self._waiting += lines.getvalue().encode("utf-8", "surrogateescape")
        if self._waiting:
            self._write()
        return len(self._paths) - before

    def _write(self) -> None:
        """Append what waits, wholly or not at all."""
        size = self.path.stat().st_size if self.path.exists() else 0
        content = self._waiting if size else b"path,reason\n" + self._waiting
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
