"""Embedding and prediction of a whole corpus: any source in, one Parquet or CSV file out, resumable and distributed.

Both are the same pass (`bestrq2.data.corpus_pass`) with another head on the encoder: `EmbedJob` writes vectors,
`PredictJob` class probabilities.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from bestrq2._version import __version__
from bestrq2.data.corpus_pass import Workers, share_parts
from bestrq2.data.open_source import open_source
from bestrq2.data.parts import ALONE, CorpusJob, Part, PartsFolder, Process, part_of, read_identity
from bestrq2.data.rejections import REJECTED_HEADER, SHORTER_HEADER, Shorter, list_line, reasons_in_words
from bestrq2.data.sources import Source
from bestrq2.data.spans import Span, names_digest, printable, sample_reader, span_samples
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.files import disk_errors, whole_file, write_text
from bestrq2.inference.classifier import label_of, load_classifier
from bestrq2.inference.embedder import Embeddings, load, weights_hash
from bestrq2.inference.inputs import SampleStream
from bestrq2.model.readout import Layers
from bestrq2.text import counted, csv_line

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".csv")
# More processes than this decode faster than any model embeds.
MOST_WORKERS = 16
# Audio embedded in one call (s), counted as if all recordings were as long as the longest: bounds its memory.
_CALL_SECONDS = 600.0
# Values in a row group of a Parquet file, which a reader holds at a time.
_GROUP_BYTES = 32_000_000


@dataclass(frozen=True)
class EmbedOptions:
    """Choice of vectors to write for each recording.

    Attributes:
        frames: one row per frame, instead of one per recording.
        phases, layers, frequency, pooling, normalize: as in `Embedder.embed`.
    """

    frames: bool = False
    phases: int = 1
    layers: Layers | None = None
    frequency: str | None = None
    pooling: str | None = None
    normalize: bool = False

    def keywords(self) -> dict[str, Any]:
        """Options of `Embedder.embed`, by name."""
        return {name: value for name, value in vars(self).items() if name != "frames"}


class _Recording:
    """A recording as audio for a model; `seconds` is its duration once it was read."""

    def __init__(self, span: Span, following: Iterator[Span] = iter(()), rate: int = 1) -> None:  # noqa: B008
        self.path, self.number = span.path, span.recording
        self.seconds, self._span, self._following, self._rate = span.seconds, span, following, rate

    def blocks(self) -> Iterator[np.ndarray]:
        """float32 [samples] blocks at the model's rate; a recording of one span may be read again."""
        if self._span.is_last:
            yield from span_samples([self._span])
            return
        self.seconds = 0.0
        for block in span_samples(chain([self._span], self.rest())):
            self.seconds += len(block) / self._rate
            yield block

    @property
    def shorter(self) -> Shorter | None:
        """Lengths of the recording, once it was read, if it ends before its header promised."""
        return self._span.shorter

    def rest(self) -> Iterator[Span]:
        """Spans that were not read yet."""
        while not self._span.is_last:
            self._span = next(self._following)
            yield self._span


class ModelJob(CorpusJob):
    """Rows that a model computes for every recording.

    Attributes:
        schema: columns of the rows.
        digits: significant digits of numbers in CSV files.
    """

    streams_long = True
    schema: pa.Schema
    digits: int

    def __init__(self, source: Source, model: PreTrainedModel, name: str, label: str, options: dict[str, Any]) -> None:
        self.source, self.sampling_rate = source, int(model.config.sampling_rate)
        self.read = sample_reader(self.source, self.sampling_rate)
        self.identity = {
            "bestrq2": __version__,
            "model": name,
            "weights_sha256": weights_hash(model),
            "source": printable(self.source.name),
            "source_names_blake2b": names_digest(self.source, label),
            **{name: str(value) for name, value in options.items()},
        }

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, recording: int) -> str:
        return self.source.describe(recording)

    @abstractmethod
    def results(self, recordings: list[_Recording]) -> list[pa.Table | str]:
        """Rows of every recording, or the reason why there are none."""

    def part(self, spans: list[Span]) -> Part:
        usable = [_Recording(span) for span in spans if not span.problem]
        results = {span.recording: span.problem for span in spans}
        results |= {one.number: result for one, result in zip(usable, self.results(usable), strict=True)}
        rejected = [(span.path, results[span.recording]) for span in spans if isinstance(results[span.recording], str)]
        return part_of(spans, self._table(results.values()), rejected)

    def long_part(self, first: Span, following: Iterator[Span]) -> Part:
        """Part of one recording of several spans, which are read while the model runs."""
        recording = _Recording(first, following, self.sampling_rate)
        (result,) = self.results([recording])
        for _ in recording.rest():  # after an error: `long_part` must take all spans of its recording
            pass
        rejected = [(first.path, result)] if isinstance(result, str) else []
        rows, shorter = self._table([result]), [recording.shorter] if recording.shorter else []
        return Part(first.start, (first.recording + 1, 0), rows, rejected, recording.seconds, 1.0, shorter)

    def _table(self, results: Iterable[pa.Table | str]) -> pa.Table:
        return pa.concat_tables([self.schema.empty_table(), *(one for one in results if isinstance(one, pa.Table))])


class EmbedJob(ModelJob):
    """Embeddings of every recording.

    Args:
        model: model as in `bestrq2.embed`.
        spec: absolute name of the source.
        options: vectors to write.
        device: device of the model.
    """

    digits = 9  # restores every float32

    def __init__(self, model: str, spec: str, options: EmbedOptions, device: str | None = None) -> None:
        source = open_source(spec)  # first: loading the model takes longer
        self.embedder, self.options = load(model, device), options
        readout, config = self.embedder.check_options(**options.keywords()), self.embedder.config
        # The readout in full: the model's own is not part of its weights.
        names = {"rows": "frames" if options.frames else "clips", **options.keywords(), **readout.settings()}
        super().__init__(source, self.embedder.model, self.embedder.name, "embed", names)
        self.width = readout.frame_width(config) if options.frames else readout.clip_width(config)
        second = "time" if options.frames else "seconds"
        vector = pa.list_(pa.float32(), self.width)
        self.schema = pa.schema([("path", pa.string()), (second, pa.float64()), ("embedding", vector)])

    def results(self, recordings: list[_Recording]) -> list[pa.Table | str]:
        """Rows of every recording; recordings of similar length are embedded together."""
        found: dict[int, pa.Table | str] = {}
        for batch in _similar(recordings):
            found |= {one.number: result for one, result in zip(batch, self._embedded(batch), strict=True)}
        return [found[one.number] for one in recordings]

    def _embedded(self, batch: list[_Recording]) -> list[pa.Table | str]:
        try:
            streams = [SampleStream(one.path, one.blocks()) for one in batch]
            embeddings = self.embedder.embed(streams, **self.options.keywords())
            return [self._rows(one, embeddings, place) for place, one in enumerate(batch)]
        except AudioError as error:
            if len(batch) > 1:  # to find out which one it is
                return [result for one in batch for result in self._embedded([one])]
            return [str(error).removeprefix(f"{batch[0].path}: ")]

    def _rows(self, recording: _Recording, embeddings: Embeddings, place: int) -> pa.Table:
        valid = embeddings.frame_mask[place]
        if self.options.frames:
            vectors, second = embeddings.frames[place][valid], embeddings.timestamps[place][valid]
        else:
            vectors, second = embeddings.clip[place : place + 1], np.array([recording.seconds])
        if not np.isfinite(vectors).all():
            raise AudioError("its embedding is not finite.")
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), self.width)
        return pa.table([pa.array([recording.path] * len(vectors)), pa.array(second), column], schema=self.schema)


class PredictJob(ModelJob):
    """Class probabilities of every recording.

    Args:
        model: model as in `bestrq2.predict`.
        spec: absolute name of the source.
        threshold: least probability of a label.
        batch_size: windows that go through the model at once.
        device: device of the model.
    """

    digits = 6

    def __init__(self, model: str, spec: str, threshold: float, batch_size: int, device: str | None = None) -> None:
        source = open_source(spec)  # first: loading the model takes longer
        self.classifier, self.threshold, self.batch_size = load_classifier(model, device), threshold, batch_size
        options = {"rows": "predictions", "threshold": threshold}
        super().__init__(source, self.classifier.model, Path(model).name, "predict", options)
        columns = [(f"p({name})", pa.float32()) for name in self.classifier.classes]
        self.schema = pa.schema([("path", pa.string()), ("label", pa.string()), *columns])

    def results(self, recordings: list[_Recording]) -> list[pa.Table | str]:
        """Rows of every recording; windows of several recordings go through the model together."""
        found = self.classifier.classify((one.blocks() for one in recordings), self.batch_size)
        return [self._row(one, result) for one, result in zip(recordings, found, strict=True)]

    def _row(self, recording: _Recording, result: np.ndarray | AudioError) -> pa.Table | str:
        if isinstance(result, AudioError):
            return str(result)
        label = label_of(result, self.classifier.classes, self.classifier.multi_label, self.threshold)
        values = [[recording.path], [label], *([value] for value in result)]
        return pa.table([pa.array(value, kind) for value, kind in zip(values, self.schema.types, strict=True)],
                        schema=self.schema)  # fmt: skip


def _similar(recordings: list[_Recording]) -> Iterator[list[_Recording]]:
    """Batches of recordings of similar length."""
    batch: list[_Recording] = []
    for recording in sorted(recordings, key=lambda one: (one.seconds, one.number)):
        if batch and recording.seconds * (len(batch) + 1) > _CALL_SECONDS:
            yield batch
            batch = []
        batch.append(recording)
    if batch:
        yield batch


class _Counts(NamedTuple):
    """Recordings processed, rejected, and shorter than announced, and rows of the result."""

    processed: int
    rejected: int
    shorter: int
    rows: int


def process_corpus(
    make_job: Callable[..., ModelJob], output: Path, workers: Workers, device: str | None, label: str, verb: str
) -> Path:
    """Make the missing parts of a job, and join them to the output if none is missing then.

    Args:
        make_job: makes the job on a device, from the keyword `device`; picklable.
        output: Parquet or CSV file.
        workers: processes that make the parts.
        device: device of the model.
        label: name of the command.
        verb: what was done with recordings, such as "embedded".

    Raises:
        BestRQ2Error: one sentence that says what to change.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{output}: the suffix must be .parquet or .csv, which chooses the format")
    parts = PartsFolder(output.with_name(f"{output.name}.parts"))
    with disk_errors(output), parts.held(workers.process.rank):
        job = make_job(device=_device(device, workers.process))
        # Before a look at the output, which another process may write now: it deletes the parts after that.
        stretches = parts.missing(job.blocks(workers.process))
        if output.exists():
            _check_same(output, job.identity)
            parts.delete()
            logger.info("%s: is complete already", output)
            return output
        counts = share_parts(
            job, parts, stretches, workers, is_joined=output.exists, join=lambda: _join(parts, job, output),
            label=label, unit="recordings", remake=partial(make_job, device=device), device=device,
        )  # fmt: skip
    if counts is None:
        return output
    listing, shorter = _listings(output)
    if not counts.rows:
        total = counted(counts.rejected, "recording")
        reasons = reasons_in_words(listing)
        raise DataError(f"{job.source.name}: not one of {total} could be {verb}; {reasons}; see {listing}")
    rows = "" if counts.rows == counts.processed else f" in {counted(counts.rows, 'frame')}"
    logger.info(
        "%s: %s %s%s, %d rejected%s%s",
        output, counted(counts.processed, "recording"), verb, rows, counts.rejected,
        f"; see {listing}" if counts.rejected else "",
        f"; shorter than announced: {counts.shorter}, listed in {shorter}" if counts.shorter else "",
    )  # fmt: skip
    return output


def _device(device: str | None, process: Process) -> str | None:
    """Device of one of several processes: a GPU of its own if there are GPUs."""
    if process.world_size > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{process.local_rank % torch.cuda.device_count()}"
    return device


def _listings(output: Path) -> tuple[Path, Path]:
    """Lists of rejected recordings and of those shorter than announced."""
    return output.with_name(f"{output.name}.rejected.csv"), output.with_name(f"{output.name}.shorter.csv")


def _provenance(output: Path) -> Path:
    """File beside a CSV file with what a Parquet file holds in its metadata."""
    return output.with_name(f"{output.name}.json")


def _check_same(output: Path, identity: dict[str, str]) -> None:
    """Check that a file is the finished result of the same command.

    Raises:
        ConfigError: it is something else.
    """
    found: Any = {}
    if output.suffix.lower() == ".csv":
        try:
            found = json.loads(_provenance(output).read_text())
        except (OSError, ValueError):
            found = {}
    else:
        found = read_identity(output) or {}
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in identity.items()):
        raise ConfigError(f"{output}: exists already; delete it or name another --output")


def _join(parts: PartsFolder, job: ModelJob, output: Path) -> _Counts:
    """Write the lists of recordings and the result, in the order of the source, and delete the parts."""
    everything = list(job.blocks(ALONE))
    counts = _join_lists(parts, everything, output)
    if counts.rows:
        facts = {**job.identity, "embedded": str(counts.processed), "rejected_count": str(counts.rejected)}
        joined = parts.path / f"joined{output.suffix}"
        tables = (part.rows for part in parts.read_all(everything))
        with whole_file(joined) as temporary:
            if output.suffix.lower() == ".csv":
                write_text(_provenance(output), json.dumps(facts, indent=2) + "\n")
                _write_csv(temporary, job, tables)
            else:
                _write_parquet(temporary, job.schema.with_metadata(facts), tables)
        joined.replace(output)
    parts.delete()
    return counts


def _join_lists(parts: PartsFolder, blocks: list[range], output: Path) -> _Counts:
    recordings = rejected = shorter = rows = 0
    fresh = parts.path / "rejected.csv", parts.path / "shorter.csv"
    with ExitStack() as stack:
        rejections, shorts = (stack.enter_context(stack.enter_context(whole_file(one)).open("wb")) for one in fresh)
        rejections.write(REJECTED_HEADER)
        shorts.write(SHORTER_HEADER)
        for part in parts.read_all(blocks):
            rejections.writelines(list_line(*one) for one in part.rejected)
            shorts.writelines(list_line(*one) for one in part.shorter)
            recordings, rows = recordings + part.stop[0] - part.start[0], rows + len(part.rows)
            rejected, shorter = rejected + len(part.rejected), shorter + len(part.shorter)
    for count, new, listing in zip((rejected, shorter), fresh, _listings(output), strict=True):
        if count:
            new.replace(listing)
        else:
            listing.unlink(missing_ok=True)  # of an earlier output that was deleted
    return _Counts(recordings - rejected, rejected, shorter, rows)


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Rows in full row groups, however they are spread over the tables."""
    width = sum(kind.list_size if pa.types.is_fixed_size_list(kind) else 2 for kind in schema.types)
    size = max(1, _GROUP_BYTES // (4 * width))
    with pq.ParquetWriter(path, schema, use_dictionary=["path"]) as writer:
        waiting = schema.empty_table()
        for table in tables:
            waiting = pa.concat_tables([waiting, table.cast(schema)])
            while len(waiting) >= size:
                writer.write_table(waiting.slice(0, size).combine_chunks())
                waiting = waiting.slice(size)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())


def _write_csv(path: Path, job: ModelJob, tables: Iterable[pa.Table]) -> None:
    """One column per value of a vector, "embedding_0" and so on."""
    with path.open("w", encoding="utf-8", newline="") as file:
        names: list[str] = []
        for column in job.schema:
            width = column.type.list_size if pa.types.is_fixed_size_list(column.type) else None
            names += [column.name] if width is None else [f"{column.name}_{place}" for place in range(width)]
        file.write(csv_line(names))
        for table in tables:
            for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
                file.write(csv_line(cell for value in values for cell in _cells(value, job.digits)))


def _cells(value: Any, digits: int) -> list[str]:
    if isinstance(value, list):
        return [cell for one in value for cell in _cells(one, digits)]
    return [f"{value:.{digits}g}" if isinstance(value, float) else str(value)]
