"""Manifest of realworld-1: packages, recordings with checksums, and labels with the groups that are held out.

`benchmarks/make_realworld.py` wrote the tables beside this file, `benchmarks/make_realworld_more.py` those of the
packages for pretraining only, which are no part of the benchmark and its checksum.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

NAME = "realworld-1"
"""The recordings, their labels and their folds never change under this name."""

CHOOSE, REPORT = "choose", "report"
_TABLES = ("packages.csv", "recordings.parquet", "tasks.parquet")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class RealTask:
    """A task of the benchmark.

    Attributes:
        half: "choose" or "report", see `bestrq2.evaluate.result`.
        labels: what is recognised.
        held_out: what differs between training and test recordings.
        retrieval: find the recording with the same label in another group, instead of classifying.
    """

    half: str
    labels: str
    held_out: str
    retrieval: bool = False


TASKS: Mapping[str, RealTask] = {
    "speech/voice": RealTask(CHOOSE, "voice", "phrases"),
    "speech/phrase": RealTask(REPORT, "phrase", "voices"),
    "speech/prompt": RealTask(REPORT, "the same sentence", "speakers", retrieval=True),
    "speech/syllable": RealTask(CHOOSE, "the same Mandarin syllable", "speakers", retrieval=True),
    "speech/language": RealTask(REPORT, "language", "corpora"),
    "speech/role": RealTask(CHOOSE, "role of the speaker", "languages"),
    "music/drum": RealTask(CHOOSE, "kind of drum", "drum kits"),
    "music/chord": RealTask(REPORT, "chord of a guitar", "strokes"),
    "music/family": RealTask(REPORT, "family of instruments", "sets of instruments"),
    "music/pitch": RealTask(CHOOSE, "pitch class of a note", "sets of instruments"),
    "environment/event": RealTask(REPORT, "kind of event", "games"),
    "environment/animal": RealTask(REPORT, "bird or mammal", "collections"),
    "environment/action": RealTask(CHOOSE, "action of a unit", "factions of a game"),
}


@dataclass(frozen=True)
class Recording:
    """A file of a package, or a part of a file that holds many: a sample of an instrument, a member of an archive.

    Attributes:
        package: name of the package.
        path: path inside the package.
        begin: first byte of a part inside the file; 0 for whole files.
        rate: sampling rate (Hz) of a part in 16-bit PCM; 0 where the bytes are a file of their own format.
        size: bytes, of a compressed part after decompression.
        seconds: duration.
        sha256: first 16 hexadecimal digits of the checksum of the bytes.
        name: path of a part below audio/PACKAGE/; "" for samples of instruments, named by their file and place.
        deflated: the part is compressed, as members of ZIP archives are.
    """

    package: str
    path: str
    begin: int
    rate: int
    size: int
    seconds: float
    sha256: str
    name: str = ""
    deflated: bool = False

    @property
    def place(self) -> str:
        """Path inside the folder of the benchmark: below packages/, or below audio/ for a part of a file."""
        if not self.begin:
            return f"packages/{self.package}/{self.path}"
        name = self.name or f"{Path(self.path).stem}-{self.begin}{'.wav' if self.rate else '.ogg'}"
        return f"audio/{self.package}/{name}"


@dataclass(frozen=True)
class TaskRows:
    """Labelled recordings of a task; each is tested in one fold, by a probe fitted to the other folds.

    Attributes:
        recordings: numbers of recordings of the manifest, int64 [rows].
        labels: label of each.
        groups: group of each, such as its speaker; folds keep groups whole.
        fold: fold in which each is tested, int64 [rows].
    """

    recordings: np.ndarray
    labels: Sequence[str]
    groups: Sequence[str]
    fold: np.ndarray


@dataclass(frozen=True)
class Manifest:
    """Content of the benchmark.

    Attributes:
        packages: version and licence by name.
        recordings: all recordings; those of tasks come first.
        tasks: labelled recordings by task.
        checksum: checksum of the tables.
    """

    packages: Mapping[str, tuple[str, str]]
    recordings: Sequence[Recording]
    tasks: Mapping[str, TaskRows]
    checksum: str

    @cached_property
    def tested(self) -> frozenset[int]:
        """Numbers of the recordings that any task tests; all others are for pretraining."""
        return frozenset(number for rows in self.tasks.values() for number in rows.recordings.tolist())


@cache
def load_manifest(folder: Path = _HERE) -> Manifest:
    """Read the manifest from its three tables."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "tasks.parquet").to_pydict()
    tasks: dict[str, TaskRows] = {}
    names = np.array(rows["task"])
    for name in TASKS:
        own = np.flatnonzero(names == name)
        if len(own):
            numbers, fold = (np.asarray(rows[key], np.int64)[own] for key in ("recording", "fold"))
            labels, groups = ([rows[key][place] for place in own.tolist()] for key in ("label", "group"))
            tasks[name] = TaskRows(numbers, labels, groups, fold)
    checksum = hashlib.sha256(b"".join((folder / name).read_bytes() for name in _TABLES)).hexdigest()[:16]
    recordings = _read_recordings(folder / "recordings.parquet")
    return Manifest(_read_packages(folder / "packages.csv"), recordings, tasks, checksum)


def with_more(manifest: Manifest, folder: Path = _HERE) -> Manifest:
    """The manifest with the packages for pretraining only; numbers of recordings, tasks and checksum stay."""
    return replace(
        manifest,
        packages={**manifest.packages, **_read_packages(folder / "more_packages.csv")},
        recordings=[*manifest.recordings, *_read_recordings(folder / "more_recordings.parquet")],
    )


def _read_packages(path: Path) -> dict[str, tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["package"]: (row["version"], row["licence"]) for row in csv.DictReader(file)}


def _read_recordings(path: Path) -> list[Recording]:
    import pyarrow.parquet as pq

    # the columns are in the order of the attributes
    columns = [column.to_pylist() for column in pq.read_table(path).columns]
    return [Recording(*values) for values in zip(*columns, strict=True)]
