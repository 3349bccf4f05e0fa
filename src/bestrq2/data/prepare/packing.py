"""The one writer: takes what the workers cut, in the order of the source, and packs it into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bestrq2.data.band_sums import BandSums
from bestrq2.data.prepare.cutting import Clip, Drop, Span, printable
from bestrq2.data.prepare.folder import REJECTED, ledgers, shard_path
from bestrq2.data.prepare.ledger import Ledger, rejected_key
from bestrq2.data.prepare.options import Options
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.shards.writer import ShardWriter
from bestrq2.data.sources import Source


class _SegmentRejections(RejectionLog):
    """The list of what was dropped; a recording may be there several times, for several segments of it."""

    def _key(self, path: str, reason: str) -> str:
        return rejected_key(path, reason)


_SEGMENTS = 1 << 32
# A shard whose ledger is that long (bytes) is closed, whatever the size of its tar: Parquet cannot hold any length.
_LEDGER_BYTES = 8_000_000


def _place(recording: int, segment: int) -> int:
    """A clip's number in the source and within its recording, as one."""
    return recording * _SEGMENTS + segment


class Packing:
    """A corpus while it is packed; used as a context, at whose end a shard that is not finished is thrown away.

    Args:
        folder: of the output.
        source: what is packed.
        options: how.
        identity: of source and options.
        finished: number of shards that are there already.

    Attributes:
        position: (recording, segment) that comes next.
        shards: number of finished shards.
        totals: counts over all that was taken, without the lists.
    """

    def __init__(self, folder: Path, source: Source, options: Options, identity: dict[str, Any], finished: int) -> None:
        self.folder, self.source, self.options = folder, source, options
        self.shards = finished
        self.totals, self._ledger = (Ledger(identity, BandSums(options.num_mel_bands)) for _ in range(2))
        self._writer: ShardWriter | None = None
        # Of each content the first clip, its two numbers in one: tuples would take three times the memory.
        self._seen: dict[bytes, int] = {}
        (folder / REJECTED).unlink(missing_ok=True)  # what stood there is in the ledgers, or comes again
        self._rejections = _SegmentRejections(folder / REJECTED)
        for ledger in ledgers(folder, finished):
            for member in ledger.members:
                self._seen[member.content] = _place(member.recording, member.segment)
            self._rejections.add(ledger.rejected)
            self.totals.merge(ledger)
        self.position = self.totals.position

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()

    @property
    def samples_in(self) -> int:
        """Decoded samples so far."""
        return self.totals.samples_in + self._ledger.samples_in

    def take(self, span: Span) -> None:
        """Pack the clips of the span that comes next and list its drops; what was packed before is passed over."""
        recording, segment = self.position
        first = segment if span.task.recording == recording else 0
        for place, piece in enumerate(span.pieces):
            if piece.segment < first:
                continue
            if place == len(span.pieces) - 1 and span.task.number == span.spans - 1:
                self.position = (span.task.recording + 1, 0)
            else:
                self.position = (span.task.recording, piece.segment + 1)
            drop = piece if isinstance(piece, Drop) else self._duplicate(span.task.recording, piece)
            if drop is None:
                assert isinstance(piece, Clip)
                self._keep(span.task.recording, piece)
            else:
                self._drop(span.name, drop)

    def _duplicate(self, recording: int, clip: Clip) -> Drop | None:
        """The reason not to keep a clip that is there already; None if it is new."""
        place = _place(recording, clip.segment)
        first = self._seen.setdefault(clip.digest, place)
        if first == place:
            return None
        same = divmod(first, _SEGMENTS)
        own = f"from {self._start(clip.segment):g} s: " if clip.segment else ""
        where = f" from {self._start(same[1]):g} s on" if same[1] else ""
        reason = f"{own}has the same content as {printable(self.source.describe(same[0]))}{where}."
        return Drop(clip.segment, clip.samples, "duplicate", reason)

    def _start(self, segment: int) -> float:
        return segment * (self.options.segment_samples or 0) / self.options.sampling_rate

    def _keep(self, recording: int, clip: Clip) -> None:
        if self._writer is None:
            self._writer = ShardWriter(shard_path(self.folder, self.shards))
        self._writer.add(f"{recording:08d}-{clip.segment:05d}", clip.audio, self.options.format, clip.metadata)
        self._ledger.keep(recording, clip)
        if self._writer.size >= self.options.shard_size * 1e6 or self._ledger.size >= _LEDGER_BYTES:
            self._close()

    def _drop(self, name: str, drop: Drop) -> None:
        self._ledger.drop(name, drop)
        if drop.kind:
            self._rejections.add([(name, drop.reason)])
        if self._writer is not None and self._ledger.size >= _LEDGER_BYTES:
            self._close()

    def _close(self) -> None:
        """Finish the shard, with the ledger of all since the one before."""
        self._ledger.position = self.position
        if self._writer is not None:
            self._writer.close(self._ledger.to_extra())
            self._writer = None
            self.shards += 1
        self.totals.merge(self._ledger)
        self._ledger = Ledger(self._ledger.identity, BandSums(self.options.num_mel_bands))

    def finish(self) -> None:
        """Finish the last shard and the list of what was dropped.

        Raises:
            OSError: the disk is full.
        """
        self._close()
        self._rejections.finish()
