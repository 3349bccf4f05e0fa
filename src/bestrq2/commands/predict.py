"""`bestrq2 predict`: classify every recording of a corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2 import flags


def predict(
    model: str | os.PathLike[str],
    source: str,
    output: Path,
    threshold: float = 0.5,
    batch_size: int = 16,
    num_workers: int = 0,
    device: str | None = None,
) -> Path:
    """Classify every recording of a corpus with a fine-tuned encoder and write a CSV file.

    Recordings that cannot be read are skipped and listed. Recordings longer than the model's max_seconds are cut into
    windows, whose probabilities are averaged, weighted by their lengths.

    Args:
        model: run folder of `bestrq2 finetune`, or an exported classifier.
        source: folder, audio file, list (.txt, .csv, .jsonl), tars or any other local source of `bestrq2 pretrain`.
        output: CSV file to write, with columns path, label (for several classes per recording: those at or above the
            threshold, separated by ";") and "p(CLASS)", the probability of each class. Rejected recordings are listed
            in OUTPUT.rejected.csv.
        threshold: least probability of a label, for models with several classes per recording.
        batch_size: windows per forward pass.
        num_workers: processes that decode audio; 0 decodes in the main process.
        device: device to run on, such as "cpu" or "cuda:0"; CUDA by default where available.

    Returns:
        The CSV file.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.inference import predicting

    return predicting.predict(
        model, source, output, threshold=threshold, batch_size=batch_size, num_workers=num_workers, device=device
    )


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 predict`."""
    print(predict(**flags.parse_command(predict, argv, positional=("model", "source"))))
