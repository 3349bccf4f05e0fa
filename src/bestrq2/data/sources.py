"""Sources: where unlabelled audio comes from, one crop at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from bestrq2.data.audio import AUDIO_SUFFIXES, array_decoder, audio_info, errors_named, open_audio, random_crop
from bestrq2.data.seeding import generator
from bestrq2.data.tables import LIST_SUFFIXES, read_rows, resolved
from bestrq2.errors import AudioError, DataError

SOUNDWORLD_CLIPS = 3000
# First word of its seed sequence, so that it shares no random numbers with others.
SPLIT = 0x5B117


class Source(ABC):
    """A numbered collection of recordings.

    Attributes:
        name: where it comes from, for the records of a run.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of recordings, usable or not."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What a person calls this recording: its path, or for instance "soundworld clip 17"."""

    @abstractmethod
    def read(self, index: int, sampling_rate: int, rng: np.random.Generator, max_seconds: float) -> np.ndarray:
        """A random crop of one recording; recordings shorter than the crop come whole, with their true length.

        Args:
            index: which recording.
            sampling_rate: wanted rate in Hz.
            rng: draws the position; the crop is a function of its state.
            max_seconds: longest crop.

        Returns:
            float32 [samples], mono, at `sampling_rate`, neither silent nor holding NaN.

        Raises:
            AudioError: nothing usable there. An UnreadableAudioError holds for every other crop of it too.
        """


class PathList(Sequence[Path]):
    """Paths in one piece of memory: a million of them take their letters only, and worker processes share them.

    Args:
        paths: the paths, in their order.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        names = [os.fsencode(path) for path in paths]
        self._letters = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return Path(os.fsdecode(self._letters[self._ends[place] : self._ends[place + 1]]))


@dataclass(frozen=True)
class FileSource(Source):
    """Audio files; none is opened before it is read.

    Attributes:
        name: where they come from.
        files: their paths.
    """

    name: str
    files: Sequence[Path]

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def read(self, index: int, sampling_rate: int, rng: np.random.Generator, max_seconds: float) -> np.ndarray:
        """A random crop of one file; see `Source.read`."""
        with open_audio(self.files[index]) as decoder:
            return random_crop(decoder, rng, sampling_rate, max_seconds)


@dataclass(frozen=True)
class ArraySource(Source):
    """Waveforms in memory.

    Attributes:
        waveforms: each [samples] or [channels, samples], float or integer (see `as_mono`); an array [clips, samples]
            is a sequence of these.
        sampling_rate: their rate in Hz.
        name: what to call them; "clip 17 of NAME" describes one.
    """

    waveforms: Sequence[np.ndarray] | np.ndarray
    sampling_rate: int
    name: str = "array"

    def __len__(self) -> int:
        return len(self.waveforms)

    def describe(self, index: int) -> str:
        """The name and the number."""
        return f"{self.name} clip {index}"

    def read(self, index: int, sampling_rate: int, rng: np.random.Generator, max_seconds: float) -> np.ndarray:
        """A random crop of one waveform; see `Source.read`."""
        with errors_named(self.describe(index)):
            decoder = array_decoder(self.waveforms[index], self.sampling_rate)
            return random_crop(decoder, rng, sampling_rate, max_seconds)


@dataclass(frozen=True)
class SubsetSource(Source):
    """Some recordings of another source.

    Attributes:
        whole: the other source.
        indices: int64 [recordings], which of them, in this order.
        name: where they come from.
    """

    whole: Source
    indices: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.indices)

    def describe(self, index: int) -> str:
        """As the whole source describes it."""
        return self.whole.describe(int(self.indices[index]))

    def read(self, index: int, sampling_rate: int, rng: np.random.Generator, max_seconds: float) -> np.ndarray:
        """A random crop of one recording; see `Source.read`."""
        return self.whole.read(int(self.indices[index]), sampling_rate, rng, max_seconds)


def open_source(spec: str | Path) -> Source:
    """The source that a word or path stands for.

    Args:
        spec: a folder (searched recursively for files with an audio suffix), an audio file, a list (.txt with one path
            a line, .csv or .tsv with a column "path", .jsonl with a key "path", "audio" or "audio_filepath"; relative
            paths start at the list's folder), or "soundworld" or "soundworld:N" for N generated clips (3000).

    Returns:
        The source; its files are not opened yet.

    Raises:
        DataError: missing, an empty folder or list, or neither list nor audio.
    """
    if isinstance(spec, str) and (spec == "soundworld" or spec.startswith("soundworld:")):
        return _soundworld(spec)
    path = Path(spec).expanduser()
    name = str(path.absolute())
    try:
        if path.is_dir():
            return FileSource(name, audio_files(path))
        if not path.exists():
            raise DataError(f"{path} does not exist; give a folder, an audio file, a list of paths, or 'soundworld'.")
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}).") from error
    if path.suffix.lower() in LIST_SUFFIXES:
        rows = read_rows(path, [("path", "audio", "audio_filepath") if path.suffix.lower() == ".jsonl" else ("path",)])
        return FileSource(name, PathList(str(resolved(path, row["path"])) for row in rows))
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        try:
            audio_info(path)
        except AudioError as error:
            lists = ", ".join(sorted(LIST_SUFFIXES))
            raise DataError(f"{path} is neither audio nor a list of paths ({lists}).") from error
    return FileSource(name, [path])


def soundworld_count(spec: str, default: int) -> int:
    """N of "soundworld:N".

    Raises:
        DataError: N is not a positive whole number.
    """
    number = spec.partition(":")[2] if ":" in spec else str(default)
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise DataError(f"{spec!r} is no source; expected 'soundworld:N' with a positive whole number N of clips.")
    return int(number)


def _soundworld(spec: str) -> Source:
    count = soundworld_count(spec, SOUNDWORLD_CLIPS)
    from bestrq2.data.soundworld import SAMPLE_RATE, unlabelled

    return ArraySource(unlabelled(count, seed=0), SAMPLE_RATE, name="soundworld")


def audio_files(folder: Path) -> PathList:
    """All files below a folder with an audio suffix, sorted; hidden ones (leading dot) are left out.

    Folders that are links are entered, each real folder once.

    Raises:
        DataError: there are none, or a folder cannot be listed.
    """
    found: list[str] = []
    others: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{current} cannot be listed ({error.strerror}); check its permissions.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append(entry.path)
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in AUDIO_SUFFIXES:
                found.append(entry.path)
            else:
                others[suffix or "none"] = others.get(suffix or "none", 0) + 1
    if found:
        return PathList(sorted(found))
    if others:
        kinds = ", ".join(sorted(others, key=lambda suffix: (-others[suffix], suffix))[:5])
        raise DataError(
            f"{folder} holds {sum(others.values())} files and none with an audio suffix (found: {kinds}; "
            "expected .wav, .flac, .mp3, .ogg, .m4a and the like)."
        )
    raise DataError(f"{folder} is empty: no files in it or below; put audio files there.")


def split_source(source: Source, num_validation: int, seed: int) -> tuple[Source, Source | None]:
    """Two disjoint parts of a source, a function of its length and the seed.

    Args:
        source: what to split.
        num_validation: wanted recordings for validation; at most a tenth of the source is taken, but at least one.
        seed: which ones.

    Returns:
        (training, validation); validation is None if `num_validation` is 0 or the source has one recording only.
    """
    if num_validation <= 0 or len(source) < 2:
        return source, None
    taken = min(num_validation, max(1, len(source) // 10))
    order = generator(SPLIT, seed).permutation(len(source))
    training, validation = np.sort(order[taken:]), np.sort(order[:taken])
    return SubsetSource(source, training, source.name), SubsetSource(source, validation, source.name)
