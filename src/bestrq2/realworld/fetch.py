"""Fetch, verify and list the recordings of the benchmark; see `bestrq2 realworld`."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import wave
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bestrq2.errors import ConfigError, DataError
from bestrq2.files import disk_errors, folder_lock, write_bytes, write_text
from bestrq2.progress import Progress
from bestrq2.realworld.folder import MARKER, place, write_marker
from bestrq2.realworld.manifest import NAME, Manifest, Recording, TaskRows
from bestrq2.text import counted

logger = logging.getLogger(__name__)

TOOLS = ("apt-get", "dpkg-deb")
_TABLES = ("unlabelled.csv", "missing.csv", "tasks")
_MISSING, _DIFFERS = "missing", "differs"


@dataclass(frozen=True)
class Fetched:
    """What is in the folder of the benchmark.

    Attributes:
        folder: the folder.
        recordings: number of verified recordings.
        unlabelled: how many of them are for pretraining, as unlabelled.csv lists them.
        hours: duration of those in hours.
        tasks: number of complete tasks.
        incomplete: number of tasks that lack recordings.
        missing: what is not as the manifest says, by package: one sentence each.
    """

    folder: Path
    recordings: int
    unlabelled: int
    hours: float
    tasks: int
    incomplete: int
    missing: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{package}: {reason}" for package, reason in self.missing.items()]
        lines += [
            f"{self.folder}: {counted(self.recordings, 'recording')} verified",
            f"{self.folder / 'unlabelled.csv'}: {counted(self.unlabelled, 'recording')} for pretraining, "
            f"{self.hours:.1f} h",
            f"{self.folder / 'tasks'}: {counted(self.tasks, 'complete task')}",
        ]
        if self.missing:
            lines.append(f"{self.folder / 'missing.csv'}: what is missing or differs")
        if self.incomplete:
            lines.append(f"{NAME} cannot be scored without the other {counted(self.incomplete, 'task')}")
        return "\n".join(lines)


def fetch(folder: Path, manifest: Manifest, packages: Path | None = None) -> Fetched:
    """Fetch and unpack packages, verify every recording, and write lists and tasks of those that agree.

    Args:
        folder: folder to write; what an earlier call fetched is kept.
        manifest: what to fetch: `load_manifest()`, or `with_more` of it.
        packages: folder with packages that are unpacked already, each in a folder of its name; None to fetch them.

    Raises:
        ConfigError: this system has no `apt-get` or `dpkg-deb`, `packages` is not a folder, or `folder`
            holds tables of something else.
        DataError: no recording is available.
    """
    folder, failures = Path(folder), {}
    if packages is not None and not Path(packages).is_dir():
        raise ConfigError(f"{packages}: is not a folder; name one with unpacked packages")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        own = (folder / MARKER).is_file()
        if foreign := [name for name in _TABLES if not own and (folder / name).exists()]:
            raise ConfigError(f"{folder}: holds {foreign[0]} of something else; name an empty or new folder")
        with folder_lock(folder):
            if packages is None:
                failures = _fetch_packages(folder / "packages", list(manifest.packages))
            unpacked = folder / "packages" if packages is None else Path(packages)
            problems = _verify(folder, unpacked, manifest)
            if len(problems) == len(manifest.recordings):
                reason = next(iter(failures.values()), f"{unpacked} has none of them")
                raise DataError(f"no recording of {NAME} is available: {reason}")
            return _write(folder, unpacked, manifest, problems, failures)


# --- packages ---


def _fetch_packages(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Download and unpack the packages that are not there yet; the reason for each that cannot be had."""
    wanted = [name for name in names if not (folder / name).is_dir()]
    if lacking := [tool for tool in TOOLS if wanted and shutil.which(tool) is None]:
        raise ConfigError(
            f"{' and '.join(lacking)} of Debian and Ubuntu cannot be found here; unpack the packages that "
            f"docs/realworld.md lists elsewhere, and name their folder by --packages"
        )
    failures = {}
    with Progress("realworld", len(names), "packages", done=len(names) - len(wanted)) as progress:
        for name in wanted:
            progress.show(details=name, now=True)
            try:
                _fetch_package(folder, name)
            except subprocess.CalledProcessError as error:
                lines = [line for line in error.stderr.splitlines() if line.startswith("E:")] or [error.stderr.strip()]
                failures[name] = f"{error.cmd[0]}: {lines[0].removeprefix('E:').strip()}"
            progress.advance()
    return failures


def _fetch_package(folder: Path, name: str) -> None:
    """Download a package and unpack it into a folder of its name, which appears whole or not at all."""
    work = folder / f".{name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        # -q=2 keeps apt's own progress away from ours
        _run(["apt-get", "-q=2", "download", name], work)
        (archive,) = work.glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], work)
        (work / "unpacked").replace(folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C.UTF-8"}
    )


def _version(package: Path) -> str:
    """Version of an unpacked package, from its changelog; "" where it has none."""
    for name in ("changelog.Debian.gz", "changelog.gz"):
        try:
            with gzip.open(package / "usr/share/doc" / package.name / name, "rt", errors="replace") as file:
                found = re.search(r"\(([^)]+)\)", file.readline())
                return found[1] if found else ""
        except OSError:
            continue
    return ""


# --- verification ---


def _verify(folder: Path, packages: Path, manifest: Manifest) -> dict[int, str]:
    """Compare every recording with the manifest, and write parts of files as files; problems by number."""
    problems: dict[int, str] = {}
    with Progress("realworld: verify", len(manifest.recordings), "recordings") as progress:
        for number, recording in enumerate(manifest.recordings):
            progress.show(number)
            try:
                content = read_recording(packages / recording.package / recording.path, recording)
            except OSError:
                problems[number] = _MISSING
                continue
            if len(content) != recording.size or not hashlib.sha256(content).hexdigest().startswith(recording.sha256):
                problems[number] = _DIFFERS
            elif recording.begin:
                _write_sample(place(folder, packages, manifest, number), recording, content)
    return problems


def read_recording(file: Path, recording: Recording) -> bytes:
    """The bytes of a recording: a file of a package, or a part of one."""
    with file.open("rb") as opened:
        if not recording.begin:
            return opened.read()
        opened.seek(recording.begin)
        if not recording.deflated:
            return opened.read(recording.size)
        try:
            # what cannot be compressed becomes longer, by less than a thousandth
            packed = opened.read(recording.size + recording.size // 1000 + 64)
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, recording.size)
        except zlib.error:
            return b""


def _write_sample(file: Path, recording: Recording, content: bytes) -> None:
    if recording.rate:
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(recording.rate)
            writer.writeframes(content)
        content = buffer.getvalue()
    if not file.is_file() or file.read_bytes() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content)


def _reasons(
    packages: Path, manifest: Manifest, problems: Mapping[int, str], failures: Mapping[str, str]
) -> dict[str, str]:
    """One sentence for each package whose recordings are not all as the manifest says."""
    by_package: dict[str, list[int]] = defaultdict(list)
    for number in problems:
        by_package[manifest.recordings[number].package].append(number)
    totals = Counter(recording.package for recording in manifest.recordings)
    reasons = {}
    for package, numbers in by_package.items():
        if package in failures or not (packages / package).is_dir():
            reasons[package] = failures.get(package, f"{packages / package} does not exist")
            continue
        version, found = manifest.packages[package][0], _version(packages / package)
        here = f"version {found} instead of {version}" if found not in ("", version) else f"version {version}"
        kinds = []
        for kind, verb in ((_DIFFERS, "differ"), (_MISSING, "missing")):
            if own := [number for number in numbers if problems[number] == kind]:
                kinds.append(f"{len(own)} {verb}, the first: {manifest.recordings[own[0]].path}")
        reasons[package] = f"{here}; of {counted(totals[package], 'recording')} {', and '.join(kinds)}"
    return reasons


# --- lists ---


def _write(
    folder: Path, packages: Path, manifest: Manifest, problems: Mapping[int, str], failures: Mapping[str, str]
) -> Fetched:
    # First, so that the same command continues after an interruption between two tables.
    write_marker(folder, packages, manifest, list(problems))
    here = {
        number: place(folder, packages, manifest, number)
        for number in range(len(manifest.recordings))
        if number not in problems
    }
    free = [number for number in here if number not in manifest.tested]
    table, rows = folder / "unlabelled.csv", [["path", "package", "seconds", "licence"]]
    for number in free:
        recording = manifest.recordings[number]
        licence = manifest.packages[recording.package][1]
        rows.append([_listed(here[number], table, folder), recording.package, f"{recording.seconds:.3f}", licence])
    _write_table(table, rows)
    complete = 0
    for name, task in manifest.tasks.items():
        complete += set(task.recordings.tolist()) <= here.keys()
        _write_task(folder / "tasks" / name, task, here, folder)
    lost = [(manifest.recordings[number], problem) for number, problem in problems.items()]
    rows = [["package", "path", "problem"], *([one.package, one.path, problem] for one, problem in lost)]
    _write_table(folder / "missing.csv", rows)
    hours = sum(manifest.recordings[number].seconds for number in free) / 3600
    reasons = _reasons(packages, manifest, problems, failures)
    incomplete = len(manifest.tasks) - complete
    return Fetched(folder, len(here), len(free), hours, complete, incomplete, reasons)


def _write_task(place: Path, task: TaskRows, here: Mapping[int, Path], root: Path) -> None:
    """One table per fold, NAME-FOLD.csv, with the columns path, label, group and split."""
    for fold in sorted(set(task.fold.tolist())):
        path = place.with_name(f"{place.name}-{fold + 1}.csv")
        rows = [["path", "label", "group", "split"]]
        splits = np.where(task.fold == fold, "test", "train").tolist()
        for number, label, group, split in zip(task.recordings.tolist(), task.labels, task.groups, splits, strict=True):
            if number in here:
                rows.append([_listed(here[number], path, root), label, group, split])
        _write_table(path, rows)


def _listed(file: Path, table: Path, root: Path) -> str:
    """Path as a table lists it: relative to the table inside the folder of the benchmark, else absolute."""
    return os.path.relpath(file, table.parent) if file.is_relative_to(root) else str(file.absolute())


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())
