"""HDF5 files of clips, such as AudioSet in the layout of the BEST-RQ-2 reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.data.audio import errors_named
from bestrq2.data.decoders import Decoder
from bestrq2.data.sources import Source, Stamp
from bestrq2.data.specs import read_rows
from bestrq2.data.waveforms import HIGHEST_RATE, LOWEST_RATE, to_float32
from bestrq2.errors import AudioError, DataError
from bestrq2.files import regular_file

HDF5_SUFFIXES = frozenset({".h5", ".hdf5"})
WAVEFORM_TYPES = ("int8", "uint8", "int16", "int32", "float16", "float32", "float64")
_DATASETS = ("waveform", "audio_name", "target")
# Clips and samples per byte of a file, above which its shape is an empty claim: zeros compress to a thousandth.
_MOST_CLIPS, _MOST_SAMPLES = 1_000, 1_000_000
# Soft links on the way to a dataset.
_MOST_LINKS = 16
# Samples read at once, from a row's end backwards, to find its last sample that is not padding.
_TAIL = 1 << 14
# Names read at once: one by one, millions of them take minutes.
_BLOCK = 1 << 14


class HDF5Source(Source):
    """Clips in the rows of an HDF5 file; only the wanted part of a row is read.

    The file holds the datasets `waveform` [clips, samples] (int16 with full scale 32768, or another type of
    `WAVEFORM_TYPES`), `audio_name` [clips] and, if there are labels, `target` [clips, classes], and the attribute
    `sample_rate` (Hz) on itself or on `waveform`. Rows of short clips end in padding of zeros: a clip ends with its
    last sample that is not zero. Soft links are followed; content in other files is refused.

    Each process opens the file for itself when it reads its first clip.

    Args:
        path: the file.
        exclude: CSV file with a column `Index`: rows, counted from 0, to leave out.

    Raises:
        DataError: h5py is missing, the file is not HDF5 or truncated, a dataset or the rate is missing or unlike the
            above, or the list of excluded rows is wrong.
    """

    def __init__(self, path: str | Path, exclude: str | Path | None = None) -> None:
        self.path = Path(path)
        self.name = str(self.path.absolute())
        self._file: Any = None
        self._process = 0
        file = self._opened_file()
        datasets = self._check(file)
        clips, self.has_targets = len(datasets["waveform"]), "target" in datasets
        self.rate = self._find_rate(file)
        self.rows = np.arange(clips)
        if exclude is not None:
            self.rows = np.delete(self.rows, _excluded(Path(exclude), clips, self.path))
        if not len(self.rows):
            raise DataError(f"{path} holds no clips{'' if exclude is None else f' but those that {exclude} excludes'}.")

    def _opened_file(self) -> Any:
        # A handle made before a fork shares its state with the other process.
        if self._file is None or self._process != os.getpid():
            try:
                import h5py
            except ImportError as error:
                raise DataError(f"{self.path}: HDF5 needs h5py; pip install 'bestrq2[hdf5]'.") from error
            try:
                self._file = h5py.File(regular_file(Path(self.path)), "r")
            except OSError as error:
                raise DataError(f"{self.path} cannot be opened as HDF5 ({_cause(error)}).") from error
            self._process = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        """State without the open file."""
        return {**self.__dict__, "_file": None}

    def _check(self, file: Any) -> dict[str, Any]:
        """The datasets by name, checked."""
        datasets = {name: item for name in _DATASETS if (item := self._dataset(file, name)) is not None}
        missing = [name for name in ("waveform", "audio_name") if name not in datasets]
        if missing:
            raise DataError(
                f"{self.path} has no dataset {' or '.join(map(repr, missing))}; found "
                f"{', '.join(map(repr, sorted(file))) or 'none'}."
            )
        waveform = datasets["waveform"]
        if waveform.ndim != 2 or waveform.dtype.name not in WAVEFORM_TYPES:
            raise DataError(
                f"{self.path}: 'waveform' is {waveform.dtype.name} {list(waveform.shape)}; expected [clips, samples] "
                f"of int16 or {', '.join(name for name in WAVEFORM_TYPES if name != 'int16')}."
            )
        size = self.path.stat().st_size
        if len(waveform) > _MOST_CLIPS * size or waveform.size > _MOST_SAMPLES * size:
            raise DataError(
                f"{self.path}: 'waveform' claims {len(waveform):,} clips of {waveform.shape[1]:,} samples, which "
                f"do not fit in {size:,} bytes; make the file again."
            )
        for name, axes in (("audio_name", 1), ("target", 2)):
            if name in datasets and (datasets[name].ndim != axes or len(datasets[name]) != len(waveform)):
                raise DataError(
                    f"{self.path}: {name!r} has the shape {list(datasets[name].shape)}; expected {axes} "
                    f"{'axis' if axes == 1 else 'axes'}, the first of length {len(waveform)} as in 'waveform'."
                )
        return datasets

    def _dataset(self, file: Any, name: str) -> Any:
        """The dataset of that name; None where there is none. Soft links are followed, other files are not opened.

        Raises:
            DataError: its content is in other files, which may be any on this machine.
        """
        import h5py

        item, parts, links = file, [name.encode()], 0
        # Not by `in` or `[...]`, which open what a link leads to.
        while parts and isinstance(item, h5py.Group) and item.id.links.exists(parts[-1]):
            part = parts.pop()
            kind = item.id.links.get_info(part).type
            if kind == h5py.h5l.TYPE_HARD:
                item = item[part]
                continue
            links += 1
            if kind != h5py.h5l.TYPE_SOFT or links > _MOST_LINKS:
                where = "another file" if kind != h5py.h5l.TYPE_SOFT else "itself"
                raise DataError(f"{self.path}: {name!r} is a link to {where}; copy the data into this file.")
            target = item.id.links.get_val(part)
            item = file if target.startswith(b"/") else item
            parts += [step for step in reversed(target.split(b"/")) if step not in (b"", b".")]
        if parts or not isinstance(item, h5py.Dataset):
            return None
        if item.external or item.is_virtual:
            raise DataError(f"{self.path}: the content of {name!r} is in other files; copy it into this file.")
        return item

    def _find_rate(self, file: Any) -> int:
        for holder in (file, file["waveform"]):
            if "sample_rate" in holder.attrs:
                value = holder.attrs["sample_rate"]
                rate = float(value) if np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf" else 0.0
                if not (LOWEST_RATE <= rate <= HIGHEST_RATE and rate == int(rate)):
                    raise DataError(
                        f"{self.path}: its attribute sample_rate is {value!r}; expected a number of Hz from "
                        f"{LOWEST_RATE} to {HIGHEST_RATE}."
                    )
                return int(rate)
        raise DataError(f"{self.path} has no attribute 'sample_rate' (Hz), neither on the file nor on 'waveform'.")

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, index: int) -> str:
        """The file and the clip's name in it, or the number of its row if the name cannot be read."""
        return f"{self.path}/{self._clip_name(index)}"

    def _clip_name(self, index: int) -> str:
        row = int(self.rows[index])
        try:
            name = self._opened_file()["audio_name"][row]
        except Exception:  # damaged there; h5py raises many kinds of errors
            return f"row {row}"
        return _text(name)

    def names(self) -> Iterator[str]:
        column = self._opened_file()["audio_name"]
        for start in range(0, len(column), _BLOCK):
            first, last = np.searchsorted(self.rows, (start, start + _BLOCK))
            try:
                block = column[start : start + _BLOCK]
            except Exception:  # damaged somewhere there
                yield from map(self.describe, range(first, last))
                continue
            for row in self.rows[first:last]:
                yield f"{self.path}/{_text(block[row - start])}"

    def metadata(self, index: int) -> dict[str, Any]:
        """`name` and, where the file has labels, `target`: numbers of the classes whose value is above one half."""
        known: dict[str, Any] = {"name": self._clip_name(index)}
        if self.has_targets:
            target = np.asarray(self._opened_file()["target"][self.rows[index]])
            known["target"] = np.flatnonzero(target > 0.5).tolist()
        return known

    def opened(self, index: int) -> AbstractContextManager[Decoder]:
        return self.unconverted(index, 0)

    @contextmanager
    def unconverted(self, index: int, sampling_rate: int) -> Iterator[Decoder]:
        with errors_named(self.describe(index)):
            row = _Row(self._opened_file()["waveform"], int(self.rows[index]), self.rate)
            # int16 rows go into int16 batches as they are, which saves two conversions per clip.
            row.unconverted = sampling_rate == self.rate and row.waveform.dtype == np.int16
            yield row

    def stamp(self, index: int) -> Stamp:
        """Number of the row, and size and time of change of the file."""
        status = os.stat(self.path)
        return Stamp(f"{self.name}/row {self.rows[index]}", status.st_size, status.st_mtime_ns)


class _Row(Decoder):
    """Decoder of one row of the dataset `waveform`, up to its last sample that is not zero."""

    def __init__(self, waveform: Any, row: int, rate: int) -> None:
        self.waveform, self.row, self.rate = waveform, row, rate
        self.frames: int | None = None
        self.unconverted = False

    def measure(self) -> int:
        if self.frames is None:
            # From the end, so that only the padding and one block of sound are read.
            end = self.waveform.shape[1]
            while end:
                start = max(0, end - _TAIL)
                sounding = np.flatnonzero(self._slice(start, end))
                if len(sounding):
                    end = start + int(sounding[-1]) + 1
                    break
                end = start
            self.frames = end
        return self.frames

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Samples as of `Decoder.read`; if `unconverted` is set, they keep the type that they have in the file."""
        end = self.measure() if count is None else min(self.measure(), start + count)
        samples = self._slice(start, max(start, end))
        return samples if self.unconverted else to_float32(samples)

    def _slice(self, start: int, end: int) -> np.ndarray:
        try:
            return self.waveform[self.row, start:end]
        except OSError as error:
            raise AudioError(f"row {self.row} cannot be read ({_cause(error)}).") from error


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _cause(error: OSError) -> str:
    """Cause of an HDF5 error, without the names of its functions."""
    text = " ".join(str(error).split())
    return text.partition("(")[2].rstrip(")") or text


def _excluded(listing: Path, clips: int, path: Path) -> list[int]:
    """Read the rows to exclude from a CSV file.

    Raises:
        DataError: it cannot be read, has no column `Index`, or lists something that is not a row.
    """
    if listing.suffix.lower() not in (".csv", ".tsv"):
        raise DataError(f"{listing} is not a list of rows to exclude; expected a .csv file with a column 'Index'.")
    rows = []
    for row in read_rows(listing, [("Index",)]):
        text = row["Index"]
        if not (text.isascii() and text.isdigit() and int(text) < clips):
            raise DataError(f"{listing}: Index {text!r} is not a row of {path}; expected 0 to {clips - 1}.")
        rows.append(int(text))
    return rows
