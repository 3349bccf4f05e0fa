"""Memory maps of tars, opened when they are needed and closed when too many are open."""

from __future__ import annotations

import errno
import mmap
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bestrq2.data.decoding import UnreadableAudioError
from bestrq2.data.shards.building import stamp_of
from bestrq2.data.shards.index import Stamp

# Half of the files that a process may have open by default.
MOST_OPEN = 512
CHANGED = "its tar changed since it was indexed; start again to index it anew."


class TarMaps:
    """The contents of tars as they were indexed; each process opens its own.

    A tar that is replaced stays readable as it was. One that is cut short in place is found out before each access, and
    what is read is copied at once, so nothing refers to the map afterwards. What is left: the system ends the process
    (SIGBUS) if the tar shrinks, or its disk or server fails, within the microseconds of the copying itself.

    Args:
        tars: their paths.
        sizes: int64 [tars], bytes of each when it was indexed.
        times: int64 [tars], time of its change in ns.
        most_open: maps to keep open, those used last.
    """

    def __init__(self, tars: Sequence[str], sizes: np.ndarray, times: np.ndarray, most_open: int = MOST_OPEN) -> None:
        self.tars = tars
        self.sizes = sizes
        self.times = times
        self.most_open = most_open
        self._open: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        """Maps open now."""
        return len(self._open)

    def copied(self, tar: int, start: int, size: int) -> np.ndarray:
        """A part of a tar, in memory of its own.

        Args:
            tar: its number.
            start: of the part, in bytes from the tar's beginning.
            size: bytes, all within the tar.

        Returns:
            uint8 [size].

        Raises:
            UnreadableAudioError: the tar cannot be opened, or is another one than was indexed.
        """
        return np.frombuffer(self[tar], np.uint8, size, start).copy()

    def __getitem__(self, tar: int) -> mmap.mmap:
        """The content of a tar, just found to be as long as it was; it may shrink at any later time, see `copied`.

        Raises:
            UnreadableAudioError: it cannot be opened, or is another one than was indexed.
        """
        mapped = self._open.get(tar)
        if mapped is None:
            mapped = self._opened(tar)
            while len(self._open) >= self.most_open:
                # Not closed: a view of it may still be in use, and closes it when it goes.
                self._open.popitem(last=False)
            self._open[tar] = mapped
        else:
            self._open.move_to_end(tar)
        if mapped.size() < self.sizes[tar]:
            del self._open[tar]
            raise UnreadableAudioError(CHANGED)
        return mapped

    def _opened(self, tar: int) -> mmap.mmap:
        try:
            return self._map(tar)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) or not self._open:
                raise UnreadableAudioError(f"its tar cannot be opened ({error.strerror}).") from error
            # The process has as many files or maps as it may: do with fewer from here on.
            self.most_open = max(1, len(self._open) // 2)
            self._open.clear()
            return self._map(tar)

    def _map(self, tar: int) -> mmap.mmap:
        with open(self.tars[tar], "rb", buffering=0) as file:
            if stamp_of(file.fileno()) != Stamp(int(self.sizes[tar]), int(self.times[tar])):
                raise UnreadableAudioError(CHANGED)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
