"""Preparation of a corpus: workers cut clips, one writer packs them into shards, in steps that survive a kill."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from bestrq2._version import __version__
from bestrq2.data.corpus_pass import Workers, make_parts, share_parts
from bestrq2.data.open_source import absolute_spec, local_folder, open_source
from bestrq2.data.parts import ALONE, CorpusJob, Part, PartsFolder, part_of
from bestrq2.data.prepare.cutting import CLIP, SHORTER, Options, Piece, cut, pieces_table, read_pieces
from bestrq2.data.prepare.folder import (
    REJECTED,
    SHORTER_LIST,
    Ledger,
    count_finished,
    finished_summary,
    ledgers,
    rejected_key,
    remove_temporaries,
    shard_path,
)
from bestrq2.data.prepare.summary import SUMMARY, BandSums, describe_summary, statistics_entry, write_summary
from bestrq2.data.rejections import RejectionLog, reasons_in_words
from bestrq2.data.shards.writer import ShardWriter
from bestrq2.data.spans import Span, SpanReader, Stretch, names_digest, printable
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import disk_errors, folder_lock
from bestrq2.text import counted

logger = logging.getLogger(__name__)

_SEGMENTS = 1 << 32
# A shard whose ledger has this many bytes is closed, whatever the size of its tar: Parquet limits metadata.
_LEDGER_BYTES = 8_000_000


def run_prepare(source: str, output: Path, options: Options, workers: Workers) -> dict[str, Any]:
    """Decode, check and pack a source into WebDataset tars; see `bestrq2.prepare`.

    The tars are a function of the source and the options, whatever the number of processes. The same command continues
    an interrupted run after its last finished tar and ends with the same bytes.

    Raises:
        BestRQ2Error: one sentence that says what to change.
    """
    with disk_errors(output):
        _check_apart(source, output)
    make_job = partial(PrepareJob, absolute_spec(source), options)
    job = make_job()
    with disk_errors(output):
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output}: is a file; name a folder")
        output.mkdir(parents=True, exist_ok=True)
        parts = PartsFolder(output / ".parts")
        if workers.are_several or parts.finished():
            return _run_shared(job, output, parts, workers, make_job)
        with folder_lock(output):
            if (summary := _complete(output, job)) is not None:
                return summary
            finished = count_finished(output, job.made_from)
            with Packing(output, job, finished) as packing:
                _pack(packing, workers)
                return _finish(packing)


class PrepareJob(CorpusJob):
    """Pieces of every recording.

    Args:
        spec: absolute name of the source.
        options: settings of the corpus.

    Attributes:
        made_from: source with a hash of all its names, and options, ready for JSON.
    """

    def __init__(self, spec: str, options: Options) -> None:
        self.source, self.options = open_source(spec), options
        if len(self.source) == 0:
            raise DataError(f"{spec} holds no recordings.")
        self.read = SpanReader(
            self.source, options.sampling_rate, options.span_samples, partial(cut, self.source, options)
        )
        self.made_from = {
            "source": printable(self.source.name),
            "recordings": len(self.source),
            "names": names_digest(self.source, "prepare"),
            **asdict(options),
        }
        self.identity = {"made_from": json.dumps(self.made_from)}

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, recording: int) -> str:
        return self.source.describe(recording)

    def part(self, spans: list[Span]) -> Part:
        tables = []
        for span in spans:
            if span.shorter:
                first = span.number * self.options.segments_per_span
                lengths = json.dumps(span.shorter[1:])
                tables.append(pieces_table([Piece(span.recording, first, span.path, 0, SHORTER, metadata=lengths)]))
            tables.append(self._broken(span) if span.problem else span.content)
        return part_of(spans, pa.concat_tables(tables), [])

    def _broken(self, span: Span) -> pa.Table:
        first = span.number * self.options.segments_per_span
        return pieces_table([Piece(span.recording, first, span.path, 0, "broken", span.problem, is_last=span.is_last)])


class Packing:
    """Writer of a corpus; used as a context, at whose start and end unfinished files of the folder are deleted.

    Args:
        folder: folder of the output.
        job: source and options.
        finished: number of shards that exist already.

    Attributes:
        position: (recording, segment) that comes next.
        shards: number of finished shards.
        totals: counts over everything packed, without the lists.
    """

    def __init__(self, folder: Path, job: PrepareJob, finished: int) -> None:
        self.folder, self.job, self.options = folder, job, job.options
        self.shards = finished
        self.totals, self._ledger = (Ledger(job.made_from, BandSums(self.options.num_mel_bands)) for _ in range(2))
        self._writer: ShardWriter | None = None
        # First clip with each content; recording and segment in one integer: tuples take three times the memory.
        self._seen: dict[bytes, int] = {}
        for listing in (REJECTED, SHORTER_LIST):
            (folder / listing).unlink(missing_ok=True)  # its entries are in the ledgers, or come again
        self._rejections = RejectionLog(folder / REJECTED, rejected_key)
        for ledger in ledgers(folder, finished):
            for member in ledger.members:
                self._seen[member.content] = member.recording * _SEGMENTS + member.segment
            self._rejections.add(ledger.rejected)
            self._rejections.shorter.add(ledger.shorter)
            self.totals.merge(ledger)
        self.position = self.totals.position

    def __enter__(self) -> Packing:
        remove_temporaries(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
        remove_temporaries(self.folder)  # of a writer that a signal ended before it had a name

    def take(self, rows: pa.Table) -> None:
        """Pack the pieces that come next, skipping those packed before."""
        for piece in read_pieces(rows):
            # A span is read again from its start when a killed run continues within it.
            if (piece.recording, piece.segment) < self.position:
                continue
            if piece.kind == SHORTER:
                self._ledger.note_shorter(piece)
                self._rejections.shorter.add(self._ledger.shorter[-1:])
                continue
            self.position = (piece.recording + 1, 0) if piece.is_last else (piece.recording, piece.segment + 1)
            if piece.kind == CLIP:
                piece = self._duplicate(piece) or piece
            if piece.kind == CLIP:
                self._keep(piece)
            else:
                self._drop(piece)

    def _duplicate(self, clip: Piece) -> Piece | None:
        """The clip as a dropped piece, if another one has the same content."""
        place = clip.recording * _SEGMENTS + clip.segment
        # The first clip with a content is kept, whatever process decoded it: pieces arrive in order.
        first = self._seen.setdefault(clip.digest, place)
        if first == place:
            return None
        recording, segment = divmod(first, _SEGMENTS)
        own = f"from {self._start(clip.segment):g} s: " if clip.segment else ""
        where = f" from {self._start(segment):g} s on" if segment else ""
        reason = f"{own}has the same content as {printable(self.job.describe(recording))}{where}."
        return clip._replace(kind="duplicate", reason=reason)

    def _start(self, segment: int) -> float:
        return segment * (self.options.segment_samples or 0) / self.options.sampling_rate

    def _keep(self, clip: Piece) -> None:
        if self._writer is None:
            self._writer = ShardWriter(shard_path(self.folder, self.shards))
        metadata = json.loads(clip.metadata)
        self._writer.add(f"{clip.recording:08d}-{clip.segment:05d}", clip.audio, self.options.format, metadata)
        self._ledger.keep(clip, metadata)
        if self._writer.size >= self.options.shard_size * 1e6 or self._ledger.size >= _LEDGER_BYTES:
            self._close()

    def _drop(self, piece: Piece) -> None:
        self._ledger.drop(piece)
        if piece.reason:
            self._rejections.add([(piece.path, piece.reason)])
        if self._writer is not None and self._ledger.size >= _LEDGER_BYTES:
            self._close()

    def _close(self) -> None:
        """Finish the shard, with the ledger of everything since the one before."""
        self._ledger.position = self.position
        if self._writer is not None:
            self._writer.close(self._ledger.to_extra())
            self._writer = None
            self.shards += 1
        self.totals.merge(self._ledger)
        self._ledger = Ledger(self._ledger.identity, BandSums(self.options.num_mel_bands))

    @property
    def shorter(self) -> int:
        """Number of recordings that are shorter than announced."""
        return len(self._rejections.shorter)

    def finish(self) -> None:
        """Finish the last shard and the lists of recordings.

        Raises:
            OSError: the disk is full.
        """
        self._close()
        self._rejections.finish()


def _pack(packing: Packing, workers: Workers) -> None:
    """Cut and pack what is not packed yet."""
    recording, segment = packing.position
    job, span = packing.job, segment // packing.options.segments_per_span
    stretches = [Stretch((recording, span), len(job))] if recording < len(job) else []
    try:
        with closing(make_parts(job, stretches, workers, label="prepare", unit="files")) as made:
            for part in made:
                packing.take(part.rows)
        packing.finish()
    except KeyboardInterrupt as error:
        error.args = (
            f"{packing.shards} finished shards stay in {packing.folder}; run the same command again to continue",
        )
        raise


def _run_shared(
    job: PrepareJob, output: Path, parts: PartsFolder, workers: Workers, make_job: partial[PrepareJob]
) -> dict[str, Any]:
    """Cut the share of this process into a folder of parts; the process that ends last packs them into shards."""
    with parts.held(workers.process.rank):
        if (summary := _complete(output, job)) is not None:
            return summary
        count_finished(output, job.made_from)
        joined = share_parts(
            job, parts, parts.missing(job.blocks(workers.process)), workers,
            is_joined=(output / SUMMARY).exists, join=partial(_join, job, output, parts),
            label="prepare", unit="files", remake=make_job, device="cpu",
        )  # fmt: skip
    return joined or {}


def _join(job: PrepareJob, output: Path, parts: PartsFolder) -> dict[str, Any]:
    with folder_lock(output):
        finished = count_finished(output, job.made_from)
        with Packing(output, job, finished) as packing:
            for part in parts.read_all(job.blocks(ALONE)):
                packing.take(part.rows)
            packing.finish()
            summary = _finish(packing)
        parts.delete()
        return summary


def _complete(output: Path, job: PrepareJob) -> dict[str, Any] | None:
    summary = finished_summary(output, job.made_from)
    if summary is not None:
        logger.info("%s: is complete already", output)
    return summary


def _finish(packing: Packing) -> dict[str, Any]:
    """Write and return the summary.

    Raises:
        DataError: there is not one clip.
    """
    job, totals, options = packing.job, packing.totals, packing.options
    if not totals.clips:
        listing = packing.folder / REJECTED
        reasons = reasons_in_words(listing)
        raise DataError(
            f"{job.source.name}: not one of {counted(len(job), 'recording')} could be used; {reasons}; see {listing}"
        )
    hour = 3600 * options.sampling_rate
    summary = {
        "bestrq2": __version__,
        "recordings": len(job),
        "clips": totals.clips,
        "dropped": totals.dropped,
        "clipped": totals.clipped,
        "shorter_than_announced": packing.shorter,
        "hours_in": totals.samples_in / hour,
        "hours_kept": totals.samples_kept / hour,
        "shards": packing.shards,
        "bytes": sum(shard_path(packing.folder, number).stat().st_size for number in range(packing.shards)),
        "format": options.format,
        "sampling_rate": options.sampling_rate,
        "made_from": totals.identity,
        "log_mel": statistics_entry(totals.sums, options.front_end()),
    }
    write_summary(packing.folder, summary)
    logger.info("%s: %s", packing.folder, describe_summary(summary))
    return summary


def _check_apart(source: str, output: Path) -> None:
    """Check that the output is not inside the source.

    Raises:
        ConfigError: it is, so that the source would contain the tars afterwards.
    """
    folder = local_folder(source)
    if folder is not None and output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{output}: is inside the source {folder}, which would contain it; name a folder outside of it"
        )
