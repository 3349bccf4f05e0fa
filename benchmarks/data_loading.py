"""Throughput of rows of 10 s from files and shards, compared with webdataset on the same tars.

python benchmarks/data_loading.py --clips 400 --seconds 2
python benchmarks/data_loading.py --remote

Every line of the table reads 10 s at a time from clips of 12 s at 16 kHz in float32 batches of 32, with one torch
thread and the files in the page cache: bestrq2 packed rows, whose clips have 10 or 2 s, the others random crops. Lines
are interleaved, so that other load on the machine affects all alike; shown are median, minimum and maximum.
"webdataset" is WebDataset(tars) with a soundfile decoder that seeks to its crop, batched by a DataLoader; "soundfile"
is a plain loop over the FLAC files without batches.

"per core" is clips per second of processor time, including that of workers (Linux); it is the figure to compare on a
shared machine. Batches of 16-bit samples are converted to float32 in the training process (on a GPU, by the device).
The last column is the minimal memory traffic (16-bit samples read, float32 written; for FLAC the latter alone) as a
share of the speed of copying memory here, in processor time.

`--remote` serves the PCM shards by HTTP on this machine instead: seconds to open the corpus and until the first batch,
and clips per second after it, with an empty cache, with indexes beside the shards, and with all shards in the cache.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import soundfile
import torch
import webdataset

from bestrq2.data.loader import training_batches, training_rows
from bestrq2.data.open_source import open_source
from bestrq2.data.shards.writer import ShardWriter
from bestrq2.data.sources import Source
from bestrq2.model.fields import ModelFields

RATE, CLIP_SECONDS, CROP_SECONDS, BATCH = 16_000, 12, 10, 32
CROP = RATE * CROP_SECONDS
CLIPS_A_SHARD = 50


def waveform(number: int) -> np.ndarray:
    """Harmonics over noise, their loudness changing: int16 that FLAC halves, as it does speech and music."""
    rng = np.random.default_rng(number)
    time_axis = np.arange(CLIP_SECONDS * RATE) / RATE
    pitch = rng.uniform(80, 400)
    tones = sum(np.sin(2 * np.pi * pitch * k * time_axis) / k for k in range(1, 6))
    loudness = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * time_axis)
    return np.int16(32767 * (0.15 * loudness * tones + 0.003 * rng.standard_normal(len(time_axis))))


def write_corpus(root: Path, clips: int) -> None:
    """folder/*.flac, flac/*.tar and pcm/*.tar of the same clips."""
    for name in ("folder", "flac", "pcm"):
        (root / name).mkdir()
    for start in range(0, clips, CLIPS_A_SHARD):
        writers = {kind: ShardWriter(root / kind / f"{start:06d}.tar") for kind in ("flac", "pcm")}
        for number in range(start, min(clips, start + CLIPS_A_SHARD)):
            samples, contents = waveform(number), {}
            for kind, container in (("flac", "FLAC"), ("pcm", "WAV")):
                file = io.BytesIO()
                soundfile.write(file, samples, RATE, format=container)
                contents[kind] = file.getvalue()
            (root / "folder" / f"{number:06d}.flac").write_bytes(contents["flac"])
            writers["flac"].add(f"{number:06d}", contents["flac"], "flac", {"number": number})
            writers["pcm"].add(f"{number:06d}", contents["pcm"], "wav", {"number": number})
        for writer in writers.values():
            writer.close({})


def own_batches(place: Path | Source, workers: int) -> Iterator[torch.Tensor]:
    source = place if isinstance(place, Source) else open_source(place)
    fields = ModelFields()
    rows = training_rows(source, fields, seed=0)
    for batch in training_batches(source, rows, fields, seed=0, batch_rows=BATCH, num_workers=workers):
        yield batch.to("cpu").input_values


def crop_of(sample: dict) -> torch.Tensor:
    with soundfile.SoundFile(io.BytesIO(sample.get("wav") or sample["flac"])) as file:
        file.seek(np.random.randint(file.frames - CROP + 1))  # noqa: NPY002
        return torch.from_numpy(file.read(CROP, dtype="float32"))


def webdataset_batches(place: Path, workers: int) -> Iterator[torch.Tensor]:
    tars = sorted(str(path) for path in place.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(tars, resampled=True, shardshuffle=False)
        .map(crop_of)
        .batched(BATCH, collation_fn=torch.stack)
    )
    yield from torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)


def soundfile_loop(place: Path, _: int) -> Iterator[list[np.ndarray]]:
    paths = sorted(place.glob("*.flac"))
    rng = np.random.default_rng(0)
    while True:
        crops = []
        for path in rng.choice(paths, BATCH):
            with soundfile.SoundFile(path) as file:
                file.seek(int(rng.integers(file.frames - CROP + 1)))
                crops.append(file.read(CROP, dtype="float32"))
        yield crops


def measure_remote(root: Path, workers: Sequence[int], seconds: float) -> None:
    """Print start-up and speed of the PCM shards behind a web server on this machine."""
    indexed = [False]

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".parquet") and not indexed[0]:
                self.send_error(404)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root / "pcm"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ",".join(path.name for path in sorted((root / "pcm").glob("*.tar")))
    spec = f"http://127.0.0.1:{server.server_port}/{{{names}}}"
    os.environ["BESTRQ2_CACHE"] = str(root / "cache")
    print(f"{'cache':<22} {'workers':>7} {'open s':>7} {'first batch s':>14} {'clips/s':>8}")
    for number, cache in itertools.product(workers, ("empty", "empty, indexes beside", "filled")):
        if cache != "filled":
            shutil.rmtree(root / "cache", ignore_errors=True)
        indexed[0] = cache == "empty, indexes beside"
        start = time.perf_counter()
        source = open_source(spec)
        opened = time.perf_counter() - start
        batches = own_batches(source, number)
        next(batches)
        first = time.perf_counter() - start
        rate, _ = clips_a_second(batches, seconds)
        print(f"{cache:<22} {number:>7} {opened:>7.2f} {first:>14.2f} {rate:>8.0f}")
    server.shutdown()


def processor_seconds() -> float:
    """Of this process and its workers so far."""
    spent = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def clips_a_second(batches: Iterator, seconds: float) -> tuple[float, float]:
    """Clips a second, and a second of processor time, once what workers made at first is used up."""
    for _ in itertools.islice(batches, 12):
        pass
    count, start, busy = 0, time.perf_counter(), processor_seconds()
    while time.perf_counter() < start + seconds:
        count += len(next(batches))
    rates = count / (time.perf_counter() - start), count / (processor_seconds() - busy)
    batches.close()
    return rates


def copy_bandwidth() -> float:
    """Bytes read and written a second of processor time by copying memory, one thread."""
    source = np.ones(1 << 26, np.float32)
    target = np.zeros_like(source)
    times = []
    for _ in range(7):
        start = time.process_time()
        np.copyto(target, source)
        times.append(time.process_time() - start)
    return 2 * source.nbytes / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn of each row")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file to write the rates of all turns to")
    parser.add_argument("--remote", action="store_true", help="measure the PCM shards behind a web server instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.remote:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), arguments.clips)
            measure_remote(Path(folder), arguments.workers, arguments.seconds)
        return
    Row = tuple[str, str, int]
    kinds: dict[tuple[str, str], Callable[[Path, int], Iterator]] = {
        ("soundfile", "folder"): soundfile_loop,
        ("bestrq2", "folder"): own_batches,
        ("webdataset", "flac"): webdataset_batches,
        ("bestrq2", "flac"): own_batches,
        ("webdataset", "pcm"): webdataset_batches,
        ("bestrq2", "pcm"): own_batches,
    }
    rows: dict[Row, list[tuple[float, float]]] = {
        (*kind, workers): []
        for kind in kinds
        for workers in arguments.workers
        if workers == arguments.workers[0] or kind[0] != "soundfile"
    }
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), arguments.clips)
        bandwidths = []
        for _ in range(arguments.turns):
            bandwidths.append(copy_bandwidth())
            for (reader, place, workers), rates in rows.items():
                batches = kinds[reader, place](Path(folder) / place, workers)
                rates.append(clips_a_second(batches, arguments.seconds))
    bandwidth = statistics.median(bandwidths)
    print(f"{os.cpu_count()} cores, copying memory {bandwidth / 1e9:.1f} GB/s (read and written)")
    heads = ("reader", "from", "workers", "clips/s", "least-most", "x webdataset", "per core", "x", "GB/s", "of copy")
    line = "{:<11} {:<7} {:>7} {:>8} {:>13} {:>12} {:>9} {:>5} {:>6} {:>8}"
    print(line.format(*heads))
    for (reader, place, workers), rates in rows.items():
        (rate, per_core), turns = np.median(rates, axis=0), [turn for turn, _ in rates]
        rival = rows.get(("webdataset", "flac" if place == "folder" else place, workers), [])
        ratios = ["", ""]
        if rival and reader == "bestrq2":
            ratios = [f"{ratio:.1f}" for ratio in np.array([rate, per_core]) / np.median(rival, axis=0)]
        traffic = per_core * CROP * (6 if place == "pcm" else 4)
        core = [f"{per_core:.0f}", ratios[1]]
        spread = f"{min(turns):.0f}-{max(turns):.0f}"
        cells = (reader, place, workers, f"{rate:.0f}", spread, ratios[0], *core, f"{traffic / 1e9:.2f}")
        print(line.format(*cells, f"{traffic / bandwidth:.1%}"))
    if arguments.json:
        figures = [
            {"reader": reader, "from": place, "workers": workers, "clips_per_second_and_per_core": rates}
            for (reader, place, workers), rates in rows.items()
        ]
        arguments.json.write_text(json.dumps({"copy_bytes_per_second": bandwidth, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
