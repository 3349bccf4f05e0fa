"""Weighted mixtures of sources, declared in a YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bestrq2.data.hdf5 import HDF5_SUFFIXES
from bestrq2.data.hub import OPTIONS as HUB_OPTIONS
from bestrq2.data.order import Order, Parts
from bestrq2.data.rows import Rows, Segment
from bestrq2.data.shards.remote import is_remote
from bestrq2.data.sources import ComposedSource, Source, split_source
from bestrq2.data.specs import check_keys, split_options, with_options
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import regular_file
from bestrq2.seeding import generator

MIXTURE_SUFFIXES = frozenset({".yaml", ".yml"})
# Length of the blocks over which the shares are exact; longer where rounding would change a small share by too much.
BLOCK, LARGEST_BLOCK = 1000, 1_000_000
TOLERANCE = 0.05


def apportioned(total: int, weights: Sequence[float]) -> np.ndarray:
    """Share out a number in proportion to weights, by largest remainder: int64 [weights] that sum to `total`."""
    quotas = total * np.asarray(weights, np.float64) / math.fsum(weights)
    shares = np.floor(quotas).astype(np.int64)
    largest = np.argsort(-(quotas - shares), kind="stable")
    shares[largest[: total - int(shares.sum())]] += 1
    return shares


class MixtureOrder:
    """An endless sequence of rows in which every block holds each component in its share, shuffled.

    Each component follows its own order: none of its rows is repeated before all of them were drawn.

    Args:
        orders: orders of the components.
        starts: int64 [components], number of the first row of each.
        weights: weights of the components, each above zero.
        seed: random seed of the shuffling.
    """

    def __init__(self, orders: Sequence[Order], starts: np.ndarray, weights: Sequence[float], seed: int) -> None:
        self.orders, self.starts, self.seed = orders, starts, seed
        self.block = BLOCK
        self.shares = apportioned(self.block, weights)
        wanted = np.asarray(weights, np.float64) / math.fsum(weights)
        while self.block < LARGEST_BLOCK and np.any(np.abs(self.shares / self.block / wanted - 1) > TOLERANCE):
            self.block *= 10
            self.shares = apportioned(self.block, weights)
        self._number = -1
        self._components = self._earlier = np.zeros(0, np.int64)

    def _open_block(self, number: int) -> None:
        """Draw the component at every place of a block, and count its earlier places in the block."""
        rng = generator("mixture", self.seed, number)
        self._components = rng.permutation(np.repeat(np.arange(len(self.shares)), self.shares))
        self._earlier = np.empty(self.block, np.int64)
        for component, share in enumerate(self.shares):
            self._earlier[self._components == component] = np.arange(share)
        self._number = number

    def __call__(self, number: int) -> tuple[int, int]:
        """(epoch of its component, row) at place `number` of the sequence."""
        block, place = divmod(number, self.block)
        if block != self._number:
            self._open_block(block)
        component = int(self._components[place])
        # Number of this row in the order of its component.
        turn = block * int(self.shares[component]) + int(self._earlier[place])
        epoch, row = self.orders[component](turn)
        return epoch, int(self.starts[component]) + row


class MixtureRows(Rows):
    """Rows of several sources, numbered one source after the other, in shares of the audio by weights.

    Where the lengths of recordings are not known, the weights are shares of the rows.

    Args:
        components: rows of the sources.
        recordings: int64 [components], number of the first recording of each.
        weights: weight of each, above zero.
        seed: random seed of the shuffling.
    """

    def __init__(self, components: Sequence[Rows], recordings: np.ndarray, weights: Sequence[float], seed: int) -> None:
        self.components, self.recordings, self.seed = components, recordings, seed
        self.firsts = np.cumsum([0, *map(len, components)])
        self.by_length = components[0].by_length
        self.clips = sum(rows.clips for rows in components)
        known = [rows for rows in components if rows.seconds is not None and rows.fill is not None]
        is_known = len(known) == len(components)
        self.seconds = sum(rows.seconds or 0.0 for rows in known) if is_known else None
        # Of the rows: one source may have more audio in each than another.
        each = [(rows.seconds or 1.0) / len(rows) if is_known else 1.0 for rows in components]
        self.weights = (np.array(weights) / each).tolist()
        shares = np.array(self.weights) / math.fsum(self.weights)
        self.fill = float(shares @ [rows.fill or 0.0 for rows in known]) if is_known else None
        self.capacity, self.samples = components[0].capacity, max(rows.samples for rows in components)
        self.rejected = [entry for rows in components for entry in rows.rejected]

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def order(self) -> MixtureOrder:
        return MixtureOrder([rows.order() for rows in self.components], self.firsts[:-1], self.weights, self.seed)

    def _place(self, row: int) -> tuple[int, int]:
        component = int(self.firsts.searchsorted(row, side="right")) - 1
        return component, row - int(self.firsts[component])

    def segments(self, epoch: int, row: int) -> list[Segment]:
        component, own = self._place(row)
        first = int(self.recordings[component])
        return [
            one._replace(recording=first + one.recording) for one in self.components[component].segments(epoch, own)
        ]

    def widths(self, row: int) -> list[int]:
        component, own = self._place(row)
        return self.components[component].widths(own)

    def of_source(self, row: int) -> range:
        component, _ = self._place(row)
        return range(int(self.firsts[component]), int(self.firsts[component + 1]))


@dataclass(frozen=True)
class MixtureSource(ComposedSource):
    """Several sources as one, each with a share of the audio.

    Attributes:
        name: path of the file that declares it.
        components: the sources; their recordings are numbered one source after the other.
        weights: weight of each, above zero; shares of the audio are proportional to them.
    """

    name: str
    components: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def starts(self) -> np.ndarray:
        """int64 [components], number of the first recording of each."""
        return np.cumsum([0, *map(len, self.components)], dtype=np.int64)[:-1]

    def __len__(self) -> int:
        return sum(map(len, self.components))

    def located(self, index: int) -> tuple[Source, int]:
        for component in self.components:
            if index < len(component):
                return component, index
            index -= len(component)
        raise IndexError(f"{self.name} holds {len(self)} recordings")

    def parts(self) -> Parts | None:
        """The shards of all components; one that has none is a part of size 0."""
        if all(component.parts() is None for component in self.components):
            return None
        starts, sizes = [], []
        for first, component in zip(self.starts, self.components, strict=True):
            parts = component.parts() or Parts(np.array([0, len(component)]), np.zeros(1, np.int64))
            starts.append(first + parts.starts[:-1])
            sizes.append(parts.sizes)
        return Parts(np.append(np.concatenate(starts), len(self)), np.concatenate(sizes))

    def is_remote(self) -> bool:
        return any(component.is_remote() for component in self.components)

    def seeds(self, seed: int) -> list[int]:
        """Random seed of each component."""
        return generator("mixture", "components", seed).integers(2**31, size=len(self.components)).tolist()

    def split(self, num_validation: int, seed: int) -> tuple[Source, Source | None]:
        """Split every component, with validation recordings in proportion to the weights."""
        shares = apportioned(num_validation, self.weights)
        parts = [split_source(part, int(share), seed) for part, share in zip(self.components, shares, strict=True)]
        held_out = [(part[1], weight) for part, weight in zip(parts, self.weights, strict=True) if part[1] is not None]
        training = MixtureSource(self.name, tuple(part[0] for part in parts), self.weights)
        if not held_out:
            return training, None
        validation, weights = zip(*held_out, strict=True)
        return training, MixtureSource(self.name, tuple(validation), tuple(weights))


def open_mixture(path: Path, open_component: Callable[[str], Source], parents: tuple[Path, ...] = ()) -> MixtureSource:
    """Open the mixture that a YAML file declares.

    Its only key is `sources`, a list of entries with the keys `data` (what `open_source` takes; relative paths start
    at the file's folder), `weight` (share of the audio, default 1) and the options of that kind of source.

    Args:
        path: the file.
        open_component: opens one source.
        parents: files of the mixtures that contain this one.

    Raises:
        ConfigError: unknown keys, or a weight that is not a positive number.
        DataError: not YAML, no sources, a source that cannot be opened, or the file includes itself.
    """
    path = path.absolute()
    if path.resolve() in parents:
        raise DataError(f"{path} includes itself; name other sources there.")
    components, weights = [], []
    for number, entry in enumerate(_entries(path), 1):
        where = f"{path}, source {number}"
        spec, weight = _component(path, where, entry)
        bare = spec.partition("?")[0]
        if Path(bare).suffix.lower() in MIXTURE_SUFFIXES and not _is_word(spec):
            check_keys(where, entry, ["data", "weight"])
            component: Source = open_mixture(Path(bare), open_component, (*parents, path.resolve()))
        else:
            component = open_component(spec)
        if not len(component):
            raise DataError(f"{where}: {entry['data']} holds no recordings.")
        components.append(component)
        weights.append(weight)
    if not MixtureOrder([], np.zeros(0, np.int64), weights, 0).shares.all():
        raise ConfigError(
            f"{path}: weight {min(weights):g} is less than a millionth of all weights; raise it or leave the source out"
        )
    return MixtureSource(str(path), tuple(components), tuple(weights))


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(regular_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not a mixture; expected a key 'sources' with a list of entries such as 'data: FOLDER'."
        )
    check_keys(str(path), map(str, content), ["sources"])
    entries = content.get("sources")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: 'sources' is missing or empty; expected a list of entries such as 'data: FOLDER'.")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise DataError(f"{path}, source {number}: expected 'data: FOLDER', found {entry!r}.")
    return entries


def _component(path: Path, where: str, entry: dict[str, Any]) -> tuple[str, float]:
    """Source and weight of an entry."""
    options = {str(key): value for key, value in entry.items() if key not in ("data", "weight")}
    data = entry.get("data")
    if not isinstance(data, str) or not data:
        check_keys(where, options, OPTIONS | {"data", "weight"})
        raise DataError(f"{where}: 'data' is missing or not a text; name a folder, a file or another source.")
    check_keys(where, options, sorted(OPTIONS | {"data", "weight"}))
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigError(f"{where}: weight is {weight!r}; it must be a number above 0.")
    for key, value in options.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be a text.")
    texts = {key: str(value) for key, value in options.items()}
    spec = _resolved(path, data)
    if Path(spec.partition("?")[0]).suffix.lower() in HDF5_SUFFIXES and not Path(spec).exists() and not _is_word(spec):
        spec, given = split_options(spec)
        texts |= given
    if "exclude" in texts:
        texts["exclude"] = str(path.parent / Path(texts["exclude"]).expanduser())
    return with_options(spec, texts), float(weight)


OPTIONS = frozenset({"exclude", *HUB_OPTIONS})
"""Options of all kinds of sources; each kind checks which of them it takes."""


def _is_word(data: str) -> bool:
    """Whether a source is named by something other than a path."""
    return is_remote(data) or data.startswith(("hub:", "soundworld:")) or data == "soundworld"


def _resolved(path: Path, data: str) -> str:
    if data.startswith(("hub:./", "hub:../")):
        return f"hub:{path.parent / data.removeprefix('hub:')}"
    return data if _is_word(data) else str(path.parent / Path(data).expanduser())
