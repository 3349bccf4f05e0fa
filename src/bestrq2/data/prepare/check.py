"""Is a prepared corpus still what it was? Every clip is decoded and compared with what was written down about it."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from bestrq2.data.band_sums import BandSums
from bestrq2.data.prepare.cutting import content_digest
from bestrq2.data.prepare.folder import REJECTED, follows, shard_path
from bestrq2.data.prepare.ledger import LEDGER, Ledger, Member, metadata_digest, rejected_key
from bestrq2.data.prepare.run import worker_count
from bestrq2.data.prepare.summary import SUMMARY, in_words, read_summary
from bestrq2.data.rejections import ListedKeys, rejection_line
from bestrq2.data.shards.building import build_index, index_path
from bestrq2.data.shards.index import ShardIndex, read_index
from bestrq2.data.workers import WorkerPool
from bestrq2.errors import DataError
from bestrq2.progress import Progress
from bestrq2.text import counted

# Sums of the same numbers in the same order; more would be another corpus.
_TOLERANCE_DB = 1e-3

logger = logging.getLogger(__name__)


@dataclass
class _Found:
    """What the check of one shard found."""

    problems: list[str] = field(default_factory=list)
    clips: int = 0
    samples: int = 0
    size: int = 0
    ledger: Ledger | None = None


def check_prepared(output: Path, num_workers: int | None = None) -> dict[str, Any]:
    """Check that a prepared corpus is complete and undamaged: shards, indices, every clip, and the counts.

    Args:
        output: its folder.
        num_workers: processes that decode; as many as there are CPUs by default.

    Returns:
        The content of its summary.json.

    Raises:
        ConfigError: the folder holds no finished corpus.
        DataError: something is missing or damaged: the first damage, and how many there are.
    """
    output = Path(output)
    summary = read_summary(output)
    _check_for_strangers(output, summary["shards"])
    problems: list[str] = []
    totals, before = _Totals(output, summary), None
    work = partial(_check_shard, output, summary["sampling_rate"], summary["format"])
    with (
        WorkerPool[int, _Found](
            work, worker_count(num_workers), lambda number: str(shard_path(output, number))
        ) as pool,
        Progress("check", summary["shards"], "shards") as progress,
    ):
        for number, found in enumerate(pool.in_order(range(summary["shards"]))):
            problems += found.problems
            if found.ledger is not None:
                if not follows(found.ledger, before) or found.ledger.identity != summary["made_from"]:
                    problems.append(f"{shard_path(output, number)}: is not the shard of that number")
                before = found.ledger
            if not problems:
                totals.add(found)
            progress.show(number + 1, totals.samples / summary["sampling_rate"] / 3600)
    remedy = f"delete the damaged shards, all later ones and {SUMMARY}, and prepare again"
    if not problems:
        problems = totals.problems()
        remedy = f"move {SUMMARY} to another place and prepare again, which makes it and {REJECTED} anew"
    if problems:
        more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; {remedy}")
    logger.info("%s: whole; %s", output, in_words(summary))
    return summary


def _check_for_strangers(output: Path, shards: int) -> None:
    """Pass if the folder holds no other tars, which pretraining would read as well."""
    strangers = sorted({*output.glob("*.tar")} - {shard_path(output, number) for number in range(shards)})
    if strangers:
        more = f" (the first of {len(strangers)} such files)" if len(strangers) > 1 else ""
        raise DataError(f"{strangers[0]}: is none of the {counted(shards, 'shard')} of the summary{more}; move it away")


class _Totals:
    """What all shards hold, and what their ledgers say, against the summary and the list of rejections."""

    def __init__(self, folder: Path, summary: dict[str, Any]) -> None:
        self.summary = summary
        self.clips = self.samples = self.size = 0
        self.ledger: Ledger | None = None
        self.rejections = _Rejections(folder / REJECTED)

    def add(self, found: _Found) -> None:
        """Take in the next shard, which has no problem."""
        self.clips += found.clips
        self.samples += found.samples
        self.size += found.size
        if found.ledger is not None:
            if self.ledger is None:
                self.ledger = Ledger(found.ledger.identity, BandSums(len(found.ledger.sums.total)))
            self.ledger.merge(found.ledger)
            self.rejections.compare(found.ledger.rejected)

    def problems(self) -> list[str]:
        """Where the summary or the list of rejections say something else."""
        if self.ledger is None:
            return [f"the summary says {counted(self.summary['clips'], 'clip')}, and there is no shard"]
        return [*self._differences(self.ledger), *self._other_statistics(self.ledger), *self._other_list(self.ledger)]

    def _ends(self, ledger: Ledger) -> bool:
        """Whether the ledgers reach to the end of the source; what is dropped after the last shard is in none."""
        return ledger.position == (self.summary["recordings"], 0)

    def _differences(self, ledger: Ledger) -> list[str]:
        summary, hour = self.summary, 3600 * self.summary["sampling_rate"]
        exact = {
            "clips": (summary["clips"], self.clips),
            "samples": (round(summary["hours_kept"] * hour), self.samples),
            "bytes": (summary["bytes"], self.size),
            "clipped clips": (summary["clipped"], ledger.clipped),
            "recordings": (summary["recordings"], summary["made_from"].get("recordings", 0)),
        }
        reaching = {
            **{f"{kind} ones": (summary["dropped"].get(kind, 0), count) for kind, count in ledger.dropped.items()},
            "samples read": (round(summary["hours_in"] * hour), ledger.samples_in),
        }
        if self._ends(ledger):
            exact, reaching = exact | reaching, {}
        return [
            f"the summary says {wanted:,} {name}, the shards hold {found:,}"
            for name, (wanted, found) in (exact | reaching).items()
            if wanted < found or (wanted > found and name in exact)
        ]

    def _other_statistics(self, ledger: Ledger) -> list[str]:
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

    def _other_list(self, ledger: Ledger) -> list[str]:
        if self.rejections.problem is None:
            later = sum(self.summary["dropped"].values()) - sum(ledger.dropped.values())
            if (rest := self.rejections.rest()) > (0 if self._ends(ledger) else later):
                return [f"{self.rejections.path}: has {rest} entries that nothing was dropped for"]
        return [self.rejections.problem] if self.rejections.problem else []


class _Rejections:
    """`rejected.csv`, read along with the ledgers."""

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
            for name, reason in new:
                line = rejection_line(name, reason)
                if file.read(len(line)) != line:
                    self.problem = f"{self.path}: {name} ({reason.rstrip('.')}) is not in its place there"
                    return
                self._at += len(line)

    def rest(self) -> int:
        """Entries that were not compared."""
        with self._rest() as file:
            return sum(1 for _ in file)

    def _rest(self) -> IO[bytes]:
        if not self.path.exists():
            return io.BytesIO()
        file = self.path.open("rb")
        self._at = self._at or len(file.readline())
        file.seek(self._at)
        return file


def _check_shard(folder: Path, rate: int, suffix: str, number: int) -> _Found:
    """Check one shard, down to the samples of its clips."""
    tar, found = shard_path(folder, number), _Found()
    try:
        found.size = tar.stat().st_size
        actual = build_index(tar)
    except OSError as error:
        return _Found([f"{tar}: cannot be read ({error.strerror})"])
    except DataError as error:
        return _Found([str(error).rstrip(".").partition(";")[0]])  # without its remedy: there is a better one here
    if not index_path(tar).exists():
        return _Found([f"{index_path(tar)}: is missing"])
    try:
        index = read_index(index_path(tar))
        ledger = Ledger.from_extra(index.extra)
    except DataError:
        return _Found([f"{index_path(tar)}: is damaged"])
    except (KeyError, ValueError):
        return _Found([f"{index_path(tar)}: has lost what bestrq2 prepare keeps in it ({LEDGER})"])
    found.ledger = ledger
    if actual.checksum() != index.checksum() or found.size != index.stamp.size:
        found.problems.append(f"{index_path(tar)}: does not fit its tar")
    if len(ledger.members) != len(actual):
        found.problems.append(f"{tar}: holds {counted(len(actual), 'clip')}, its index knows of {len(ledger.members)}")
    with tar.open("rb") as file:
        for clip, written in zip(range(len(actual)), ledger.members, strict=False):
            member = actual.member(clip)
            try:
                found.samples += _check_clip(_Clip(file, actual, clip), rate, suffix, written)
                found.clips += 1
            except _Damage as damage:
                found.problems.append(f"{tar}: {member} {damage}")
    return found


class _Damage(Exception):
    """What is wrong with a clip."""


class _Clip:
    """The bytes of one clip."""

    def __init__(self, file: Any, index: ShardIndex, clip: int) -> None:
        self.suffix = index.suffixes[index.suffix[clip]]
        self.audio = self._read(file, index.audio_offset[clip], index.audio_length[clip])
        self.json = self._read(file, index.json_offset[clip], index.json_length[clip])

    @staticmethod
    def _read(file: Any, offset: int, length: int) -> bytes:
        file.seek(offset)
        return bytes(file.read(length))


def _check_clip(clip: _Clip, rate: int, suffix: str, written: Member) -> int:
    """Check one clip against its JSON and against the ledger; returns its samples."""
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
        raise _Damage(f"is no mono {suffix} at {rate} Hz")
    if len(samples) != round(duration * rate):
        raise _Damage(f"lasts {len(samples) / rate:g} s, its JSON says {duration:g} s")
    if not (content_digest(np.asarray(samples)) == declared == written.content):
        raise _Damage("does not hold the samples that were written (content hash)")
    if metadata_digest(metadata) != written.metadata:
        raise _Damage("has other JSON beside it than was written")
    return len(samples)
