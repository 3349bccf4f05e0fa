"""The command: a source in, shards out, in steps that survive a kill."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bestrq2.data.open_source import absolute_spec, local_folder, open_recordings
from bestrq2.data.prepare.cutting import Span, Task, cut_span
from bestrq2.data.prepare.folder import REJECTED, count_finished, finished_summary, identity, shard_path
from bestrq2.data.prepare.options import Options
from bestrq2.data.prepare.packing import Packing
from bestrq2.data.prepare.summary import in_words, summary_of, write_summary
from bestrq2.data.sources import Source
from bestrq2.data.workers import WorkerPool
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import disk_errors, folder_lock
from bestrq2.progress import Progress
from bestrq2.text import counted

logger = logging.getLogger(__name__)


def prepare(
    source: str,
    output: Path,
    sampling_rate: int = 16_000,
    format: str = "wav",
    segment_seconds: float | None = 30.0,
    min_seconds: float = 0.5,
    shard_size: float = 500.0,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Decode, resample and check a source once, and pack it into WebDataset tars that are read at random fast.

    The tars are a function of the source and the options, whatever the number of processes. An interrupted run goes on
    after its last finished tar when the same command is given again, and ends with the same bytes.

    Args:
        source: folder, audio file, list (.txt, .csv, .jsonl; a column "label" is kept), local tars, HDF5 file,
            "hub:NAME", "soundworld"; anything but a stream.
        output: folder to write: shard-000000.tar and so on, each with an index beside it, rejected.csv (what was
            dropped, and why), summary.json.
        sampling_rate: Hz of the clips.
        format: of the clips, 16-bit PCM either way: "wav" (read in place, fastest) or "flac" (about half the size).
        segment_seconds: longer recordings are cut into clips of that length (s); null keeps them whole.
        min_seconds: shorter recordings are dropped, and so is what a cut leaves over (s).
        shard_size: size of a tar in MB (10^6 bytes).
        num_workers: processes that decode; as many as there are CPUs by default.

    Returns:
        The content of summary.json: counts, hours, bytes, what was dropped by kind, and the mean and deviation (dB) of
        the log-mel spectrogram per band.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    output = Path(output)
    options = Options(sampling_rate, format, segment_seconds, min_seconds, shard_size)
    count = worker_count(num_workers)
    _check_apart(source, output)
    opened = open_recordings(absolute_spec(source))
    if len(opened) == 0:
        raise DataError(f"{source} holds no recordings.")
    made_from = identity(opened, options)
    with disk_errors(output):
        make_folder(output)
        with folder_lock(output):
            summary = finished_summary(output, made_from)
            if summary is not None:
                logger.info("%s: is complete already", output)
                return summary
            with Packing(output, opened, options, made_from, count_finished(output, made_from)) as packing:
                try:
                    _pack(packing, opened, options, count)
                except KeyboardInterrupt as error:
                    error.args = (
                        f"{packing.shards} finished shards stay in {output}; run the same command again to continue",
                    )
                    raise
                return _finished(packing, opened, options)


def worker_count(num_workers: int | None) -> int:
    """Number of processes to use; that of the CPUs this process may use where None is asked for.

    Raises:
        ConfigError: less than one.
    """
    if num_workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers < 1:
        raise ConfigError(f"num_workers is {num_workers}; it must be 1 or more.")
    return num_workers


def _check_apart(source: str, output: Path) -> None:
    """Pass if the source does not take in the output.

    Raises:
        ConfigError: the output lies in the source's folder, which would hold the tars as well from then on.
    """
    folder = local_folder(source)
    if folder is not None and output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{output}: lies in the source {folder}, which would take it in; name a folder outside of it")


def make_folder(output: Path) -> None:
    """Make the folder of the output, if it is not there.

    Raises:
        ConfigError: there is a file of that name.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; name a folder")
    output.mkdir(parents=True, exist_ok=True)


def _pack(packing: Packing, source: Source, options: Options, count: int) -> None:
    """Pack what is not packed yet."""
    hour = 3600 * options.sampling_rate
    with (
        WorkerPool[Task, Span](
            partial(cut_span, source, options), count, lambda task: source.describe(task[0])
        ) as pool,
        Progress("prepare", len(source), "files", packing.position[0]) as progress,
    ):
        for span in _spans(pool, packing.position, len(source), options):
            packing.take(span)
            done = span.task.recording + (span.task.number + 1) / span.spans
            progress.show(done, packing.samples_in / hour)
        packing.finish()


def _spans(
    pool: WorkerPool[Task, Span], position: tuple[int, int], recordings: int, options: Options
) -> Iterator[Span]:
    """All spans from a position on, in the order of the source."""
    recording, segment = position
    begun = [Task(recording, segment // options.segments_per_span)] if segment else []
    others = (Task(index, 0) for index in range(recording + len(begun), recordings))
    for span in pool.in_order(itertools.chain(begun, others)):
        yield span
        following = range(span.task.number + 1, span.spans)
        rest = (Task(span.task.recording, number, span.frames, span.spans) for number in following)
        yield from pool.in_order(rest, urgent=True)


def _finished(packing: Packing, source: Source, options: Options) -> dict[str, Any]:
    """Write and return the summary.

    Raises:
        DataError: there is not one clip.
    """
    if not packing.totals.clips:
        raise DataError(
            f"{source.name}: not one of {counted(len(source), 'recording')} could be used; "
            f"see {packing.folder / REJECTED}"
        )
    size = sum(shard_path(packing.folder, number).stat().st_size for number in range(packing.shards))
    summary = summary_of(packing.totals, source, options, packing.shards, size)
    write_summary(packing.folder, summary)
    logger.info("%s: %s", packing.folder, in_words(summary))
    return summary
