"""Lists of recordings that a run could not use, and of those that end early: `rejected.csv` and `shorter.csv`."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bestrq2.files import is_full
from bestrq2.text import cell_text, csv_line

logger = logging.getLogger(__name__)

REJECTED_HEADER = b"path,reason\n"
SHORTER_HEADER = b"path,announced,found\n"
"""First lines of the lists; durations are in seconds."""


class Shorter(NamedTuple):
    """A recording that ends before its header promised; it is used as far as it goes.

    Attributes:
        path: its path, or its name in the source.
        announced: duration that its header promised (s).
        found: duration that there is (s).
    """

    path: str
    announced: float
    found: float


def list_line(path: str, *facts: str | float) -> bytes:
    """One line of a list, with its line feed."""
    cells = [" ".join(fact.split()) if isinstance(fact, str) else f"{fact:.3f}" for fact in facts]
    return csv_line([path, *cells]).encode("utf-8", "surrogateescape")


def reasons_in_words(listing: Path) -> str:
    """First entry of a `rejected.csv`, and the number of recordings for each kind of reason if there are several."""
    with listing.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [(cell_text(path), reason.rstrip(".")) for path, reason in csv.reader(file)][1:]
    kinds = Counter(reason.partition(":")[0] for _, reason in rows).most_common()
    counts = ", ".join(f'{count:,} "{kind}"' for kind, count in kinds)
    return f"the first, {rows[0][0]}, {rows[0][1]}" + (f" (in all {counts})" if len(kinds) > 1 else "")


class ListedKeys:
    """Set of keys, kept as hashes: millions of long ones take little memory."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._digests)

    def add(self, key: str) -> bool:
        """Add a key; returns whether it was new."""
        before = len(self._digests)
        self._digests.add(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest())
        return len(self._digests) > before


class RecordingList:
    """Recordings of a run with facts about them, as a CSV file.

    Lines are written whole, so that a run killed at any instant leaves a readable file; a resumed run continues it.
    A full disk is warned of once, and the lines are written with later ones.

    Args:
        path: the file; created with the first entry.
        header: its first line.
        key: key of an entry from its cells; entries with equal keys are listed once. None for the path.
    """

    def __init__(self, path: str | Path, header: bytes, key: Callable[..., str] | None = None) -> None:
        self.path = Path(path)
        self._header = header
        self._key = key or (lambda path, *facts: path)
        self._listed = ListedKeys()
        self._pending = b""
        self._warned = False
        if self.path.exists():
            self._load()

    def __len__(self) -> int:
        """Number of entries so far."""
        return len(self._listed)

    def _load(self) -> None:
        """Read the entries of an earlier run and cut off a half-written line."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        rows = csv.reader(io.StringIO(whole.decode("utf-8", "surrogateescape")))
        next(rows, None)
        for row in filter(None, rows):
            self._listed.add(self._key(*map(cell_text, row)))

    def add(self, entries: Sequence[tuple[str, str] | Shorter]) -> int:
        """Write the entries that are not listed yet.

        Args:
            entries: paths and reasons, or recordings that end early.

        Returns:
            Number of new entries.
        """
        new = [entry for entry in entries if self._listed.add(self._key(*entry))]
        self._pending += b"".join(list_line(*entry) for entry in new)
        if self._pending:
            self._write()
        return len(new)

    def finish(self) -> None:
        """Write all waiting entries to disk.

        Raises:
            OSError: the disk is full.
        """
        if self._pending:
            self._write()
        if self._pending:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        """Append the pending lines, wholly or not at all."""
        # The header comes with the first entry, so that a run without entries leaves no file.
        size = self.path.stat().st_size if self.path.exists() else 0
        content = self._pending if size else self._header + self._pending
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(content) == len(content):
                    self._pending = b""
                else:  # only a part fitted on the disk
                    file.truncate(size)
        except OSError as error:
            if not is_full(error):
                raise
        if self._pending and not self._warned:
            self._warned = True
            logger.warning("%s: the disk is full; entries are added there once it has room", self.path)


class RejectionLog(RecordingList):
    """`rejected.csv` of a run, and `shorter.csv` beside it.

    Args:
        path: path of `rejected.csv`.
        key: key of a rejection from its path and reason; None for the path.

    Attributes:
        shorter: recordings that end before their header promised.
    """

    def __init__(self, path: str | Path, key: Callable[[str, str], str] | None = None) -> None:
        super().__init__(path, REJECTED_HEADER, key)
        self.shorter = RecordingList(self.path.with_name("shorter.csv"), SHORTER_HEADER)

    def finish(self) -> None:
        super().finish()
        self.shorter.finish()
