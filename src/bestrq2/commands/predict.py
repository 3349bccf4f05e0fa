"""`bestrq2 predict`: classify every recording of a corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bestrq2 import flags
from bestrq2.errors import ConfigError
from bestrq2.progress import starting


def predict(
    model: str | os.PathLike[str],
    source: str,
    output: str | os.PathLike[str],
    threshold: float = 0.5,
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | None = None,
    ray: str | None = None,
    ray_actors: int | None = None,
) -> Path:
    """Classify every recording of a corpus with a fine-tuned encoder and write a CSV or Parquet file.

    Recordings that cannot be read are skipped and listed. Recordings longer than the model's max_seconds are cut into
    windows, whose probabilities are averaged, weighted by their lengths. The same command continues an interrupted run.
    Under `torchrun` each process predicts its share, and the last one to finish writes the result.

    Args:
        model: run folder of `bestrq2 finetune`, or an exported classifier.
        source: any source of `bestrq2 pretrain`: folder, audio file, list (.txt, .csv, .jsonl), tars and so on.
        output: CSV or Parquet file to write, by its suffix, with columns path, label (for several classes per
            recording: those at or above the threshold, separated by ";") and "p(CLASS)", the probability of each class.
            Rejected recordings are listed in OUTPUT.rejected.csv, those shorter than their header says in
            OUTPUT.shorter.csv; until the end, finished parts are in OUTPUT.parts.
        threshold: least probability of a label, for models with several classes per recording.
        batch_size: windows per forward pass.
        num_workers: processes that decode audio, 0 for a thread; one per CPU by default, at most 16.
        device: device to run on, such as "cpu" or "cuda:0"; CUDA by default where available.
        ray: "local" for Ray on this machine, or the address of a Ray cluster such as "auto"; model and source must have
            the same names on every node.
        ray_actors: number of Ray actors; by default one per GPU of the cluster, else one per CPU.

    Returns:
        The output. Under `torchrun` it exists when the last process has finished.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold is {threshold}; it must be between 0 and 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    with starting("predict") as progress:
        from bestrq2.data.corpus_pass import choose_workers
        from bestrq2.data.open_source import absolute_spec
        from bestrq2.inference.corpus import MOST_WORKERS, PredictJob, process_corpus

        progress.show()
        make_job = partial(PredictJob, os.fspath(model), absolute_spec(source), threshold, batch_size)
        workers = choose_workers(num_workers, ray, ray_actors, MOST_WORKERS)
        return process_corpus(make_job, Path(output), workers, device, "predict", "classified")


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 predict`."""
    output = predict(**flags.parse_command(predict, argv, positional=("model", "source")))
    if output.exists():  # of several processes, the last one writes it
        print(output)
