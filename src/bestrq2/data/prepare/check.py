"""Check of a prepared corpus: every clip is decoded and compared with the records made when it was written."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import soundfile

from bestrq2.data.band_sums import BandSums
from bestrq2.data.corpus_pass import choose_workers, make_parts
from bestrq2.data.parts import ALONE, CorpusJob, Part, PartsFolder, part_of
from bestrq2.data.prepare.cutting import content_digest
from bestrq2.data.prepare.folder import (
    LEDGER,
    REJECTED,
    Ledger,
    Member,
    follows,
    metadata_digest,
    rejected_key,
    shard_path,
)
from bestrq2.data.prepare.summary import SUMMARY, describe_summary, read_summary
from bestrq2.data.rejections import ListedKeys, rejection_line
from bestrq2.data.shards.building import build_index, index_path
from bestrq2.data.shards.index import ShardIndex, read_index
from bestrq2.data.spans import Span, Task
from bestrq2.errors import DataError
from bestrq2.files import disk_errors
from bestrq2.text import counted

# The same numbers are summed in the same order; a larger difference means another corpus.
_TOLERANCE_DB = 1e-3
_FINDINGS = pa.schema(
    [
        ("shard", pa.int64()),
        ("problems", pa.list_(pa.string())),
        ("clips", pa.int64()),
        ("samples", pa.int64()),
        ("size", pa.int64()),
        ("has_ledger", pa.bool_()),
    ]
)

logger = logging.getLogger(__name__)


def check_prepared(
    output: str | os.PathLike[str],
    num_workers: int | None = None,
    ray: str | None = None,
    ray_actors: int | None = None,
) -> dict[str, Any]:
    """Check that a prepared corpus is complete and undamaged: shards, indices, every clip, and the counts.

    The same command continues an interrupted check.

    Args:
        output: folder of the corpus.
        num_workers: processes that decode, 0 for a thread; None for one per CPU.
        ray: "local" or the address of a Ray cluster, whose actors decode.
        ray_actors: number of actors; None for one per CPU.

    Returns:
        Content of its summary.json.

    Raises:
        ConfigError: the folder does not hold a finished corpus.
        DataError: something is missing or damaged: the first damage, and the number of them.
    """
    output = Path(output)
    workers = choose_workers(num_workers, ray, ray_actors)
    job = CheckJob(output)
    _refuse_other_tars(output, len(job))
    remake = partial(CheckJob, output)
    settings: dict[str, Any] = {"label": "check", "unit": "shards", "remake": remake, "device": "cpu"}
    if not os.access(output, os.W_OK) and not workers.are_several:  # nothing can be kept, but all can be read
        made = make_parts(job, PartsFolder(output / ".none").missing(job.blocks(ALONE)), workers, **settings)
        with closing(made):
            return _compare(job, made)
    parts = PartsFolder(output / f".check-{job.identity['state'][:12]}")
    with disk_errors(output), parts.held(workers.process.rank):
        with closing(make_parts(job, parts.missing(job.blocks(workers.process)), workers, **settings)) as made:
            for part in made:
                parts.write(part, job.identity)
        everything = list(job.blocks(ALONE))
        joined = parts.join_once(everything, lambda: False, lambda: _compare_parts(job, parts))
    return joined or job.summary


class CheckJob(CorpusJob):
    """Findings in every shard of a prepared corpus, whose shards take the place of recordings.

    Args:
        folder: folder of the corpus.
    """

    block = 1

    def __init__(self, folder: Path) -> None:
        self.folder, self.summary = folder, read_summary(folder)
        self.read = partial(_read_shard, folder, self.summary["sampling_rate"], self.summary["format"])
        digest = hashlib.blake2b((folder / SUMMARY).read_bytes(), digest_size=16)
        for number in range(len(self)):
            for path in (shard_path(folder, number), index_path(shard_path(folder, number))):
                status = path.stat() if path.exists() else None
                digest.update(f"{status and (status.st_size, status.st_mtime_ns, status.st_ino)}".encode())
        self.identity = {"state": digest.hexdigest()}

    def __len__(self) -> int:
        return int(self.summary["shards"])

    def describe(self, recording: int) -> str:
        """Path of a shard."""
        return str(shard_path(self.folder, recording))

    def part(self, spans: list[Span]) -> Part:
        """Findings in some shards."""
        return part_of(spans, pa.concat_tables([span.content for span in spans]), [])


def _compare_parts(job: CheckJob, parts: PartsFolder) -> dict[str, Any]:
    try:
        return _compare(job, parts.read_all(job.blocks(ALONE)))
    finally:
        parts.delete()
        for stale in job.folder.glob(".check-*"):  # of checks of an earlier state that were not finished
            shutil.rmtree(stale, ignore_errors=True)


def _compare(job: CheckJob, parts: Iterable[Part]) -> dict[str, Any]:
    """Compare the findings in all shards with each other, with the summary, and with the list of rejections.

    Raises:
        DataError: something is damaged.
    """
    output, summary = job.folder, job.summary
    problems: list[str] = []
    totals, before = _Totals(output, summary), None
    for part in parts:
        for found in part.rows.to_pylist():
            problems += found["problems"]
            ledger = None
            if found["has_ledger"]:
                path = shard_path(output, found["shard"])
                ledger = Ledger.from_extra(read_index(index_path(path)).extra)
                if not follows(ledger, before) or ledger.identity != summary["made_from"]:
                    problems.append(f"{path}: is not the shard of that number")
                before = ledger
            if not problems and ledger is not None:
                totals.add(found, ledger)
    remedy = f"delete the damaged shards, all later ones and {SUMMARY}, and prepare again"
    if not problems:
        problems = totals.problems()
        remedy = f"move {SUMMARY} to another place and prepare again, which rewrites it and {REJECTED}"
    if problems:
        more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; {remedy}")
    logger.info("%s: complete and undamaged; %s", output, describe_summary(summary))
    return summary


def _refuse_other_tars(output: Path, shards: int) -> None:
    """Check that the folder holds no other tars, which pretraining would read as well."""
    others = sorted({*output.glob("*.tar")} - {shard_path(output, number) for number in range(shards)})
    if others:
        more = f" (the first of {len(others)} such files)" if len(others) > 1 else ""
        raise DataError(f"{others[0]}: is not one of the {counted(shards, 'shard')} of the summary{more}; move it away")


class _Totals:
    """Totals over all shards and their ledgers, to compare with the summary and the list of rejections."""

    def __init__(self, folder: Path, summary: dict[str, Any]) -> None:
        self.summary = summary
        self.clips = self.samples = self.size = 0
        self.ledger: Ledger | None = None
        self.rejections = _Rejections(folder / REJECTED)

    def add(self, found: dict[str, Any], ledger: Ledger) -> None:
        """Add the next shard, which has no problem."""
        self.clips += found["clips"]
        self.samples += found["samples"]
        self.size += found["size"]
        if self.ledger is None:
            self.ledger = Ledger(ledger.identity, BandSums(len(ledger.sums.total)))
        self.ledger.merge(ledger)
        self.rejections.compare(ledger.rejected)

    def problems(self) -> list[str]:
        """Differences from the summary and the list of rejections."""
        if self.ledger is None:
            return [f"the summary says {counted(self.summary['clips'], 'clip')}, and there is no shard"]
        return [*self._counts(self.ledger), *self._statistics(self.ledger), *self._list(self.ledger)]

    def _is_whole(self, ledger: Ledger) -> bool:
        """Whether the ledgers reach the end of the source; no ledger covers what is dropped after the last shard."""
        return ledger.position == (self.summary["recordings"], 0)

    def _counts(self, ledger: Ledger) -> list[str]:
        summary, hour = self.summary, 3600 * self.summary["sampling_rate"]
        exact = {
            "clips": (summary["clips"], self.clips),
            "samples": (round(summary["hours_kept"] * hour), self.samples),
            "bytes": (summary["bytes"], self.size),
            "clipped clips": (summary["clipped"], ledger.clipped),
            "recordings": (summary["recordings"], summary["made_from"].get("recordings", 0)),
        }
        at_least = {
            **{f"{kind} ones": (summary["dropped"].get(kind, 0), count) for kind, count in ledger.dropped.items()},
            "samples read": (round(summary["hours_in"] * hour), ledger.samples_in),
        }
        if self._is_whole(ledger):
            exact, at_least = exact | at_least, {}
        return [
            f"the summary says {wanted:,} {name}, the shards hold {found:,}"
            for name, (wanted, found) in (exact | at_least).items()
            if wanted < found or (wanted > found and name in exact)
        ]

    def _statistics(self, ledger: Ledger) -> list[str]:
        statistics = zip(("mean_db", "standard_deviation_db"), ledger.sums.statistics(), strict=True)
        problems = []
        for name, values in statistics:
            try:
                written = np.array(self.summary["log_mel"][name], np.float64)
            except (ValueError, TypeError):
                written = np.zeros(0)
            if written.shape != values.shape or not np.allclose(written, values.numpy(), rtol=0, atol=_TOLERANCE_DB):
                problems.append(f"the summary has another {name} of the spectrogram than the shards")
        return problems

    def _list(self, ledger: Ledger) -> list[str]:
        if self.rejections.problem is not None:
            return [self.rejections.problem]
        later = sum(self.summary["dropped"].values()) - sum(ledger.dropped.values())
        if (rest := self.rejections.rest()) > (0 if self._is_whole(ledger) else later):
            return [f"{self.rejections.path}: has {rest} entries that nothing was dropped for"]
        return []


class _Rejections:
    """`rejected.csv`, compared entry by entry with the ledgers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._keys = ListedKeys()
        self._at = 0

    def compare(self, rejected: list[tuple[str, str]]) -> None:
        """Compare the entries that come next."""
        new = [of for of in rejected if self._keys.add(rejected_key(*of))]
        if self.problem is not None or not new:
            return
        with self._rest() as file:
            for path, reason in new:
                line = rejection_line(path, reason)
                if file.read(len(line)) != line:
                    self.problem = f"{self.path}: {path} ({reason.rstrip('.')}) is not in its place in the list"
                    return
                self._at += len(line)

    def rest(self) -> int:
        """Number of entries that were not compared."""
        with self._rest() as file:
            return sum(1 for _ in file)

    def _rest(self) -> IO[bytes]:
        if not self.path.exists():
            return io.BytesIO()
        file = self.path.open("rb")
        self._at = self._at or len(file.readline())
        file.seek(self._at)
        return file


@dataclass
class _Findings:
    """Findings in one shard."""

    problems: list[str]
    clips: int = 0
    samples: int = 0
    size: int = 0
    has_ledger: bool = False


def _read_shard(folder: Path, rate: int, suffix: str, task: Task) -> Span:
    found = _check_shard(shard_path(folder, task.recording), rate, suffix)
    rows = pa.Table.from_pylist([{"shard": task.recording, **vars(found)}], schema=_FINDINGS)
    return Span(task.recording, 0, str(shard_path(folder, task.recording)), rows, found.samples / rate)


def _check_shard(tar: Path, rate: int, suffix: str) -> _Findings:
    """Check one shard, down to the samples of its clips."""
    try:
        size = tar.stat().st_size
        actual = build_index(tar)
    except OSError as error:
        return _Findings([f"{tar}: cannot be read ({error.strerror})"])
    except DataError as error:
        return _Findings([str(error).rstrip(".").partition(";")[0]])  # without its remedy: another one applies here
    if not index_path(tar).exists():
        return _Findings([f"{index_path(tar)}: is missing"])
    try:
        index = read_index(index_path(tar))
        ledger = Ledger.from_extra(index.extra)
    except DataError:
        return _Findings([f"{index_path(tar)}: is damaged"])
    except (KeyError, ValueError):
        return _Findings([f"{index_path(tar)}: lacks the ledger of bestrq2 prepare ({LEDGER})"])
    found = _Findings([], size=size, has_ledger=True)
    if actual.checksum() != index.checksum() or size != index.stamp.size:
        found.problems.append(f"{index_path(tar)}: does not fit its tar")
    if len(ledger.members) != len(actual):
        found.problems.append(f"{tar}: holds {counted(len(actual), 'clip')}, its index lists {len(ledger.members)}")
    with tar.open("rb") as file:
        for clip, written in zip(range(len(actual)), ledger.members, strict=False):
            try:
                found.samples += _check_clip(_Clip(file, actual, clip), rate, suffix, written)
                found.clips += 1
            except _Damage as damage:
                found.problems.append(f"{tar}: {actual.member(clip)} {damage}")
    return found


class _Damage(Exception):
    """Damage of a clip."""


class _Clip:
    """Bytes of one clip."""

    def __init__(self, file: Any, index: ShardIndex, clip: int) -> None:
        self.suffix = index.suffixes[index.suffix[clip]]
        self.audio = self._read(file, index.audio_offset[clip], index.audio_length[clip])
        self.json = self._read(file, index.json_offset[clip], index.json_length[clip])

    @staticmethod
    def _read(file: Any, offset: int, length: int) -> bytes:
        file.seek(offset)
        return bytes(file.read(length))


def _check_clip(clip: _Clip, rate: int, suffix: str, written: Member) -> int:
    """Check one clip against its JSON and the ledger; returns its number of samples."""
    try:
        metadata = json.loads(clip.json)
        duration, declared = float(metadata["duration"]), bytes.fromhex(metadata["content_hash"])
    except (ValueError, KeyError, TypeError):
        raise _Damage("has no readable JSON beside it") from None
    try:
        samples, found_rate = soundfile.read(io.BytesIO(clip.audio), dtype="int16")
    except (soundfile.SoundFileError, ValueError):
        raise _Damage("cannot be decoded") from None
    if clip.suffix != suffix or found_rate != rate or samples.ndim != 1:
        raise _Damage(f"is not mono {suffix} at {rate} Hz")
    if len(samples) != round(duration * rate):
        raise _Damage(f"lasts {len(samples) / rate:g} s, its JSON says {duration:g} s")
    if not (content_digest(np.asarray(samples)) == declared == written.content):
        raise _Damage("does not hold the samples that were written (content hash)")
    if metadata_digest(metadata) != written.metadata:
        raise _Damage("has other JSON beside it than was written")
    return len(samples)
