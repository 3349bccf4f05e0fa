"""Open tars: bytes at any offset, few files open at once, and tars that change while they are used."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.data.places import UnreadableAudioError, cannot_open, is_passing
from bestrq2.data.shards import remote
from bestrq2.data.shards.index import Stamp, load_index, stamp_of
from bestrq2.data.shards.members import BadShardError
from bestrq2.errors import AudioError, DataError

# A quarter of the files that a process may have open, and no more than these.
MOST_OPEN = 512
# Shards of the cache stay locked against eviction while they are open, so a process keeps few of them.
MOST_CACHED = 16
CHANGED = "its tar changed since it was indexed; start again to index it anew."


def most_open() -> int:
    """Tars that a process keeps open at once, however many sources it has."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, limit // 4))


class OpenFiles:
    """Files that this process keeps open, the most recently used last.

    A file that is dropped is closed once the read in hand is done, since that holds a reference to it. Forked processes
    share open files; they only read at explicit offsets.

    Args:
        most: largest number of files.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.files: OrderedDict[tuple[str, Stamp], FileIO] = OrderedDict()

    def get(self, key: tuple[str, Stamp]) -> FileIO | None:
        """A file that is open; it becomes the most recently used."""
        file = self.files.get(key)
        if file is not None:
            self.files.move_to_end(key)
        return file

    def add(self, key: tuple[str, Stamp], file: FileIO) -> None:
        """Keep a file, and drop the least recently used while there are too many."""
        while len(self.files) >= self.most:
            self.files.popitem(last=False)
        self.files[key] = file

    def shrink(self) -> bool:
        """Drop all files, and keep half as many from now on; False where there was none to drop."""
        if not self.files:
            return False
        self.most = max(1, len(self.files) // 2)
        self.files.clear()
        return True


OPEN, OPEN_CACHED = OpenFiles(most_open()), OpenFiles(MOST_CACHED)


class TarFiles:
    """Bytes of tars as they were indexed; each process opens them for itself.

    A tar that is replaced while it is open is read as it was. One that is cut short in place gives an error.

    Args:
        tars: paths, or URLs of remote tars, which are read from the cache.
        stamps: size and time of each when it was indexed.
        checksums: checksum of each one's index.
    """

    def __init__(self, tars: Sequence[str], stamps: Sequence[Stamp], checksums: Sequence[str]) -> None:
        self.tars = tars
        self.stamps = list(stamps)
        self.checksums = checksums
        self._changed: dict[int, Stamp] = {}

    def read(self, tar: int, start: int, size: int) -> np.ndarray:
        """A part of a tar.

        Args:
            tar: number of the tar.
            start: first byte, from the tar's beginning.
            size: number of bytes, all within the tar.

        Returns:
            uint8 [size].

        Raises:
            UnreadableAudioError: the tar is missing, or differs from the one that was indexed.
            AudioError: it cannot be opened or read now, for instance because too many files are open.
        """
        content = np.empty(size, np.uint8)
        self.read_into(content, tar, start)
        return content

    def read_into(self, buffer: Any, tar: int, start: int) -> None:
        """Fill a writable buffer of bytes with a part of a tar; see `read`."""
        file, view, found = self.open(tar), memoryview(buffer), 0
        try:
            # A single call reads 2 GB at most.
            while found < len(view) and (more := os.preadv(file.fileno(), [view[found:]], start + found)):
                found += more
        except OSError as error:
            raise cannot_open("its tar", error) from error
        if found < len(view):
            self._forget(tar)
            raise UnreadableAudioError(CHANGED)
        # After reading, so that bytes of another content are never used.
        if (stamp := stamp_of(file.fileno())) != self.stamps[tar]:
            self._forget(tar)
            self._check_touched(tar, stamp)

    def _forget(self, tar: int) -> None:
        self._files(tar).files.pop((self.tars[tar], self.stamps[tar]), None)

    def _files(self, tar: int) -> OpenFiles:
        return OPEN_CACHED if remote.is_remote(self.tars[tar]) else OPEN

    def open(self, tar: int) -> FileIO:
        """A tar, open for reading at explicit offsets; the file is shared and not to be closed.

        Raises:
            UnreadableAudioError: the tar is missing, or differs from the one that was indexed.
            AudioError: it cannot be opened now.
        """
        files, path = self._files(tar), self.tars[tar]
        file = files.get((path, self.stamps[tar]))
        if file is None:
            try:
                file = self._opened(tar)
            except OSError as error:
                # The process may have as many files open as it can.
                if not is_passing(error) or not (OPEN.shrink() or OPEN_CACHED.shrink()):
                    raise cannot_open("its tar", error) from error
                try:
                    file = self._opened(tar)
                except OSError as again:
                    raise cannot_open("its tar", again) from again
            files.add((path, self.stamps[tar]), file)
        return file

    def _opened(self, tar: int) -> FileIO:
        path = self.tars[tar]
        file = remote.open_shard(path) if remote.is_remote(path) else FileIO(path)
        stamp = stamp_of(file.fileno())
        if stamp != self.stamps[tar]:
            self._check_touched(tar, stamp)
        return file

    def _check_touched(self, tar: int, stamp: Stamp) -> None:
        """Check that only a tar's time of change differs: its headers, read once more, say what they said.

        A shard that was fetched again has a new time, too.

        Raises:
            UnreadableAudioError: it changed.
            AudioError: its headers cannot be read now.
        """
        if stamp.size != self.stamps[tar].size or self._changed.get(tar) == stamp:
            raise UnreadableAudioError(CHANGED)
        path = self.tars[tar]
        try:
            index = load_index(remote.cached_path(path) if remote.is_remote(path) else Path(path))
        except BadShardError as error:
            raise UnreadableAudioError(CHANGED) from error
        except DataError as error:
            raise AudioError(f"its tar cannot be read now ({error})") from error
        if (index.stamp, index.checksum()) != (stamp, self.checksums[tar]):
            self._changed[tar] = stamp
            raise UnreadableAudioError(CHANGED)
        self.stamps[tar] = stamp
