"""`bestrq2 prepare`: pack a source into tars for fast reading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bestrq2 import flags


def prepare(
    source: str,
    output: str | os.PathLike[str],
    sampling_rate: int = 16_000,
    format: Literal["wav", "flac"] = "wav",
    segment_seconds: float | None = 30.0,
    min_seconds: float = 0.5,
    shard_size: float = 500.0,
    num_workers: int | None = None,
    ray: str | None = None,
    ray_actors: int | None = None,
) -> dict[str, Any]:
    """Decode, resample and check a source once, and pack it into WebDataset tars with fast random access.

    The tars depend on the source and the options only, not on the number of processes. The same command continues an
    interrupted run after its last finished tar and ends with the same bytes. Under `torchrun` or on Ray each process
    decodes its share into OUTPUT/.parts, and the last one to finish packs the tars.

    Args:
        source: folder, audio file, list (.txt, .csv, .jsonl; a column "label" is kept), tars or their URLs, HDF5 file,
            "hub:NAME" or "soundworld".
        output: folder to write: shard-000000.tar and so on, each with an index beside it, rejected.csv (dropped
            recordings and reasons), shorter.csv (recordings shorter than their header says), summary.json.
        sampling_rate: sampling rate of the clips (Hz).
        format: encoding of the clips, 16-bit PCM: "wav" (read in place, fastest) or "flac" (about half the size).
        segment_seconds: length of the clips that longer recordings are cut into (s); null keeps them whole.
        min_seconds: length below which recordings, and remainders of a cut, are dropped (s).
        shard_size: size of a tar (MB, 10^6 bytes).
        num_workers: processes that decode audio, 0 for a thread; one per CPU by default.
        ray: "local" for Ray on this machine, or the address of a Ray cluster such as "auto"; the source must have the
            same name on every node.
        ray_actors: number of Ray actors; one per CPU by default.

    Returns:
        The content of summary.json: counts, hours, bytes, dropped recordings by kind, and mean and deviation (dB) of
        the log-mel spectrogram per band. Empty under `torchrun` while other processes are still at work.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.data.corpus_pass import choose_workers
    from bestrq2.data.prepare.cutting import Options
    from bestrq2.data.prepare.run import run_prepare

    options = Options(sampling_rate, format, segment_seconds, min_seconds, shard_size)
    return run_prepare(source, Path(output), options, choose_workers(num_workers, ray, ray_actors))


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 prepare`, or check its output with `--check`."""
    switches = {"check": "check the tars in OUTPUT instead: every shard and clip"}
    values = flags.parse_command(prepare, argv, positional=("source", "output"), switches=switches)
    if values.pop("check"):
        from bestrq2.data.prepare.check import check_prepared

        check_prepared(**{name: values[name] for name in ("output", "num_workers", "ray", "ray_actors")})
    else:
        prepare(**values)
    print(values["output"])
