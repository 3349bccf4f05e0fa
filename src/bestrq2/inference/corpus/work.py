"""From decoded recordings to parts of the result: short ones go through the model together, sorted by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from bestrq2.errors import AudioError
from bestrq2.inference.corpus.identity import EmbedOptions
from bestrq2.inference.corpus.reading import Recording
from bestrq2.inference.corpus.sharing import BLOCK
from bestrq2.inference.embedder import Audio, Embedder, Embeddings

# Audio in a part, of which a kill costs at most one; a longer recording is a part of its own.
PART_SECONDS = 1800.0
# Audio given to the embedder at once, counted as if all were as long as the longest: what bounds its answer.
CALL_SECONDS = 600.0


@dataclass(frozen=True)
class Part:
    """Results of neighbouring recordings.

    Attributes:
        lane: see `Stretch`.
        start: number of the first recording.
        stop: number after the last; equal to `start` for the end of a remote shard, which has no rows.
        rows: in the order of the recordings.
        rejected: (name, reason) of recordings without rows, and of a damaged shard.
        seconds: of audio.
    """

    lane: int
    start: int
    stop: int
    rows: pa.Table
    rejected: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


class PartMaker:
    """Embeds recordings part by part.

    Args:
        embedder: the encoder.
        options: what to write of each recording.

    Attributes:
        schema: columns of the rows.
    """

    def __init__(self, embedder: Embedder, options: EmbedOptions) -> None:
        self.embedder, self.options = embedder, options
        hop = embedder.config.frame_hop_samples
        self.width = self._vectors(self._embed([np.sin(0.3 * np.arange(2 * hop, dtype=np.float32))]), 0).shape[1]
        second = "time" if options.frames else "seconds"
        vector = pa.list_(pa.float32(), self.width)
        self.schema = pa.schema([("path", pa.string()), (second, pa.float64()), ("embedding", vector)])

    def parts(self, recordings: Iterable[Recording]) -> Iterator[Part]:
        """Parts of at most a block, and of half an hour of audio or one recording that is longer."""
        waiting: list[Recording] = []
        for recording in recordings:
            follows = waiting and (recording.lane, recording.number) == (waiting[-1].lane, waiting[-1].number + 1)
            if waiting and (recording.is_end or not follows):
                yield self._part(waiting)
                waiting = []
            if recording.is_end:
                rejected = [(recording.name, recording.problem)] if recording.problem else []
                yield Part(recording.lane, recording.number, recording.number, self._table([]), rejected)
                continue
            waiting.append(recording)
            enough = sum(one.seconds for one in waiting) >= PART_SECONDS
            if enough or (recording.number + 1) % BLOCK == 0:
                yield self._part(waiting)
                waiting = []
        if waiting:
            yield self._part(waiting)

    def _part(self, recordings: list[Recording]) -> Part:
        tables: dict[int, pa.Table] = {}
        reasons = {one.number: one.problem for one in recordings if one.audio is None}
        for batch in _batches([one for one in recordings if one.audio is not None]):
            for recording, result in zip(batch, self._results(batch), strict=True):
                if isinstance(result, str):
                    reasons[recording.number] = result
                else:
                    tables[recording.number] = result
        first, last = recordings[0], recordings[-1]
        return Part(
            first.lane,
            first.number,
            last.number + 1,
            self._table([tables[number] for number in sorted(tables)]),
            [(one.name, reasons[one.number]) for one in recordings if one.number in reasons],
            sum(one.seconds for one in recordings),
        )

    def _table(self, tables: list[pa.Table]) -> pa.Table:
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def _results(self, batch: list[Recording]) -> list[pa.Table | str]:
        """Rows of each recording, or the reason why there are none."""
        try:
            embeddings = self._embed([one.audio for one in batch if one.audio is not None])
            return [self._rows(one, embeddings, place) for place, one in enumerate(batch)]
        except AudioError as error:
            if len(batch) > 1:  # one spoils them all: which?
                return [result for one in batch for result in self._results([one])]
            (audio,) = (one.audio for one in batch)
            return [str(error).removeprefix(f"{audio}: ") if isinstance(audio, Path) else str(error)]
        finally:
            for one in batch:
                if isinstance(one.audio, Path):
                    one.audio.unlink(missing_ok=True)

    def _embed(self, audio: list[Audio]) -> Embeddings:
        return self.embedder.embed(audio, self.embedder.config.sampling_rate, **self.options.keywords())

    def _vectors(self, embeddings: Embeddings, place: int) -> np.ndarray:
        if not self.options.frames:
            return embeddings.clip[place : place + 1]
        return embeddings.frames[place][embeddings.frame_mask[place]]

    def _rows(self, recording: Recording, embeddings: Embeddings, place: int) -> pa.Table:
        vectors = self._vectors(embeddings, place)
        if not np.isfinite(vectors).all():
            raise AudioError("its embedding is not finite.")
        valid = embeddings.frame_mask[place]
        second = embeddings.timestamps[place][valid] if self.options.frames else np.array([recording.seconds])
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), self.width)
        return pa.Table.from_arrays(
            [pa.array([recording.name] * len(vectors)), pa.array(second), column], schema=self.schema
        )


def _batches(recordings: list[Recording]) -> Iterator[list[Recording]]:
    """Recordings of like lengths; a long one, which lies in a file, for itself."""
    batch: list[Recording] = []
    for recording in sorted(recordings, key=lambda one: (one.seconds, one.number)):
        alone = isinstance(recording.audio, Path)
        if batch and (alone or recording.seconds * (len(batch) + 1) > CALL_SECONDS):
            yield batch
            batch = []
        batch.append(recording)
    if batch:
        yield batch
