"""What the page of `bestrq2 explore` shows of an embedded corpus: map, lists of recordings, sounds."""

from __future__ import annotations

import base64
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bestrq2.data.sources import common_folder
from bestrq2.errors import ConfigError
from bestrq2.inference.embedder import Embedder
from bestrq2.progress import format_duration
from bestrq2.search.table import EmbeddingTable, Hit
from bestrq2.text import counted

CLUSTERS = 12
"""Clusters of the map: as many as it has colours."""
LISTED, NEAREST = 100, 20
"""Most recordings of a list on the page, and of one of nearest recordings."""
SOUND_SECONDS, SOUND_RATE = 60.0, 44_100
"""Longest stretch of a recording that is played at once (s), and its sampling rate (Hz)."""

# Groups of a colouring with entries of their own in the legend; smaller ones share the last.
_MOST_GROUPS = 300


class Listed(NamedTuple):
    """A recording in a list of the page: its row, a fact about it, and where to play it from (s)."""

    row: int
    fact: str = ""
    start: float = 0.0


class Explorer:
    """What the page shows of a table of embeddings, as the values of its components.

    Args:
        table: the embedded corpus.
        load: loads the model that the table was made with; called when a sound is first searched for.
    """

    def __init__(self, table: EmbeddingTable, load: Callable[[], Embedder]) -> None:
        self.table, self._load = table, load
        self._embedder: Embedder | None = None
        self._loading = threading.Lock()
        self._root = common_folder(table.paths)
        self.colourings: dict[str, Callable[[], Sequence[str]]] = {}
        if table.labels is not None:
            self.colourings["Label"] = lambda: table.labels or []
        if len(set(table.folders)) > 1:
            self.colourings["Folder"] = lambda: table.folders
        self.colourings["Cluster"] = lambda: [f"cluster {number + 1}" for number in table.clusters(CLUSTERS)]
        self._found: dict[str, Sequence[str]] = {}
        places, self.method = table.coordinates()
        # Both axes fill the map: their units mean nothing.
        filled = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-12)
        self._points = _base64((65535 * filled).astype("<u2"))

    def title(self, row: int) -> str:
        """Name of a recording below the folder that holds all, and its duration."""
        return f"{self._name(row)} · {self.table.seconds[row]:.1f} s"

    def _name(self, row: int) -> str:
        path = self.table.paths[row]
        return path.removeprefix(self._root).lstrip("/") or path

    # Map

    def map(self, colouring: str) -> dict[str, Any]:
        """Points, groups and names of groups for the script of the page."""
        names, groups = self.groups(colouring)
        return {"points": self._points, "groups": _base64(groups.astype("<u2")), "names": names}

    def groups(self, colouring: str) -> tuple[list[str], NDArray[np.uint16]]:
        """Names of the groups of a colouring, largest first, and the number of the group of every recording."""
        return _grouped(self._values(colouring))

    def _values(self, colouring: str) -> Sequence[str]:
        if colouring not in self._found:
            self._found[colouring] = self.colourings[colouring]()
        return self._found[colouring]

    def selected(self, bits: str) -> NDArray[np.int64]:
        """Rows of a selection on the map, which is one bit per recording in base64."""
        packed = np.frombuffer(base64.b64decode(bits), np.uint8)
        return np.flatnonzero(np.unpackbits(packed, bitorder="little")[: len(self.table)])

    # Lists

    def selection(self, rows: NDArray[np.int64]) -> str:
        """List of the selected recordings."""
        if not len(rows):
            return "<p>Draw around points of the map, or choose a colour below it.</p>"
        total = f"{counted(len(rows), 'recording')}, {format_duration(float(self.table.seconds[rows].sum()))}"
        return self._list(total, [Listed(int(row)) for row in rows[:LISTED]], more=len(rows) - LISTED, ring=False)

    def like(self, row: int) -> str:
        """List of the recordings nearest to another."""
        rows, similarities = self.table.nearest(self._checked(row), max(1, min(NEAREST, len(self.table) - 1)))
        found = [Listed(int(one), f"{value:.2f}") for one, value in zip(rows, similarities, strict=True)]
        return self._list(f"Nearest to {self._name(row)}", found)

    def nearest(self, sound: str) -> str:
        """List of the recordings nearest to a sound in a file, each from the stretch that is most like it."""
        with self._loading:
            self._embedder = self._embedder or self._load()
        hits = self.table.search(self._embedder, Path(sound), count=min(NEAREST, len(self.table)))
        return self._list("Nearest to your sound", [_place(hit) for hit in hits])

    def near_duplicates(self, threshold: float) -> str:
        """Lists of recordings that are connected by pairs above a similarity."""
        pairs, _ = self.table.near_duplicates(threshold)
        groups = _connected(pairs.tolist())
        if not groups:
            return f"<p>No two recordings have a similarity of {threshold:g} or more.</p>"
        items, shown = [], 0
        for group in groups:
            if shown + len(group) > LISTED and shown:
                break
            items.append([Listed(row) for row in group])
            shown += len(group)
        title = f"{counted(sum(map(len, groups)), 'recording')} in {counted(len(groups), 'group')}"
        copies = [row for group in groups for row in group[1:]]  # of groups that are not listed, too
        return self._lists(title, items, more=len(groups) - len(items), what="groups", copies=copies)

    def outliers(self) -> str:
        """List of the recordings that are least like any others."""
        rows, similarities = self.table.outliers(min(LISTED // 2, len(self.table)))
        found = [Listed(int(row), f"{value:.2f}") for row, value in zip(rows, similarities, strict=True)]
        return self._list("Least like their nearest, with the mean similarity to these", found)

    def _list(self, title: str, items: Sequence[Listed], more: int = 0, ring: bool = True) -> str:
        return self._lists(title, [items], more, ring=ring)

    def _lists(
        self,
        title: str,
        lists: Sequence[Sequence[Listed]],
        more: int = 0,
        what: str = "recordings",
        ring: bool = True,
        copies: Sequence[int] = (),
    ) -> str:
        select_copies = f'<button data-rows="{" ".join(map(str, copies))}">Select all but one of each</button>'
        parts = [
            f'<div class="sounds{" ringed" if ring else ""}"><p><b>{escape(title)}</b></p><p class="actions">',
            '<button data-all="play">▶ Play all</button>',
            '<button data-all="choose">Select these</button>' if ring else "",
            select_copies if copies else "",
            "</p>",
            *(f"<ol>{''.join(map(self._item, items))}</ol>" for items in lists),
            f"<p>… and {more:,} more {what}</p>" if more > 0 else "",
            "</div>",
        ]
        return "".join(parts)

    def _item(self, item: Listed) -> str:
        folder, _, file = escape(self._name(item.row)).rpartition("/")
        facts = " · ".join(filter(None, (item.fact, f"{self.table.seconds[item.row]:.1f} s", folder)))
        play = f'data-play="{item.row}" data-start="{item.start:g}"'
        return (
            f'<li><button {play} aria-label="Play {file}">▶</button><span class="name">{file}<small>{facts}</small>'
            f'</span><button data-like="{item.row}" aria-label="Nearest to {file}">Similar</button></li>'
        )

    # Sounds and selections

    def sound(self, row: int, start: float) -> bytes:
        """WAV file of a stretch of a recording, at most SOUND_SECONDS long.

        Raises:
            AudioError: the recording cannot be read.
            ConfigError: there is no such row.
        """
        import soundfile

        waveform = self.table.read(self._checked(row), SOUND_RATE, max(0.0, start), SOUND_SECONDS)
        file = io.BytesIO()
        soundfile.write(file, waveform, SOUND_RATE, format="WAV", subtype="PCM_16")
        return file.getvalue()

    def labelled(self, rows: NDArray[np.int64], label: str, colouring: str) -> dict[int, str]:
        """Labels for recordings: the given one, or else the names of their groups.

        Raises:
            ConfigError: no label is given, and some have none.
        """
        if label.strip():
            return dict.fromkeys(map(int, rows), label.strip())
        values = self._values(colouring)
        if without := sum(not values[row] for row in rows):
            raise ConfigError(f"{counted(without, 'recording')} of the selection have no label; type one")
        return {int(row): values[row] for row in rows}

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self.table):
            raise ConfigError(f"there is no row {row}; {self.table.path} has {counted(len(self.table), 'recording')}")
        return row


def _place(hit: Hit) -> Listed:
    if hit.place is None:
        return Listed(hit.row, f"{hit.similarity:.2f}")
    fact = f"{hit.similarity:.2f} · most like it from {hit.place.start:.1f} to {hit.place.stop:.1f} s"
    return Listed(hit.row, fact, hit.place.start)


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _grouped(values: Sequence[str]) -> tuple[list[str], NDArray[np.uint16]]:
    """Names of groups, largest first, and the number of the group of each value."""
    names = [name for name, _ in Counter(values).most_common()]
    numbers = {name: min(number, _MOST_GROUPS) for number, name in enumerate(names)}
    shown = [name or "none" for name in names[:_MOST_GROUPS]]
    if len(names) > _MOST_GROUPS:
        shown.append(f"{len(names) - _MOST_GROUPS:,} more")
    return shown, np.array([numbers[value] for value in values], np.uint16)


def _connected(pairs: Iterable[Sequence[int]]) -> list[list[int]]:
    """Groups of numbers that pairs connect, in the order of the pairs; the numbers of each rise."""
    groups: dict[int, list[int]] = {}
    for first, second in pairs:
        one, other = groups.setdefault(first, [first]), groups.setdefault(second, [second])
        if one is not other:
            one += other
            groups |= dict.fromkeys(other, one)
    return [sorted(group) for group in {id(group): group for group in groups.values()}.values()]
