"""Time of searching an embedded corpus, for numbers of recordings.

    OMP_NUM_THREADS=1 python benchmarks/searching.py --rows 10000 100000 1000000 --pairs 10000

Tables of random vectors of 192 values are written as `bestrq2 embed` writes them. "read" is the time until the vectors
are in memory, once per table; "query" that of the ten nearest recordings, the median of 20. "pairs" (near-duplicates)
and "outliers" compare all recordings with all others, for tables of at most --pairs recordings. "map" and "clusters"
are fitted to a sample. Processor time of one thread, which is the time on an idle core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bestrq2 import EmbeddingTable

WIDTH, GROUP, QUERIES = 192, 40_000, 20
FACTS = {
    "model": "random", "weights_sha256": "0" * 64, "source": "/random", "rows": "clips", "phases": "1",
    "layers": "output", "frequency": "mean", "pooling": "mean", "normalize": "False",
}  # fmt: skip


def write(path: Path, rows: int) -> None:
    """A table of random vectors."""
    random = np.random.default_rng(0)
    vector = pa.list_(pa.float32(), WIDTH)
    schema = pa.schema([("path", pa.string()), ("seconds", pa.float64()), ("embedding", vector)])
    with pq.ParquetWriter(path, schema.with_metadata(FACTS), use_dictionary=["path"]) as writer:
        for start in range(0, rows, GROUP):
            count = min(GROUP, rows - start)
            values = pa.array(random.standard_normal(count * WIDTH, np.float32))
            paths = [f"/random/{row // 1000}/{row}.wav" for row in range(start, start + count)]
            column = pa.FixedSizeListArray.from_arrays(values, WIDTH)
            writer.write_table(pa.table([pa.array(paths), pa.array(np.ones(count)), column], schema=writer.schema))


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(path: Path, rows: int, pairs: int) -> dict[str, float]:
    """Times by name, in seconds."""
    write(path, rows)
    table = EmbeddingTable(path)
    queries = np.random.default_rng(1).standard_normal((QUERIES, WIDTH))
    found = {"read": seconds(lambda: table.nearest(queries[0]))}
    found["query"] = statistics.median(seconds(lambda query=query: table.nearest(query)) for query in queries)
    if rows <= pairs:
        found |= {"pairs": seconds(table.near_duplicates), "outliers": seconds(table.outliers)}
    found |= {"clusters": seconds(table.clusters), "map": seconds(table.coordinates)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--pairs", type=int, default=10_000, help="most rows of which all pairs are compared")
    arguments = parser.parse_args()
    print("| recordings | read | query | pairs | outliers | clusters | map |\n|--:|--:|--:|--:|--:|--:|--:|")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder) / "e.parquet", rows, arguments.pairs)
        names = ("read", "query", "pairs", "outliers", "clusters", "map")
        cells = [f"{found[name]:.2g} s" if name in found else "" for name in names]
        print(f"| {rows:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
