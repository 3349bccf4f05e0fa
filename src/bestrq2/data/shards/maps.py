"""Memory maps of tars, opened when they are needed and closed when too many are open."""

from __future__ import annotations

import mmap
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bestrq2.data.decoders import UnreadableAudioError, cannot_open, is_passing
from bestrq2.data.shards.building import load_index, stamp_of
from bestrq2.data.shards.index import Stamp
from bestrq2.data.shards.members import BadShardError
from bestrq2.errors import AudioError, DataError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# A quarter of the files that a process may have open, and no more than these.
MOST_OPEN = 512
CHANGED = "its tar changed since it was indexed; start again to index it anew."


def most_open() -> int:
    """Tars that a process keeps open at once, however many sources it has."""
    if resource is None:
        return MOST_OPEN // 4
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, limit // 4))


class OpenMaps:
    """All maps that this process has open, those used last at the end.

    Attributes:
        most: how many may be open.
        maps: by their `TarMaps`, as it names itself, and the number of the tar in it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.maps: OrderedDict[tuple[object, int], mmap.mmap] = OrderedDict()

    def get(self, key: tuple[object, int]) -> mmap.mmap | None:
        """A map that is open, from now on the one used last."""
        mapped = self.maps.get(key)
        if mapped is not None:
            self.maps.move_to_end(key)
        return mapped

    def add(self, key: tuple[object, int], mapped: mmap.mmap) -> None:
        """Keep a map, and drop those used longest ago while there are too many."""
        while len(self.maps) >= self.most:
            # Not closed: a view of it may still be in use, and closes it when it goes.
            self.maps.popitem(last=False)
        self.maps[key] = mapped

    def shrink(self) -> bool:
        """Drop all, and do with half as many from here on; False where there was none to drop."""
        if not self.maps:
            return False
        self.most = max(1, len(self.maps) // 2)
        self.maps.clear()
        return True

    def forget(self, owner: object) -> None:
        """Drop the maps of one `TarMaps`."""
        for key in [key for key in self.maps if key[0] is owner]:
            del self.maps[key]


OPEN = OpenMaps(most_open())


class TarMaps:
    """The contents of tars as they were indexed; each process opens its own.

    A tar that is replaced stays readable as it was. One that is cut short in place is found out before each access, and
    what is read is copied or converted at once, so nothing refers to the map afterwards. What is left: the system ends
    the process (SIGBUS) if the tar shrinks, or its disk or server fails, within the 0.1 ms that this takes.

    Args:
        tars: their paths.
        stamps: of each, when it was indexed.
        checksums: of each one's index.
    """

    def __init__(self, tars: Sequence[str], stamps: Sequence[Stamp], checksums: Sequence[str]) -> None:
        self.tars = tars
        self.stamps = list(stamps)
        self.checksums = checksums
        self._changed: dict[int, Stamp] = {}
        self._name_itself()

    def _name_itself(self) -> None:
        self._owner = object()
        weakref.finalize(self, OPEN.forget, self._owner)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._name_itself()

    def __len__(self) -> int:
        """Maps open now."""
        return sum(owner is self._owner for owner, _ in OPEN.maps)

    def view(self, tar: int, start: int, size: int) -> np.ndarray:
        """A part of a tar as it lies in the map, to be used at once: the tar may shrink at any later time.

        Args:
            tar: its number.
            start: of the part, in bytes from the tar's beginning.
            size: bytes, all within the tar.

        Returns:
            uint8 [size], not to be written to.

        Raises:
            UnreadableAudioError: the tar is not there, or is another one than was indexed.
            AudioError: it cannot be opened now.
        """
        return np.frombuffer(self[tar], np.uint8, size, start)

    def copied(self, tar: int, start: int, size: int) -> np.ndarray:
        """A part of a tar, in memory of its own; otherwise as `view`.

        Args:
            tar: its number.
            start: of the part, in bytes from the tar's beginning.
            size: bytes, all within the tar.

        Returns:
            uint8 [size].

        Raises:
            UnreadableAudioError: the tar is not there, or is another one than was indexed.
            AudioError: it cannot be opened now.
        """
        return self.view(tar, start, size).copy()

    def __getitem__(self, tar: int) -> mmap.mmap:
        """The content of a tar, just found to be as long as it was; it may shrink at any later time, see `copied`.

        Raises:
            UnreadableAudioError: it is not there, or is another one than was indexed.
            AudioError: it cannot be opened now, for instance because too many files are open.
        """
        mapped = OPEN.get((self._owner, tar))
        if mapped is None:
            mapped = self._opened(tar)
            OPEN.add((self._owner, tar), mapped)
        if mapped.size() < self.stamps[tar].size:
            del OPEN.maps[self._owner, tar]
            raise UnreadableAudioError(CHANGED)
        return mapped

    def _opened(self, tar: int) -> mmap.mmap:
        try:
            return self._map(tar)
        except OSError as error:
            if not is_passing(error):
                raise cannot_open("its tar", error) from error
            # The process may have as many files or maps as it can.
            if not OPEN.shrink():
                raise cannot_open("its tar", error) from error
        try:
            return self._map(tar)
        except OSError as error:
            raise cannot_open("its tar", error) from error

    def _map(self, tar: int) -> mmap.mmap:
        with open(self.tars[tar], "rb", buffering=0) as file:
            stamp = stamp_of(file.fileno())
            if stamp != self.stamps[tar]:
                self._check_touched(tar, stamp)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_touched(self, tar: int, stamp: Stamp) -> None:
        """Pass if a tar has another time of change only: its headers, read once more, say what they said.

        Raises:
            UnreadableAudioError: it changed.
            AudioError: its headers cannot be read now.
        """
        if stamp.size != self.stamps[tar].size or self._changed.get(tar) == stamp:
            raise UnreadableAudioError(CHANGED)
        try:
            index = load_index(Path(self.tars[tar]))
        except BadShardError as error:
            raise UnreadableAudioError(CHANGED) from error
        except DataError as error:
            raise AudioError(f"its tar cannot be read now ({error})") from error
        if (index.stamp, index.checksum()) != (stamp, self.checksums[tar]):
            self._changed[tar] = stamp
            raise UnreadableAudioError(CHANGED)
        self.stamps[tar] = stamp
