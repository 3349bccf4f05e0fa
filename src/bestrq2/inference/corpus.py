"""Embeddings of a whole corpus in one Parquet file, in steps that survive a kill."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from bestrq2._version import __version__
from bestrq2.data.audio import audio_info
from bestrq2.data.opening import open_recordings
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.sources import ArraySource, FileSource, Source
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.files import disk_errors, whole_file
from bestrq2.inference.embedder import Embedder, load
from bestrq2.inference.embeddings import Embeddings

logger = logging.getLogger(__name__)

Recording: TypeAlias = "tuple[str, Path | np.ndarray, int | None]"

# Recordings per part: what a kill can cost.
_PART = 64


def embed_corpus(
    model: str,
    source: str,
    output: Path,
    frames: bool = False,
    phases: int = 1,
    device: str | None = None,
) -> Path:
    """Embed every recording of a source; files that cannot be read are skipped and listed.

    An interrupted run goes on where it was when the same command is given again.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        source: folder, audio file, list (.txt, .csv, .jsonl) or "soundworld".
        output: Parquet file to write: columns path, seconds and embedding, one row a recording; rejected ones go to
            OUTPUT.rejected.csv.
        frames: write one row per frame instead, with its time: columns path, time (s, centre) and embedding.
        phases: shifted copies of the patch grid, for frames every 1/phases of the hop.
        device: such as "cpu" or "cuda:0"; CUDA where there is one by default.

    Returns:
        The Parquet file.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output}: exists already; delete it or name another --output")
    opened = open_recordings(source)
    embedder = load(model, device)
    job = _Job(embedder, output, frames, phases)
    with disk_errors(output):
        job.parts.mkdir(parents=True, exist_ok=True)
        job.check_parts()
        listing = output.with_name(f"{output.name}.rejected.csv")
        done = job.done()
        if not done:
            listing.unlink(missing_ok=True)  # of an earlier output that was deleted
        rejections = RejectionLog(listing)
        waiting = (item for item in recordings(opened) if item[0] not in done)
        bar = tqdm(total=len(opened), initial=len(done), desc="embed", unit="file", disable=None)
        while batch := list(islice(waiting, _PART)):
            job.write_part(batch, rejections, bar)
        bar.close()
        rows = job.rows()
        if rows:
            job.join()
        shutil.rmtree(job.parts)
    if not rows:
        raise DataError(f"{source}: not one of {len(opened)} recordings could be embedded; see {rejections.path}")
    written = f"{rows} rows" if frames else f"{rows} of {len(opened)} recordings"
    logger.info("%s: %s, %d rejected", output, written, len(rejections))
    return output


def recordings(source: Source) -> Iterator[Recording]:
    """Name, audio and sampling rate (None for files, which carry their own) of every recording."""
    if isinstance(source, FileSource):
        for path in source.files:
            # Names that are no UTF-8 have no place in Parquet: their odd bytes are written out.
            yield os.fsencode(path).decode("utf-8", "backslashreplace"), path, None
    elif isinstance(source, ArraySource):
        for index in range(len(source)):
            yield source.describe(index), source.waveforms[index], source.sampling_rate
    else:
        raise DataError(f"{source.name}: sources of this kind cannot be embedded; give files or arrays")


class _Job:
    """One output with the parts that are already written."""

    def __init__(self, embedder: Embedder, output: Path, frames: bool, phases: int) -> None:
        self.embedder, self.output, self.frames, self.phases = embedder, output, frames, phases
        self.parts = output.with_name(f"{output.name}.parts")
        vector = pa.list_(pa.float32(), embedder.config.hidden_size)
        second = ("time", pa.float64()) if frames else ("seconds", pa.float64())
        made_by = {
            "bestrq2": __version__,
            "model": embedder.name,
            "weights_sha256": weights_hash(embedder),
            "phases": str(phases),
            "rows": "frames" if frames else "clips",
        }
        self.schema = pa.schema([("path", pa.string()), second, ("embedding", vector)], metadata=made_by)

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("part-*.parquet"))

    def check_parts(self) -> None:
        """Refuse to go on with parts of another model or of other options."""
        for part in self._files()[:1]:
            # Not the schemas themselves: Parquet has its own names for the values of lists.
            if pq.read_schema(part).metadata != self.schema.metadata:
                raise ConfigError(
                    f"{self.parts}: holds parts of another model or other options; delete it or name another --output"
                )

    def done(self) -> set[str]:
        """Names of the recordings in the parts and, marked by rows without embedding, of rejected ones."""
        return {name for part in self._files() for name in pq.read_table(part, columns=["path"])["path"].to_pylist()}

    def write_part(self, batch: list[Recording], rejections: RejectionLog, bar: tqdm) -> None:
        """Embed some recordings and write them, after the list of those rejected, which a kill could lose otherwise."""
        rejected: list[tuple[str, str]] = []
        tables = []
        for name, audio, rate in batch:
            try:
                tables.append(
                    self._table(name, self.embedder.embed([audio], rate, self.phases), self._duration(audio, rate))
                )
            except AudioError as error:
                rejected.append((name, str(error).removeprefix(f"{name}: ")))
                tables.append(pa.Table.from_pylist([{"path": name}], schema=self.schema))
            bar.update()
        rejections.add(rejected)
        with whole_file(self.parts / f"part-{len(self._files()):08d}.parquet") as temporary:
            pq.write_table(pa.concat_tables(tables), temporary)

    def _table(self, name: str, embeddings: Embeddings, duration: float) -> pa.Table:
        width = self.embedder.config.hidden_size
        valid = embeddings.frame_mask[0]
        rows = embeddings.frames[0][valid] if self.frames else embeddings.clip
        second = embeddings.timestamps[0][valid]
        if not self.frames:
            second = np.array([duration])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
        return pa.Table.from_arrays([pa.array([name] * len(rows)), pa.array(second), vectors], schema=self.schema)

    def _duration(self, audio: Path | np.ndarray, rate: int | None) -> float:
        """Seconds of a recording; NaN for a file whose header does not say."""
        if isinstance(audio, Path):
            seconds = audio_info(audio).seconds
            return float("nan") if seconds is None else seconds
        return audio.shape[-1] / (rate or self.embedder.config.sampling_rate)

    def rows(self) -> int:
        """How many embeddings there are in the parts."""
        second = self.schema.names[1]
        columns = [pq.read_table(part, columns=[second])[second] for part in self._files()]
        return sum(len(column) - column.null_count for column in columns)

    def join(self) -> None:
        """Put the parts into one file."""
        with whole_file(self.output) as temporary, pq.ParquetWriter(temporary, self.schema) as writer:
            for part in self._files():
                table = pq.read_table(part, schema=self.schema)
                writer.write_table(table.filter(table["embedding"].is_valid()))


def weights_hash(embedder: Embedder) -> str:
    """SHA-256 over names and values of all tensors: the identity of an encoder, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(embedder.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
