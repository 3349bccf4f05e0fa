"""Recordings in few megabytes, for machines that can only be sent little: 16 kHz mono Opus in long streams.

    python benchmarks/recordings_pack.py pack shards/ build/gpu-pack --mib 29 --parts 2 --groups unlabelled.csv
    python benchmarks/recordings_pack.py unpack build/gpu-pack/part-0 shards-again/

`pack` reads a folder of `bestrq2 prepare`. Every group gets the same time, or all it has if that is less; groups are
the packages of a list with columns path and package, such as that of `bestrq2 realworld --more`, or else folders. Of
each clip at most `--longest` seconds are taken. Parts have different clips of the same groups. Clips follow one
another in streams of ten minutes, because a file of its own for each would cost as much as its sound; `clips.json`
has their lengths. `unpack` cuts the streams again, to the sample, and writes shards of 16-bit PCM. It needs libsndfile
alone, no FFmpeg.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from bestrq2.data.open_source import open_source
from bestrq2.data.shards.writer import ShardWriter
from bestrq2.data.sources import Source
from bestrq2.data.specs import read_rows, resolved

RATE, STREAM_SECONDS = 16_000, 600
# Of the bytes of a part; the rest is for containers and for streams above their nominal rate.
SHARE_OF_STREAMS = 0.96
CLIPS = "clips.json"


def groups_of(source: Source, listing: Path | None) -> list[str]:
    """Group of every clip: the package of its recording in a list, or else the folder of its recording."""
    paths = [Path(str(source.metadata(number).get("path", ""))) for number in range(len(source))]
    if listing is None:
        return [str(path.parent) for path in paths]
    rows = read_rows(listing, [("path",), ("package",)])
    packages = {os.path.abspath(resolved(listing, row["path"])): row["package"] for row in rows}
    return [packages.get(str(path), str(path.parent)) for path in paths]


def fair_shares(available: dict[str, float], budget: float) -> dict[str, float]:
    """Time of each group: all of small ones, and as much as each other of the larger ones."""
    shares, left = {}, budget
    for number, group in enumerate(sorted(available, key=lambda name: available[name])):
        shares[group] = min(available[group], left / (len(available) - number))
        left -= shares[group]
    return shares


def chosen_clips(groups: Sequence[str], seconds: np.ndarray, budget: float, parts: int) -> list[list[int]]:
    """Numbers of the clips of each part, in random order; every group gives its share, dealt to the parts in turn.

    Args:
        groups: group of every clip.
        seconds: length of every clip.
        budget: length of all parts together.
        parts: number of parts.
    """
    rng = np.random.default_rng(0)
    names, group_numbers = np.unique(np.asarray(groups), return_inverse=True)
    totals = np.bincount(group_numbers, seconds)
    shares = fair_shares(dict(zip(names.tolist(), totals.tolist(), strict=True)), budget)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    turn = 0
    for number, name in enumerate(names):
        clips = rng.permutation(np.flatnonzero(group_numbers == number))
        middle = np.cumsum(seconds[clips]) - seconds[clips] / 2
        middle[0] = 0.0  # however short the share is
        for clip in clips[middle <= shares[str(name)]]:
            dealt[turn % parts].append(int(clip))
            turn += 1
    return [rng.permutation(part).tolist() for part in dealt]


def excerpt(source: Source, clip: int, longest: float) -> np.ndarray:
    """Samples of a clip, int16: all, or as many seconds from its middle."""
    with source.unconverted(clip, RATE) as decoder:
        samples = decoder.read(0, None)
    start = max(0, (len(samples) - round(longest * RATE)) // 2)
    return samples[start : start + round(longest * RATE)]


def encode(path: Path, samples: np.ndarray, kbit: float) -> None:
    """Write int16 samples [S] as Opus in Ogg."""
    import av  # not needed to unpack

    with av.open(str(path), "w", format="ogg") as container:
        options = {"application": "audio", "vbr": "on"}
        stream = container.add_stream("libopus", rate=RATE, layout="mono", options=options)
        stream.bit_rate = round(1000 * kbit)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_part(folder: Path, source: Source, clips: list[int], groups: list[str], kbit: float, longest: float) -> float:
    """Write the streams of a part and their table; returns seconds of audio."""
    folder.mkdir(parents=True)
    streams: dict[str, list[tuple[int, str]]] = {}
    waiting: list[np.ndarray] = []
    names: list[tuple[int, str]] = []
    total = 0
    for number, clip in enumerate(clips):
        waiting.append(excerpt(source, clip, longest))
        names.append((len(waiting[-1]), Path(groups[clip]).name))
        length = sum(map(len, waiting))
        if length >= STREAM_SECONDS * RATE or number == len(clips) - 1:
            name = f"{len(streams):03d}.ogg"
            encode(folder / name, np.concatenate(waiting), kbit)
            streams[name], waiting, names, total = names, [], [], total + length
    (folder / CLIPS).write_text(json.dumps(streams, separators=(",", ":")) + "\n", encoding="utf-8")
    return total / RATE


def pack(options: argparse.Namespace) -> None:
    source = open_source(options.source)
    groups = groups_of(source, options.groups)
    samples, rates = source.lengths()
    seconds = np.minimum(samples / np.maximum(1, rates), options.longest)
    budget = SHARE_OF_STREAMS * options.parts * options.mib * 2**20 * 8 / (1000 * options.kbit)
    for number, clips in enumerate(chosen_clips(groups, seconds, budget, options.parts)):
        folder = options.output / f"part-{number}"
        heard = write_part(folder, source, clips, groups, options.kbit, options.longest)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        count = len({groups[clip] for clip in clips})
        print(f"{folder}: {heard / 3600:.2f} hours, {len(clips)} clips of {count} groups, {size:.1f} MiB", flush=True)


def unpack_stream(stream: Path, clips: list[tuple[int, str]], tar: Path) -> float:
    """Write one stream's clips as a shard; returns seconds of audio."""
    samples, rate = soundfile.read(stream, dtype="int16")
    assert (rate, len(samples)) == (RATE, sum(length for length, _ in clips)), f"{stream} is not the stream of {CLIPS}"
    writer, start = ShardWriter(tar), 0
    for number, (length, group) in enumerate(clips):
        file = io.BytesIO()
        soundfile.write(file, samples[start : start + length], RATE, format="WAV", subtype="PCM_16")
        writer.add(f"{stream.stem}-{number:05d}", file.getvalue(), "wav", {"group": group})
        start += length
    writer.close({})
    return len(samples) / RATE


def unpack(part: Path, output: Path, processes: int | None = None) -> float:
    """Write shards OUTPUT/PART-000.tar and so on of one part; returns seconds of audio."""
    output.mkdir(parents=True, exist_ok=True)
    streams = json.loads((part / CLIPS).read_text(encoding="utf-8"))
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(unpack_stream, part / name, clips, output / f"{part.name}-{Path(name).stem}.tar")
            for name, clips in streams.items()
        ]
        return sum(job.result() for job in jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser("pack")
    packing.add_argument("source", help="folder of `bestrq2 prepare`")
    packing.add_argument("output", type=Path, help="new folder, with a folder of at most --mib for each part")
    packing.add_argument("--mib", type=float, default=29.0, help="size of each part")
    packing.add_argument("--parts", type=int, default=1)
    packing.add_argument("--kbit", type=float, default=16.0, help="bit rate (kbit/s)")
    packing.add_argument("--longest", type=float, default=10.0, help="seconds taken of a clip, at most")
    packing.add_argument("--groups", type=Path, help="list with the columns path and package")
    unpacking = actions.add_parser("unpack")
    unpacking.add_argument("part", type=Path)
    unpacking.add_argument("output", type=Path, help="folder of shards")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options)
    else:
        print(f"{options.output}: {unpack(options.part, options.output) / 3600:.2f} hours")


if __name__ == "__main__":
    main()
