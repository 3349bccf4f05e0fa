"""Is a prepared corpus still what it was? Every clip is decoded and compared with what was written down about it."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from bestrq2.data.prepare.cutting import content_digest
from bestrq2.data.prepare.folder import follows, shard_path
from bestrq2.data.prepare.ledger import LEDGER, Ledger, Member, metadata_digest
from bestrq2.data.prepare.progress import Progress
from bestrq2.data.prepare.run import worker_count
from bestrq2.data.prepare.summary import in_words, read_summary
from bestrq2.data.prepare.workers import WorkerPool
from bestrq2.data.shards.building import build_index, index_path
from bestrq2.data.shards.index import ShardIndex, read_index
from bestrq2.errors import DataError

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
    problems: list[str] = []
    totals, before = _Found(), None
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
            totals.clips += found.clips
            totals.samples += found.samples
            totals.size += found.size
            progress.show(number + 1, totals.samples / summary["sampling_rate"] / 3600)
    further = shard_path(output, summary["shards"])
    if further.exists():
        problems.append(f"{further}: is more than the {summary['shards']} shards of the summary")
    if not problems:
        problems = _differences(summary, totals)
    if problems:
        more = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{more}; delete the damaged shards, all later ones and summary.json, and prepare again"
        )
    logger.info("%s: whole; %s", output, in_words(summary))
    return summary


def _differences(summary: dict[str, Any], totals: _Found) -> list[str]:
    kept = round(summary["hours_kept"] * 3600 * summary["sampling_rate"])
    wanted = {"clips": summary["clips"], "samples": kept, "bytes": summary["bytes"]}
    counted = {"clips": totals.clips, "samples": totals.samples, "bytes": totals.size}
    return [
        f"the summary says {value:,} {name}, the shards hold {counted[name]:,}"
        for name, value in wanted.items()
        if counted[name] != value
    ]


def _check_shard(folder: Path, rate: int, suffix: str, number: int) -> _Found:
    """Check one shard, down to the samples of its clips."""
    tar, found = shard_path(folder, number), _Found()
    try:
        found.size = tar.stat().st_size
        actual, index = build_index(tar), read_index(index_path(tar))
        ledger = Ledger.from_extra(index.extra)
    except OSError as error:
        return _Found([f"{tar}: cannot be read ({error.strerror})"])
    except DataError as error:
        return _Found([str(error).rstrip(".")])
    except (KeyError, ValueError):
        return _Found([f"{index_path(tar)}: has lost what bestrq2 prepare keeps in it ({LEDGER})"])
    found.ledger = ledger
    if actual.checksum() != index.checksum() or found.size != index.stamp.size:
        found.problems.append(f"{index_path(tar)}: does not fit its tar")
    if len(ledger.members) != len(actual):
        found.problems.append(f"{tar}: holds {len(actual)} clips, its index knows of {len(ledger.members)}")
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
