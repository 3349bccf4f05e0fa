"""Sources: numbered collections of recordings, read whole or one crop at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bestrq2.data.audio import array_decoder, errors_named, open_audio, random_crop, usable_span
from bestrq2.data.decoders import Decoder
from bestrq2.data.order import Parts, sample_order
from bestrq2.errors import DataError

# First word of its seed sequence, so that it shares no random numbers with others.
SPLIT = 0x5B117


class RemoteShard(NamedTuple):
    """A remote tar.

    Attributes:
        url: its address.
        size: bytes.
    """

    url: str
    size: int


class Stamp(NamedTuple):
    """Identity of the content of a recording, as far as it can be told without reading it.

    Attributes:
        path: absolute path, or name.
        size: bytes; -1 for a file that is not there.
        changed_ns: time of the last change in ns.
    """

    path: str
    size: int = -1
    changed_ns: int = -1


class LoaderError(DataError):
    """Base of errors that reading a source may raise in a worker process and that end the job.

    A DataLoader builds the error anew from a worker's stack trace; this keeps the sentence and leaves out the trace.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Source(ABC):
    """A numbered collection of recordings.

    Attributes:
        name: origin of the recordings, for messages and the records of a run.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of recordings, usable or not."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name of a recording: its path, or for instance "soundworld clip 17"."""

    def names(self) -> Iterator[str]:
        """Names of all recordings, in order; sources that store names together read many at once."""
        return map(self.describe, range(len(self)))

    @abstractmethod
    def opened(self, index: int) -> AbstractContextManager[Decoder]:
        """A decoder for one recording, closed at the end of the block.

        Raises:
            UnreadableAudioError: nothing of it can be decoded.
        """

    def unconverted(self, index: int, sampling_rate: int) -> AbstractContextManager[Decoder]:
        """A decoder like that of `opened` that leaves 16-bit samples as they are where they have the wanted rate."""
        return self.opened(index)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples per channel and rate in Hz of all recordings, int64 [recordings] each.

        -1 samples where only opening the recording tells, as by default; 0 where it cannot be used.
        """
        return np.full(len(self), -1), np.zeros(len(self), np.int64)

    def stamp(self, index: int) -> Stamp | None:
        """What a length measured now is recognised by later; None where it is not to be kept."""
        return None

    def metadata(self, index: int) -> dict[str, Any]:
        """Labels, origin and the like of a recording, ready for JSON; empty by default."""
        return {}

    def parts(self) -> Parts | None:
        """Shards in which the recordings are stored, in their order; None where each can be read by itself."""
        return None

    def is_remote(self) -> bool:
        """Whether some recordings are in remote tars."""
        return False

    def remote_shard(self, index: int) -> RemoteShard | None:
        """The remote tar that holds a recording; None for a recording that is here."""
        return None

    def split(self, num_validation: int, seed: int) -> tuple[Source, Source | None]:
        """Split into training and validation recordings; see `split_source`."""
        taken = min(num_validation, max(1, len(self) // 10))
        order = sample_order(SPLIT, len(self), seed, self.parts())
        training, validation = np.sort(order[taken:]), np.sort(order[:taken])
        return SubsetSource(self, training, self.name), SubsetSource(self, validation, self.name)

    def read(self, index: int, sampling_rate: int, rng: np.random.Generator, max_seconds: float) -> np.ndarray:
        """A random crop of one recording; recordings shorter than the crop come whole, with their true length.

        Args:
            index: number of the recording.
            sampling_rate: wanted rate in Hz.
            rng: random generator of the position; the crop is a function of its state.
            max_seconds: longest crop in seconds.

        Returns:
            [samples], mono, at `sampling_rate`, neither silent nor holding NaN: float32, or int16 (full scale 32768)
            where the recording is kept like that.

        Raises:
            AudioError: the crop cannot be used. With an UnreadableAudioError, no crop of the recording can.
        """
        with self.unconverted(index, sampling_rate) as decoder:
            return random_crop(decoder, rng, sampling_rate, max_seconds)

    def segment(self, index: int, start: int, samples: int, sampling_rate: int) -> np.ndarray:
        """A stretch of one recording.

        Args:
            index: number of the recording.
            start: first sample, at `sampling_rate`.
            samples: length at `sampling_rate`; the result is shorter where the recording ends earlier.
            sampling_rate: wanted rate in Hz.

        Returns:
            [samples], as of `read`.

        Raises:
            AudioError: the stretch cannot be used. With an UnreadableAudioError, nothing of the recording can.
        """
        with self.unconverted(index, sampling_rate) as decoder:
            return usable_span(decoder, start, samples, sampling_rate)


class PathList(Sequence[Path]):
    """Paths in one block of memory, without an object for each; worker processes share it.

    Args:
        paths: the paths, in their order.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._names = pa.array(map(_encoded, paths), pa.large_binary())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]
        return Path(os.fsdecode(self._names[index].as_py()))


def _encoded(path: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:  # half of a UTF-16 pair, possible in JSON: names no file
        return path.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class FileSource(Source):
    """Audio files; none is opened before it is read.

    Attributes:
        name: origin of the files.
        files: paths of the files.
        labels: label of each file, "" for none; None if there are no labels.
    """

    name: str
    files: Sequence[Path]
    labels: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        return str(self.files[index])

    def opened(self, index: int) -> AbstractContextManager[Decoder]:
        return open_audio(self.files[index])

    def stamp(self, index: int) -> Stamp:
        path = os.path.abspath(self.files[index])
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return Stamp(path)
        return Stamp(path, status.st_size, status.st_mtime_ns)

    def metadata(self, index: int) -> dict[str, Any]:
        return {"label": self.labels[index]} if self.labels is not None and self.labels[index] else {}


@dataclass(frozen=True)
class ArraySource(Source):
    """Waveforms in memory.

    Attributes:
        waveforms: each [samples] or [channels, samples], float or integer (see `array_decoder`); an array
            [clips, samples] is a sequence of these.
        sampling_rate: their rate in Hz.
        name: name of the collection; recordings are called "NAME clip 17".
    """

    waveforms: Sequence[np.ndarray] | np.ndarray
    sampling_rate: int
    name: str = "array"

    def __len__(self) -> int:
        return len(self.waveforms)

    def describe(self, index: int) -> str:
        return f"{self.name} clip {index}"

    @contextmanager
    def opened(self, index: int) -> Iterator[Decoder]:
        with errors_named(self.describe(index)):
            yield array_decoder(self.waveforms[index], self.sampling_rate)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.waveforms, np.ndarray) and self.waveforms.ndim > 1:
            samples = np.full(len(self), self.waveforms.shape[-1])
        else:
            samples = np.array([(0, *np.shape(waveform))[-1] for waveform in self.waveforms], np.int64)
        return samples, np.full(len(self), self.sampling_rate)


class ComposedSource(Source):
    """Recordings of other sources under numbers of their own."""

    @abstractmethod
    def located(self, index: int) -> tuple[Source, int]:
        """The source that holds a recording, and its number there."""

    def describe(self, index: int) -> str:
        source, place = self.located(index)
        return source.describe(place)

    def opened(self, index: int) -> AbstractContextManager[Decoder]:
        source, place = self.located(index)
        return source.opened(place)

    def unconverted(self, index: int, sampling_rate: int) -> AbstractContextManager[Decoder]:
        source, place = self.located(index)
        return source.unconverted(place, sampling_rate)

    def stamp(self, index: int) -> Stamp | None:
        source, place = self.located(index)
        return source.stamp(place)

    def metadata(self, index: int) -> dict[str, Any]:
        source, place = self.located(index)
        return source.metadata(place)

    def remote_shard(self, index: int) -> RemoteShard | None:
        source, place = self.located(index)
        return source.remote_shard(place)


@dataclass(frozen=True)
class SubsetSource(ComposedSource):
    """Some recordings of another source.

    Attributes:
        whole: the other source.
        indices: int64 [recordings], numbers of the recordings in the other source.
        name: origin of the recordings.
    """

    whole: Source
    indices: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.indices)

    def located(self, index: int) -> tuple[Source, int]:
        return self.whole, int(self.indices[index])

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        frames, rates = self.whole.lengths()
        return frames[self.indices], rates[self.indices]

    def is_remote(self) -> bool:
        return self.whole.is_remote()

    def parts(self) -> Parts | None:
        """The whole source's shards, reduced to these recordings; None if these are in another order."""
        parts = self.whole.parts()
        if parts is None or np.any(np.diff(self.indices) < 0):
            return None
        return Parts(self.indices.searchsorted(parts.starts), parts.sizes)


def split_source(source: Source, num_validation: int, seed: int) -> tuple[Source, Source | None]:
    """Two disjoint parts of a source, a function of its length and the seed.

    Args:
        source: source to split.
        num_validation: number of validation recordings; at most a tenth of the source is taken, but at least one.
        seed: random seed of the choice.

    Returns:
        (training, validation); validation is None if `num_validation` is 0 or the source has one recording only.
    """
    if num_validation <= 0 or len(source) < 2:
        return source, None
    return source.split(num_validation, seed)


def common_folder(names: Iterable[str]) -> str:
    """The folder that all recordings are in, with a slash at its end; "" for none."""
    root: str | None = None
    for name in names:
        if root is None:
            root = name[: name.rfind("/") + 1]
        while not name.startswith(root):
            root = root[: root.rfind("/", 0, -1) + 1]
    return root or ""


def top_folder(name: str, root: str) -> str:
    """The folder of a recording that is directly in `root`; "" for one in no such folder. Tars are no folders."""
    folder, inside, _ = name[len(root) :].partition("/")
    return folder if inside and root and not folder.endswith(".tar") else ""
