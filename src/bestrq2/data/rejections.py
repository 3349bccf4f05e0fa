"""The list of recordings that a run could not use, and why."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path


class RejectionLog:
    """`rejected.csv` of a run: columns path and reason, each path once.

    Lines are written whole, so that a run killed at any instant leaves a readable file; a resumed run goes on with it.

    Args:
        path: the file; made with the first entry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._paths: set[str] = set()
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
        self._paths = {row[0] for row in rows[1:] if row}

    def add(self, rejected: Sequence[tuple[str, str]]) -> int:
        """Write the entries whose path is not listed yet.

        Args:
            rejected: paths and reasons.

        Returns:
            How many were new.
        """
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writerow(["path", "reason"])
        before = len(self._paths)
        for path, reason in rejected:
            if path not in self._paths:
                self._paths.add(path)
                writer.writerow([path.replace("\n", " "), " ".join(reason.split())])
        if len(self._paths) > before:
            with self.path.open("ab", buffering=0) as file:
                file.write(lines.getvalue().encode("utf-8", "surrogateescape"))
        return len(self._paths) - before
