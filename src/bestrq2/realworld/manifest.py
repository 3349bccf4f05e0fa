"""Manifest of realworld-1: packages, recordings with checksums, and labels with the groups that are held out.

`benchmarks/make_realworld.py` wrote the tables beside this file.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

NAME = "realworld-1"
"""The recordings, their labels and their folds never change under this name."""

CHOOSE, REPORT = "choose", "report"
_TABLES = ("packages.csv", "recordings.parquet", "tasks.parquet")


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
    """A file of a package, or a sample inside a file that holds many.

    Attributes:
        package: name of the package.
        path: path inside the package.
        begin: first byte of a sample inside the file; 0 for whole files.
        rate: sampling rate (Hz) of a sample in 16-bit PCM; 0 where the bytes are a file of their own format.
        size: bytes.
        seconds: duration.
        sha256: first 16 hexadecimal digits of the checksum of the bytes.
    """

    package: str
    path: str
    begin: int
    rate: int
    size: int
    seconds: float
    sha256: str

    @property
    def place(self) -> str:
        """Path inside the folder of the benchmark: below packages/, or below audio/ for a sample of an instrument."""
        if not self.begin:
            return f"packages/{self.package}/{self.path}"
        return f"audio/{self.package}/{Path(self.path).stem}-{self.begin}{'.wav' if self.rate else '.ogg'}"


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
def load_manifest(folder: Path = Path(__file__).parent) -> Manifest:
    """Read the manifest from its three tables."""
    import pyarrow.parquet as pq

    with (folder / "packages.csv").open(encoding="utf-8", newline="") as file:
        packages = {row["package"]: (row["version"], row["licence"]) for row in csv.DictReader(file)}
    table = pq.read_table(folder / "recordings.parquet")
    columns = [table[name].to_pylist() for name in ("package", "path", "begin", "rate", "bytes", "seconds", "sha256")]
    recordings = [Recording(*values) for values in zip(*columns, strict=True)]
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
    return Manifest(packages, recordings, tasks, checksum)
