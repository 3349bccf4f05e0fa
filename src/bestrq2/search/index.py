"""Index of a large corpus by LanceDB (extra `lancedb`), kept beside its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bestrq2.errors import ConfigError
from bestrq2.files import disk_errors, whole_file
from bestrq2.progress import Progress
from bestrq2.search.neighbours import unit_length

# Parts of the index that a query looks into: among 120,000 vectors, five are enough for all of the ten nearest.
_PROBES = 50


class VectorIndex:
    """Nearest rows of a table with more vectors than memory should hold, approximately.

    The index is made when it is missing or older than the table, in FILE.lance beside it, which takes as much disk.

    Args:
        path: the table.
        rows: number of its rows.
        width: values per vector, D.
        blocks: reads its vectors in order, float32 [rows, D] at a time.

    Attributes:
        mean: mean of the vectors, float32 [D].

    Raises:
        ConfigError: LanceDB is not installed, or the folder cannot be written.
    """

    def __init__(self, path: Path, rows: int, width: int, blocks: Callable[[], Iterable[NDArray[np.float32]]]) -> None:
        try:
            import lancedb
        except ImportError as error:
            raise ConfigError(
                f"{path}: holds {rows:,} recordings, which need an index; pip install 'bestrq2[lancedb]'"
            ) from error
        folder, status = path.with_name(f"{path.name}.lance"), path.stat()
        # Written last: says for which file the index is complete.
        known = folder / f"mean-{status.st_mtime_ns}-{status.st_size}.npy"
        with disk_errors(folder):
            database = lancedb.connect(folder)
            if not known.is_file():
                for old in folder.glob("mean-*.npy"):
                    old.unlink()
                self._make(database, rows, width, blocks, known)
        self.mean: NDArray[np.float32] = np.load(known)
        self._table = database.open_table("vectors")

    def nearest(self, direction: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows [count] that are most similar to a vector of length 1 relative to the mean, and their cosines."""
        query = self._table.search(direction).nprobes(_PROBES).limit(count).select(["row", "_distance"])
        found = query.to_arrow()
        return found["row"].to_numpy(), (1 - found["_distance"].to_numpy()).astype(np.float32)

    def direction(self, row: int) -> NDArray[np.float32]:
        """Vector of a row relative to the mean, of length 1."""
        found = self._table.search().where(f"row = {row}").select(["vector"]).limit(1).to_arrow()
        return np.array(found["vector"][0].as_py(), np.float32)

    @staticmethod
    def _make(
        database: Any, rows: int, width: int, blocks: Callable[[], Iterable[NDArray[np.float32]]], known: Path
    ) -> None:
        from lancedb.index import IvfFlat

        schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), width))])
        mean = (sum(block.sum(axis=0, dtype=np.float64) for block in blocks()) / rows).astype(np.float32)

        def batches(progress: Progress) -> Iterator[pa.RecordBatch]:
            done = 0
            for block in blocks():
                block -= mean
                unit_length(block)
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)
                yield pa.RecordBatch.from_arrays([pa.array(np.arange(done, done + len(block))), vectors], schema=schema)
                done += len(block)
                progress.show(done)

        with Progress("index", rows, "recordings", leave=False) as progress:
            table = database.create_table("vectors", batches(progress), schema=schema, mode="overwrite")
            table.create_index("vector", config=IvfFlat(distance_type="cosine"))
        with whole_file(known) as temporary, temporary.open("wb") as file:
            np.save(file, mean)
