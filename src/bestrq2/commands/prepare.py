"""`bestrq2 prepare`: pack a source into tars for fast reading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bestrq2 import flags


def prepare(
    source: str,
    output: Path,
    sampling_rate: int = 16_000,
    format: str = "wav",
    segment_seconds: float | None = 30.0,
    min_seconds: float = 0.5,
    shard_size: float = 500.0,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Decode, resample and check a source once, and pack it into WebDataset tars with fast random access.

    The tars depend on the source and the options only, not on the number of processes. An interrupted run continues
    after its last finished tar when the same command is given again, and ends with the same bytes.

    Args:
        source: folder, audio file, list (.txt, .csv, .jsonl; a column "label" is kept), local tars, HDF5 file,
            "hub:NAME" or "soundworld".
        output: folder to write: shard-000000.tar and so on, each with an index beside it, rejected.csv (dropped
            recordings and reasons), summary.json.
        sampling_rate: sampling rate of the clips (Hz).
        format: encoding of the clips, 16-bit PCM: "wav" (read in place, fastest) or "flac" (about half the size).
        segment_seconds: length of the clips that longer recordings are cut into (s); null keeps them whole.
        min_seconds: length below which recordings, and remainders of a cut, are dropped (s).
        shard_size: size of a tar (MB, 10^6 bytes).
        num_workers: processes that decode audio; one per CPU by default.

    Returns:
        The content of summary.json: counts, hours, bytes, dropped recordings by kind, and mean and deviation (dB) of
        the log-mel spectrogram per band.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.data.prepare import run

    return run.prepare(
        source, output, sampling_rate=sampling_rate, format=format, segment_seconds=segment_seconds,
        min_seconds=min_seconds, shard_size=shard_size, num_workers=num_workers,
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 prepare`, or check its output with `--check`."""
    switches = {"check": "check the tars in OUTPUT instead: every shard and clip"}
    values = flags.parse_command(prepare, argv, positional=("source", "output"), switches=switches)
    if values.pop("check"):
        from bestrq2.data.prepare.check import check_prepared

        check_prepared(values["output"], values["num_workers"])
    else:
        prepare(**values)
    print(values["output"])
