"""Embedded corpora: the recordings of a Parquet file of `bestrq2 embed`, searched, grouped and laid out.

Similarity is the cosine of two vectors after the mean of all recordings was subtracted from both: what all embeddings
share says nothing about how they differ. Unrelated recordings have similarities around 0, equal ones 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bestrq2.data.audio import open_audio, read_span
from bestrq2.data.decoders import Decoder
from bestrq2.data.labels import SEPARATOR
from bestrq2.data.open_source import open_source
from bestrq2.data.parts import read_identity
from bestrq2.data.sources import Source, common_folder, top_folder
from bestrq2.data.spans import printable
from bestrq2.data.specs import TABLE_SUFFIXES, read_rows, resolved
from bestrq2.data.waveforms import to_float32
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.files import disk_errors, write_text
from bestrq2.inference.corpus import EmbedOptions
from bestrq2.inference.embedder import Embedder, weights_hash
from bestrq2.inference.inputs import Audio
from bestrq2.progress import Progress
from bestrq2.search.index import VectorIndex
from bestrq2.search.layout import cluster, lay_out
from bestrq2.search.neighbours import mean_similarities, nearest_rows, similar_pairs, unit_length
from bestrq2.search.places import Place, best_place, window_similarities
from bestrq2.text import counted, csv_line

MOST_RECORDINGS = 1_000_000
"""Largest number of recordings that are searched without an index."""

# Audio that `search` embeds again to find places in it (s): a minute or two on a CPU.
_MOST_SECONDS = 1800.0
_BATCH_ROWS = 16_384


@dataclass(frozen=True)
class Hit:
    """A recording that is similar to a query.

    Attributes:
        row: number of the recording in the table.
        path: its name in its source, usually the absolute path of a file.
        seconds: its duration.
        similarity: cosine to the query.
        place: the stretch of it that is most like the query; None where it was not looked for.
    """

    row: int
    path: str
    seconds: float
    similarity: float
    place: Place | None = None


@dataclass(frozen=True)
class Query:
    """A sound to search for.

    Attributes:
        vector: its embedding as in the table, float32 [D].
        frame: mean of its frames, float32 [D'].
        frames: number of its frames.
    """

    vector: NDArray[np.float32]
    frame: NDArray[np.float32]
    frames: int


class EmbeddingTable:
    """Recordings of a corpus and their embeddings, as `bestrq2 embed` wrote them to a Parquet file.

    The file is checked at once, and read when its vectors are first needed; they stay in memory (192 values take 0.8 GB
    for a million recordings). A table of frames (`bestrq2 embed --frames`) has one row per recording here, too: the
    mean of its frames. `search` finds places among all its frames. Above MOST_RECORDINGS, `nearest` and `search` use an
    index by LanceDB (extra `lancedb`), which is made beside the file.

    Args:
        path: Parquet file of `bestrq2 embed`.
        labels: table (.csv, .tsv, .jsonl) with the columns path and label (or labels); by default the column `label` of
            the Parquet file, or of the list of files that was embedded, if it has one.

    Attributes:
        path: the Parquet file.
        model: name of the model that made the embeddings.
        has_frames: whether the file holds frames.

    Raises:
        DataError: it is not a Parquet file of `bestrq2 embed`, it is damaged, or a label table cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        facts = _facts(self.path)
        self._file = pq.ParquetFile(self.path)
        self.model, self.weights_sha256, self.source = facts["model"], facts["weights_sha256"], facts["source"]
        self.has_frames = facts["rows"] == "frames"
        self.options = EmbedOptions(
            self.has_frames, int(facts["phases"]), facts["layers"], facts["frequency"], facts["pooling"],
            facts["normalize"] == "True",
        )  # fmt: skip
        self._labelled = None if labels is None else Path(labels)
        self._embedder: Embedder | None = None

    @property
    def width(self) -> int:
        """Values per vector, D."""
        kind = self._file.schema_arrow.field("embedding").type
        return int(kind.list_size)

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self.paths) if self.has_frames else self._file.metadata.num_rows

    @property
    def paths(self) -> list[str]:
        """Name of every recording in its source, usually the absolute path of a file."""
        return self._recordings.paths

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Duration of every recording (s), [N]."""
        return self._recordings.seconds

    @cached_property
    def folders(self) -> list[str]:
        """For every recording the top folder that it is in, below the folder that holds all; "" for none."""
        rooted = ["/" + path.lstrip("/") for path in self.paths]
        root = common_folder(rooted)
        return [top_folder(path, root) for path in rooted]

    @cached_property
    def labels(self) -> list[str] | None:
        """Label of every recording, "" for none; None where no recording has one."""
        if self._labelled is None and "label" in self._file.schema_arrow.names:
            values = self._column("label").to_pylist()
            own = ["" if value is None else str(value) for value in values]
            found = [own[start] for start in self._recordings.starts[:-1]]
        else:
            listed = self._labelled or Path(self.source)
            if self._labelled is None and (listed.suffix.lower() not in TABLE_SUFFIXES or not listed.is_file()):
                return None
            rows = read_rows(listed, [("path",)], optional=("label", "labels"))
            by_path = {printable(str(resolved(listed.absolute(), row["path"]))): row for row in rows}
            known = {path: row["label"] or row["labels"] for path, row in by_path.items()}
            found = [known.get(path, "") for path in self.paths]
            if self._labelled is not None and not any(found):
                raise DataError(f"{listed}: labels no recording of {self.path}; it lists other paths, or no label.")
        return found if any(found) else None

    # Search

    def embed(self, embedder: Embedder, audio: Audio, sampling_rate: float | None = None) -> Query:
        """Embed a sound with the options that the table was made with.

        Args:
            embedder: the model that the table was made with.
            audio: one piece of audio, as for `Embedder.embed`.
            sampling_rate: rate of a waveform in Hz; None for the model's.

        Raises:
            ConfigError: the table was made with another model.
            AudioError: the sound cannot be used.
        """
        if self._embedder is not embedder:
            if weights_hash(embedder.model) != self.weights_sha256:
                if self.model == embedder.name:
                    made = f"other weights of {self.model} than these; embed the corpus again"
                else:
                    made = (
                        f"another model ({self.model}) than {embedder.name}; name that one, or embed the corpus again"
                    )
                raise ConfigError(f"{self.path}: was made with {made}")
            self._embedder = embedder
        found = embedder.embed(audio, sampling_rate, **self.options.keywords())
        if len(found) > 1:
            raise AudioError(f"{counted(len(found), 'sound')} were given; search for one at a time.")
        frames = found.frames[0][found.frame_mask[0]]
        frame = frames.mean(axis=0, dtype=np.float64).astype(np.float32)
        return Query(frame if self.has_frames else found.clip[0], frame, len(frames))

    def nearest(
        self, query: int | NDArray[np.floating], count: int = 10
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Recordings that are most similar to a vector, or to another recording.

        Args:
            query: vector [D] as in the table, or the row of a recording, which is left out of the result.
            count: number of recordings, at most all.

        Returns:
            Rows [count] and similarities [count], most similar first.

        Raises:
            ConfigError: the vector has another width or is not finite, there is no such row, or `count` is below 1.
        """
        if count < 1:
            raise ConfigError(f"count is {count}; it must be at least 1")
        if isinstance(query, int | np.integer):
            if not 0 <= query < len(self):
                raise ConfigError(f"{self.path}: has no row {query}; rows are numbered from 0 to {len(self) - 1}")
            own = self._directions[0][query] if self._index is None else self._index.direction(int(query))
            rows, similarities = self._nearest(own, count + 1)
            others = rows != query
            return rows[others][:count], similarities[others][:count]
        return self._nearest(self._direction(query), count)

    def search(
        self,
        embedder: Embedder,
        audio: Audio,
        sampling_rate: float | None = None,
        count: int = 10,
        places: bool = True,
    ) -> list[Hit]:
        """Recordings that are most similar to a sound, and where in them.

        In a table of clips, places are found by embedding the recordings of the result again, as many as half an hour
        of audio holds; those that cannot be read have none. In a table of frames, recordings are ranked by their
        best place among all frames of the table.

        Args:
            embedder: the model that the table was made with.
            audio: one piece of audio, as for `Embedder.embed`.
            sampling_rate: rate of a waveform in Hz; None for the model's.
            count: number of recordings, at most all.
            places: find the stretch of each recording that is most like the sound.

        Returns:
            Hits, most similar first.

        Raises:
            ConfigError: the table was made with another model, or `count` is below 1.
            AudioError: the sound cannot be used.
        """
        query = self.embed(embedder, audio, sampling_rate)
        if places and self.has_frames:
            return self._best_places(query, embedder.hop_seconds, count)
        rows, similarities = self.nearest(query.vector, count)
        found = self._places(query, embedder, rows.tolist()) if places else {}
        return [
            Hit(row, self.paths[row], float(self.seconds[row]), similarity, found.get(row))
            for row, similarity in zip(rows.tolist(), similarities.tolist(), strict=True)
        ]

    def near_duplicates(
        self, threshold: float = 0.998, most: int = 10_000
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Pairs of recordings above a similarity.

        Args:
            threshold: least similarity.
            most: largest number of pairs.

        Returns:
            Rows [pairs, 2], the smaller first, and similarities [pairs], most similar first.
        """
        return similar_pairs(self._directions[0], threshold, most)

    def outliers(self, count: int = 20, neighbours: int = 10) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Recordings that are least similar to their nearest neighbours.

        Args:
            count: number of recordings, at most all.
            neighbours: number of nearest recordings that similarities are averaged over.

        Returns:
            Rows [count] and mean similarities [count], least similar first.
        """
        similarities = mean_similarities(self._directions[0], neighbours)
        rows = np.argsort(similarities, kind="stable")[:count]
        return rows, similarities[rows]

    # Layout

    def clusters(self, count: int = 10) -> NDArray[np.int64]:
        """Cluster of every recording by k-means, [N], numbered from the largest one, 0, to the smallest.

        Args:
            count: number of clusters, at most that of recordings.
        """
        return cluster(self._directions[0], count)

    def coordinates(self) -> tuple[NDArray[np.float32], str]:
        """Places on a map, [N, 2], similar recordings close together, and the name of the method in words."""
        return lay_out(self._directions[0])

    # Audio and selections

    def read(
        self, row: int, sampling_rate: int, start: float = 0.0, seconds: float | None = None
    ) -> NDArray[np.float32]:
        """Audio of a recording, mono.

        Args:
            row: number of the recording.
            sampling_rate: wanted rate in Hz.
            start: beginning (s).
            seconds: duration; None for all that follows.

        Returns:
            float32 [samples]; shorter where the recording ends earlier.

        Raises:
            AudioError: it is missing by now, or cannot be decoded.
            DataError: the tar that holds it cannot be read any more.
        """
        with self._opened(row) as decoder:
            samples = None if seconds is None else round(seconds * sampling_rate)
            # A copy, because it may be a view into a file that is closed now.
            return to_float32(read_span(decoder, round(start * sampling_rate), samples, sampling_rate)).copy()

    def write_selection(
        self, output: str | os.PathLike[str], rows: Sequence[int], labels: str | Sequence[str] | None = None
    ) -> Path:
        """Write recordings as a table with path and label, which `bestrq2 probe` and `bestrq2 finetune` take.

        Args:
            output: CSV file.
            rows: the recordings; repeated ones are written once.
            labels: one label for all, or one for each; by default those of the table, or else the top folders.

        Raises:
            ConfigError: there are no rows, a recording has no label or is no file, or `output` cannot be written.
        """
        chosen = list(dict.fromkeys(int(row) for row in rows))
        if not chosen:
            raise ConfigError(f"{output}: there are no recordings to write; select some")
        if isinstance(labels, str):
            given = dict.fromkeys(chosen, labels)
        elif labels is not None:
            given = dict(zip(map(int, rows), labels, strict=True))
        else:
            known = self.labels or self.folders
            given = {row: known[row] for row in chosen}
        for row in chosen:
            if not given[row]:
                raise ConfigError(f"{self.paths[row]}: has no label; give one for the selection")
            if not os.path.lexists(self.paths[row]):
                raise ConfigError(f"{self.paths[row]}: is no file, or is missing by now; leave it out of the selection")
        column = "labels" if any(SEPARATOR in given[row] for row in chosen) else "label"
        lines = [csv_line(["path", column]), *(csv_line([self.paths[row], given[row]]) for row in chosen)]
        with disk_errors(Path(output)):
            write_text(Path(output), "".join(lines))
        return Path(output)

    # Reading

    def _column(self, name: str) -> pa.ChunkedArray:
        with _damage(self.path):
            return self._file.read(columns=[name]).column(0)

    @cached_property
    def _recordings(self) -> _Recordings:
        """Names and durations of the recordings, and where their rows begin."""
        if not self.has_frames:
            starts = np.arange(self._file.metadata.num_rows + 1)
            return _Recordings(self._column("path").to_pylist(), self._column("seconds").to_numpy(), starts)
        names, times = self._column("path").dictionary_encode().unify_dictionaries().combine_chunks(), self._times
        numbers = names.indices.to_numpy()
        begins = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(times) < 0)) + 1
        starts = np.concatenate([[0], begins, [len(numbers)]])
        paths = names.dictionary.take(names.indices.take(pa.array(starts[:-1]))).to_pylist()
        # The first frame is as far from the beginning as the last one from the end.
        return _Recordings(paths, times[starts[1:] - 1] + times[starts[:-1]], starts)

    @cached_property
    def _times(self) -> NDArray[np.float64]:
        """Centre of every frame (s)."""
        return self._column("time").to_numpy()

    def _vectors(self) -> Iterator[NDArray[np.float32]]:
        """Rows of the file in order, [rows, D] at a time."""
        width, done = self.width, 0
        with _damage(self.path):
            for batch in self._file.iter_batches(_BATCH_ROWS, columns=["embedding"]):
                values = batch.column(0).flatten()
                if len(values) != len(batch) * width or values.null_count:
                    raise DataError(f"{self.path}: row {done} or one of the next has no embedding of {width} values.")
                vectors = values.to_numpy().astype(np.float32).reshape(len(batch), width)
                if not np.isfinite(vectors).all():
                    row = done + int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
                    raise DataError(f"{self.path}: the embedding in row {row} holds NaN or infinite values.")
                yield vectors
                done += len(batch)

    @cached_property
    def _index(self) -> VectorIndex | None:
        """Index of a table that has more recordings than are compared one by one."""
        if self.has_frames or len(self) <= MOST_RECORDINGS:
            return None
        return VectorIndex(self.path, len(self), self.width, self._vectors)

    def _nearest(self, direction: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if self._index is not None:
            return self._index.nearest(direction, count)
        return nearest_rows(self._directions[0], direction, count)

    @property
    def _mean(self) -> NDArray[np.float32]:
        """Mean of the recordings, [D]."""
        return self._directions[1] if self._index is None else self._index.mean

    @cached_property
    def _directions(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Recordings relative to their mean, scaled to length 1 [N, D], and the mean [D]."""
        if len(self) > MOST_RECORDINGS:
            raise ConfigError(
                f"{self.path}: holds {len(self):,} recordings; pairs, outliers, clusters and maps take up to "
                f"{MOST_RECORDINGS:,}, so embed a part of the corpus for them"
            )
        units, starts = np.zeros((len(self), self.width), np.float32), self._recordings.starts
        done = 0
        for vectors in self._vectors():
            if self.has_frames:
                inside = starts[np.searchsorted(starts, done) : np.searchsorted(starts, done + len(vectors))] - done
                inside = inside if len(inside) and inside[0] == 0 else np.concatenate([[0], inside])
                first = int(np.searchsorted(starts, done, side="right")) - 1
                units[first : first + len(inside)] += np.add.reduceat(vectors, inside)
            else:
                units[done : done + len(vectors)] = vectors
            done += len(vectors)
        units /= np.diff(starts)[:, None].astype(np.float32)
        # The mean of one recording is that recording, and would leave nothing.
        mean = units.mean(axis=0, dtype=np.float64).astype(np.float32) * np.float32(len(units) > 1)
        units -= mean
        unit_length(units)
        return units, mean

    def _direction(self, vector: NDArray[np.floating]) -> NDArray[np.float32]:
        """A vector relative to the mean of the recordings, scaled to length 1."""
        values = np.asarray(vector, np.float32)
        if values.shape != (self.width,) or not np.isfinite(values).all():
            raise ConfigError(f"a query of {self.path} must be a vector of {self.width} finite values")
        return _units(values[None], self._mean)[0]

    # Places

    def _best_places(self, query: Query, hop: float, count: int) -> list[Hit]:
        """Recordings of a table of frames by their best places."""
        direction, mean, starts = self._direction(query.vector), self._mean, self._recordings.starts
        places: list[Place] = []
        for rows, frames in self._whole_recordings():
            own = starts[rows.start : rows.stop + 1]
            similarities = window_similarities(frames - mean, own - own[0], query.frames, direction)
            for start, stop in pairwise(own):
                found = similarities[start - own[0] : stop - own[0]]
                places.append(best_place(found, self._times[start:stop], hop, query.frames))
        best = np.array([place.similarity for place in places])
        return [
            Hit(row, self.paths[row], float(self.seconds[row]), places[row].similarity, places[row])
            for row in np.argsort(-best, kind="stable")[:count].tolist()
        ]

    def _whole_recordings(self) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """Rows of recordings and all their frames, some recordings at a time."""
        starts = self._recordings.starts
        first = done = 0
        held: list[NDArray[np.float32]] = []
        for frames in self._vectors():
            held.append(frames)
            done += len(frames)
            last = int(np.searchsorted(starts, done, side="right")) - 1
            if last > first:
                joined = np.concatenate(held)
                complete = int(starts[last] - starts[first])
                yield range(first, last), joined[:complete]
                held, first = [joined[complete:]], last

    def _places(self, query: Query, embedder: Embedder, rows: list[int]) -> dict[int, Place]:
        """Best places in some recordings, by row, which are embedded again."""
        rate, hop = embedder.config.sampling_rate, embedder.hop_seconds
        heard: dict[int, NDArray[np.float32]] = {}
        left = _MOST_SECONDS
        for row in rows:
            left -= float(self.seconds[row])
            if left >= 0:
                with suppress(AudioError, DataError):  # deleted by now: a hit without a place
                    heard[row] = self.read(row, rate)
        if not heard:
            return {}
        with Progress("search", unit="", leave=False, details=f"{counted(len(heard), 'recording')} for places"):
            found = embedder.embed(list(heard.values()), rate, **self.options.keywords())
        everything = [own[inside] for own, inside in zip(found.frames, found.frame_mask, strict=True)]
        # Means of frames are clips only where clips are means.
        mean = self._mean if self.options.pooling == "mean" else np.concatenate(everything).mean(axis=0)
        (direction,) = _units(query.frame[None], mean)
        places = {}
        for row, frames, times in zip(heard, everything, found.timestamps, strict=True):
            whole = np.array([0, len(frames)])
            similarities = window_similarities(frames - mean, whole, query.frames, direction)
            places[row] = best_place(similarities, times, hop, query.frames)
        return places

    # Audio

    def _opened(self, row: int) -> AbstractContextManager[Decoder]:
        path = self.paths[row]
        if os.path.isabs(path) and os.path.lexists(path):
            return open_audio(path)
        try:
            source, numbers = self._members
        except (ConfigError, DataError) as error:
            raise AudioError(f"{path}: is missing by now, and {self.source} cannot be opened.") from error
        if path not in numbers:
            raise AudioError(f"{path}: is missing by now.")
        return source.opened(numbers[path])

    @cached_property
    def _members(self) -> tuple[Source, dict[str, int]]:
        """The source of the recordings, for those that are no files, and their numbers in it."""
        source = open_source(self.source)
        return source, {printable(name): number for number, name in enumerate(source.names())}


class _Recordings(NamedTuple):
    """Names [N], durations (s) [N], and first rows of the recordings with the number of all rows, [N + 1]."""

    paths: list[str]
    seconds: NDArray[np.float64]
    starts: NDArray[np.int64]


def _units(vectors: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [N, D] relative to a mean, scaled to length 1."""
    units = vectors - mean
    unit_length(units)
    return units


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is damaged ({error}); embed the corpus again.") from error


def _facts(path: Path) -> dict[str, str]:
    """What the metadata of a table says about its making."""
    again = "write it by `bestrq2 embed MODEL SOURCE --output FILE.parquet`"
    if not path.is_file():
        raise DataError(f"{path}: is not there; {again}.")
    facts = read_identity(path)
    if facts is None:
        raise DataError(f"{path}: is not a Parquet file; {again}.")
    wanted = ("model", "weights_sha256", "source", "rows", "phases", "layers", "frequency", "pooling", "normalize")
    missing = [name for name in wanted if name not in facts]
    if missing or facts["rows"] not in ("clips", "frames"):
        raise DataError(f"{path}: its metadata do not say what its embeddings were made with; {again}.")
    return facts
