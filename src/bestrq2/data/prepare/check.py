"""Check of a prepared corpus: every clip is decoded and compared with the records made when it was written."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import soundfile

from bestrq2.data.corpus_pass import choose_workers, make_parts, share_parts
from bestrq2.data.parts import ALONE, CorpusJob, Part, PartsFolder, part_of
from bestrq2.data.prepare.cutting import content_digest
from bestrq2.data.prepare.folder import (
    LEDGER,
    REJECTED,
    Ledger,
    Member,
    follows,
    ledgers,
    metadata_digest,
    rejected_key,
    shard_path,
)
from bestrq2.data.prepare.summary import SUMMARY, describe_summary, read_summary
from bestrq2.data.rejections import ListedKeys, list_line
from bestrq2.data.shards.index import ShardIndex, build_index, index_path, read_index
from bestrq2.data.spans import Span, Task
from bestrq2.errors import DataError
from bestrq2.files import disk_errors
from bestrq2.text import counted

# The same numbers are summed in the same order; a larger difference means another corpus.
_TOLERANCE_DB = 1e-3

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
        stretches = parts.missing(job.blocks(workers.process))
        join = partial(_compare_parts, job, parts)
        joined = share_parts(job, parts, stretches, workers, is_joined=lambda: False, join=join, **settings)
    return joined or job.summary


class CheckJob(CorpusJob):
    """Problems of every shard of a prepared corpus, whose shards take the place of recordings.

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
        return str(shard_path(self.folder, recording))

    def part(self, spans: list[Span]) -> Part:
        return part_of(spans, pa.concat_tables([span.content for span in spans]), [])


def _compare_parts(job: CheckJob, parts: PartsFolder) -> dict[str, Any]:
    try:
        return _compare(job, parts.read_all(job.blocks(ALONE)))
    finally:
        parts.delete()
        for stale in job.folder.glob(".check-*"):  # of checks of an earlier state that were not finished
            shutil.rmtree(stale, ignore_errors=True)


def _compare(job: CheckJob, parts: Iterable[Part]) -> dict[str, Any]:
    """Compare all shards with each other, with the summary, and with the list of rejections.

    Raises:
        DataError: something is damaged.
    """
    output, summary = job.folder, job.summary
    remedy = f"delete the damaged shards, all later ones and {SUMMARY}, and prepare again"
    problems = [problem for part in parts for problem in part.rows["problem"].to_pylist()]
    problems = problems or _misplaced(output, summary)
    if not problems:
        problems = _differences(output, summary)
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


def _misplaced(output: Path, summary: dict[str, Any]) -> list[str]:
    """Shards of another corpus, or out of order."""
    problems, before = [], None
    for number, ledger in enumerate(ledgers(output, summary["shards"])):
        if not follows(ledger, before) or ledger.identity != summary["made_from"]:
            problems.append(f"{shard_path(output, number)}: is not the shard of that number")
        before = ledger
    return problems


def _differences(output: Path, summary: dict[str, Any]) -> list[str]:
    """Differences of the ledgers, whose clips are undamaged, from the summary and the list of rejections."""
    total: Ledger | None = None
    listing, listed, unlisted, shorter = output / REJECTED, ListedKeys(), "", ListedKeys()
    lines = _lines(listing)
    for ledger in ledgers(output, summary["shards"]):
        for path, reason in ledger.rejected:
            if listed.add(rejected_key(path, reason)) and not unlisted and next(lines, b"") != list_line(path, reason):
                unlisted = f"{listing}: {path} ({reason.rstrip('.')}) is not in its place in the list"
        for one in ledger.shorter:
            shorter.add(one.path)
        if total is None:
            total = ledger
        else:
            total.merge(ledger)
    if total is None:
        return [f"the summary says {counted(summary['clips'], 'clip')}, and there is no shard"]
    # What is dropped after the last clip of the source is in no ledger.
    is_whole = total.position == (summary["recordings"], 0)
    problems = [*_different_counts(output, summary, total, is_whole), *_different_statistics(summary, total)]
    noted = summary.get("shorter_than_announced", 0)
    if noted < len(shorter) or (is_whole and noted > len(shorter)):
        problems.append(
            f"the summary says {noted:,} recordings shorter than announced, the shards list {len(shorter):,}"
        )
    if unlisted:
        return [*problems, unlisted]
    later = 0 if is_whole else sum(summary["dropped"].values()) - sum(total.dropped.values())
    if (rest := sum(1 for _ in lines)) > later:
        problems.append(f"{listing}: has {rest} entries that nothing was dropped for")
    return problems


def _lines(listing: Path) -> Iterator[bytes]:
    """Lines of the list of rejections after its header."""
    if listing.exists():
        with listing.open("rb") as file:
            next(file, None)
            yield from file


def _different_counts(output: Path, summary: dict[str, Any], total: Ledger, is_whole: bool) -> list[str]:
    hour = 3600 * summary["sampling_rate"]
    size = sum(shard_path(output, number).stat().st_size for number in range(summary["shards"]))
    exact = {
        "clips": (summary["clips"], total.clips),
        "samples": (round(summary["hours_kept"] * hour), total.samples_kept),
        "bytes": (summary["bytes"], size),
        "clipped clips": (summary["clipped"], total.clipped),
        "recordings": (summary["recordings"], summary["made_from"].get("recordings", 0)),
    }
    at_least = {
        **{f"{kind} ones": (summary["dropped"].get(kind, 0), count) for kind, count in total.dropped.items()},
        "samples read": (round(summary["hours_in"] * hour), total.samples_in),
    }
    return [
        f"the summary says {wanted:,} {name}, the shards hold {found:,}"
        for name, (wanted, found) in (exact | at_least).items()
        if wanted < found or (wanted > found and (is_whole or name in exact))
    ]


def _different_statistics(summary: dict[str, Any], total: Ledger) -> list[str]:
    problems = []
    for name, values in zip(("mean_db", "standard_deviation_db"), total.sums.statistics(), strict=True):
        try:
            written = np.array(summary["log_mel"][name], np.float64)
        except (ValueError, TypeError):
            written = np.zeros(0)
        if written.shape != values.shape or not np.allclose(written, values.numpy(), rtol=0, atol=_TOLERANCE_DB):
            problems.append(f"the summary has another {name} of the spectrogram than the shards")
    return problems


def _read_shard(folder: Path, rate: int, suffix: str, task: Task) -> Span:
    """Problems of one shard as the content of a span, and the duration of its clips."""
    tar = shard_path(folder, task.recording)
    problems, samples = _check_shard(tar, rate, suffix)
    rows = pa.table({"problem": pa.array(problems, pa.string())})
    return Span(task.recording, 0, str(tar), rows, samples / rate)


def _check_shard(tar: Path, rate: int, suffix: str) -> tuple[list[str], int]:
    """Problems of one shard, found down to the samples of its clips, and the number of undamaged samples."""
    try:
        size = tar.stat().st_size
        actual = build_index(tar)
    except OSError as error:
        return [f"{tar}: cannot be read ({error.strerror})"], 0
    except DataError as error:
        return [str(error).rstrip(".").partition(";")[0]], 0  # without its remedy: another one applies here
    if not index_path(tar).exists():
        return [f"{index_path(tar)}: is missing"], 0
    try:
        index = read_index(index_path(tar))
        ledger = Ledger.from_extra(index.extra)
    except DataError:
        return [f"{index_path(tar)}: is damaged"], 0
    except (KeyError, ValueError, TypeError):
        return [f"{index_path(tar)}: lacks the ledger of bestrq2 prepare ({LEDGER})"], 0
    problems, samples = [], 0
    if actual.checksum() != index.checksum() or size != index.stamp.size:
        problems.append(f"{index_path(tar)}: does not fit its tar")
    if len(ledger.members) != len(actual):
        problems.append(f"{tar}: holds {counted(len(actual), 'clip')}, its index lists {len(ledger.members)}")
    with tar.open("rb") as file:
        for clip, written in zip(range(len(actual)), ledger.members, strict=False):
            try:
                samples += _check_clip(file, actual, clip, rate, suffix, written)
            except DataError as damage:
                problems.append(f"{tar}: {actual.member(clip)} {damage}")
    return problems, samples


def _check_clip(file: BinaryIO, index: ShardIndex, clip: int, rate: int, suffix: str, written: Member) -> int:
    """Check one clip against its JSON and the ledger.

    Returns:
        Its number of samples.

    Raises:
        DataError: it is damaged; the message continues the name of the clip.
    """
    file.seek(index.audio_offset[clip])
    audio = file.read(index.audio_length[clip])
    file.seek(index.json_offset[clip])
    try:
        metadata = json.loads(file.read(index.json_length[clip]))
        duration, declared = float(metadata["duration"]), bytes.fromhex(metadata["content_hash"])
    except (ValueError, KeyError, TypeError):
        raise DataError("has no readable JSON beside it") from None
    try:
        samples, found_rate = soundfile.read(io.BytesIO(audio), dtype="int16")
    except (soundfile.SoundFileError, ValueError):
        raise DataError("cannot be decoded") from None
    if index.suffixes[index.suffix[clip]] != suffix or found_rate != rate or samples.ndim != 1:
        raise DataError(f"is not mono {suffix} at {rate} Hz")
    if len(samples) != round(duration * rate):
        raise DataError(f"lasts {len(samples) / rate:g} s, its JSON says {duration:g} s")
    if not (content_digest(samples) == declared == written.content):
        raise DataError("does not hold the samples that were written (content hash)")
    if metadata_digest(metadata) != written.metadata:
        raise DataError("has other JSON beside it than was written")
    return len(samples)
