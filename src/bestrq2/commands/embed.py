"""`bestrq2 embed`: embed every recording of a corpus, or a stream of samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bestrq2 import flags
from bestrq2.errors import ConfigError
from bestrq2.progress import starting


def embed(
    model: str | os.PathLike[str],
    source: str,
    output: str | os.PathLike[str] | None = None,
    frames: bool = False,
    phases: int = 1,
    layers: int | list[int] | str | None = None,
    frequency: Literal["mean", "concat"] | None = None,
    pooling: str | None = None,
    normalize: bool = False,
    device: str | None = None,
    num_workers: int | None = None,
    ray: str | None = None,
    ray_actors: int | None = None,
    rate: float | None = None,
) -> Path | None:
    """Embed every recording of a corpus into a Parquet or CSV file, or samples from standard input as they arrive.

    Recordings that cannot be read are skipped and listed. The same command continues an interrupted run. Under
    `torchrun` each process embeds its share, on a GPU of its own if there are any, and the last one to finish writes
    the result; all processes need access to the same folder.

    With "-" as source, mono PCM (signed 16-bit little endian) is read from standard input, and each frame is written to
    standard output as a JSON line with "time" (its centre, s) and "embedding" as soon as it is final, about as long
    after that time as a window of the model; without --output, --pooling and worker processes.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        source: any source of `bestrq2 pretrain`: folder, file, list (.txt, .csv, .jsonl), tars, HDF5, "hub:NAME",
            mixture (.yaml, each recording once), URLs of tars, "soundworld"; "-" for samples on standard input.
        output: Parquet or CSV file to write, by its suffix, with columns path, seconds and embedding: one row per
            recording, in the order of the source. Rejected recordings are listed in OUTPUT.rejected.csv, those
            shorter than their header says in OUTPUT.shorter.csv; until the end, finished parts are in OUTPUT.parts.
        frames: write one row per frame instead, with columns path, time (centre of the frame, s) and embedding.
        phases: shifted copies of the patch grid, for frames every 1/phases of the hop.
        layers: "output" of the encoder, a hidden layer (0 is the input of the first block, -1 the output of the last),
            "mean" of all, or several: "3,6" averages them, "3:0.2,6:0.8" with weights, "3+6" concatenates; the model's
            own readout by default, which is the output unless it was exported with another one.
        frequency: what a frame holds of the rows of patches along frequency: their "mean", or "concat", one after the
            other; by default the model's own, usually the mean.
        pooling: what one vector per recording holds of the frames: "mean", "std", "max", "quarters" (means of the four
            quarters), "attention", or several concatenated, such as "mean+std"; by default the model's own, usually
            the mean.
        normalize: scale every vector to length 1, for retrieval by dot products.
        device: device to run on, such as "cpu" or "cuda:0"; CUDA by default where available.
        num_workers: processes that decode audio, 0 for a thread; one per CPU by default, at most 16.
        ray: "local" for Ray on this machine, or the address of a Ray cluster such as "auto"; model and source must have
            the same names on every node.
        ray_actors: number of Ray actors; by default one per GPU of the cluster, else one per CPU.
        rate: sampling rate of standard input in Hz, by default the model's.

    Returns:
        The output; None for standard input. Under `torchrun` it exists when the last process has finished.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    if source == "-":
        workers_only = {"num-workers": num_workers, "ray": ray, "ray-actors": ray_actors}
        _refuse({"output": output, "pooling": pooling, **workers_only}, "samples from standard input (-)")
        with starting("embed"):
            from bestrq2.inference.embedder import load
            from bestrq2.inference.pcm import embed_pcm

            embedder = load(model, device)
        embed_pcm(embedder, rate, phases=phases, layers=layers, frequency=frequency, normalize=normalize)
        return None
    _refuse({"rate": rate}, "recordings, which have their own")
    if output is None:
        raise ConfigError("--output is missing; name a .parquet or .csv file")
    with starting("embed") as progress:
        from bestrq2.data.corpus_pass import choose_workers
        from bestrq2.data.open_source import absolute_spec
        from bestrq2.inference.corpus import MOST_WORKERS, EmbedJob, EmbedOptions, process_corpus

        progress.show()
        options = EmbedOptions(frames, phases, layers, frequency, pooling, normalize)
        make_job = partial(EmbedJob, os.fspath(model), absolute_spec(source), options)
        workers = choose_workers(num_workers, ray, ray_actors, MOST_WORKERS)
        return process_corpus(make_job, Path(output), workers, device, "embed", "embedded")


def _refuse(values: dict[str, Any], source: str) -> None:
    """Raise a ConfigError for the first flag that has a value."""
    for name, value in values.items():
        if value is not None:
            raise ConfigError(f"--{name} does not go with {source}; leave it out")


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 embed`."""
    output = embed(**flags.parse_command(embed, argv, positional=("model", "source"), usual=("output",)))
    if output is not None and output.exists():  # of several processes, the last one writes it
        print(output)
