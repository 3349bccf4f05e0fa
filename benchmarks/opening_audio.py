"""Cost of reading a part of a file, for lengths and formats.

python benchmarks/opening_audio.py --seconds 10 300 3600

Each row is a mono file of noise at 16 kHz (Opus: 48 kHz). "open" is the time until its length is known; "again" the
same for a file whose packets this process has counted before; "4 s" the time for opening it and reading 4 s from
three quarters of it; "through" says how many times faster than real time all of it is decoded. Processor time of one
thread, medians of five, files in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

from bestrq2.data import ffmpeg
from bestrq2.data.audio import open_audio, read_audio

CODECS = {
    "wav": None,
    "flac": None,
    "mp3": "libmp3lame",
    "m4a": "aac",
    "opus": "libopus",
    "webm": "libopus",
    "ogg": None,
    "wma": "wmav2",
}
REPEATS = 5


def write(path: Path, seconds: int, codec: str | None) -> None:
    """Encode noise; the first ten seconds are repeated."""
    rate = 48_000 if codec == "libopus" else 16_000
    piece = (0.1 * np.random.default_rng(0).standard_normal(10 * rate)).astype(np.float32)
    if codec is None:
        with soundfile.SoundFile(path, "w", rate, 1) as file:
            for _ in range(0, seconds, 10):
                file.write(piece)
        return
    names = {".opus": "ogg", ".wma": "asf"}
    with av.open(str(path), "w", format=names.get(path.suffix)) as container:
        stream = container.add_stream(codec, rate=rate, bit_rate=64_000)
        stream.layout = "mono"
        for start in range(0, seconds * rate, 1000):
            offset = start % len(piece)
            frame = av.AudioFrame.from_ndarray(piece[None, offset : offset + 1000], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def measure(path: Path) -> int:
    """Length in samples."""
    with open_audio(path) as decoder:
        return decoder.measure()


def seconds_of(function: Callable[[], object], forget: bool = True) -> float:
    """Median seconds of processor time of a call."""
    times = []
    for _ in range(REPEATS):
        if forget:
            ffmpeg._survey_of_version.cache_clear()
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 300], help="lengths of the files (s)")
    arguments = parser.parse_args()
    print(
        "| format | length (s) | open (ms) | again (ms) | 4 s (ms) | through (x real time) |\n|---|--:|--:|--:|--:|--:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind, codec in CODECS.items():
            for seconds in arguments.seconds:
                path = Path(folder) / f"a.{kind}"
                write(path, seconds, codec)
                opened = seconds_of(lambda path=path: measure(path))
                again = seconds_of(lambda path=path: measure(path), forget=False)
                part = seconds_of(lambda path=path, at=0.75 * seconds: read_audio(path, 16_000, at, 4.0))
                start = time.process_time()
                read_audio(path, 16_000)
                through = seconds / (time.process_time() - start)
                figures = f"{1e3 * opened:.1f} | {1e3 * again:.1f} | {1e3 * part:.1f} | {through:,.0f}"
                print(f"| {kind} | {seconds} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
