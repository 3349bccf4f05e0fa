"""Predictions of a fine-tuned encoder for a whole corpus, as a CSV file."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bestrq2.data.open_source import open_recordings
from bestrq2.data.rejections import RejectionLog
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import check_writable, disk_errors, write_text
from bestrq2.inference.classifier import load_classifier
from bestrq2.text import counted

logger = logging.getLogger(__name__)

SEPARATOR = ";"


def predict(
    model: str | os.PathLike[str],
    source: str,
    output: Path,
    threshold: float = 0.5,
    batch_size: int = 16,
    num_workers: int = 0,
    device: str | None = None,
) -> Path:
    """Name the classes of every recording of a source; files that cannot be read are skipped and listed.

    Args:
        model: run folder of `bestrq2 finetune`, or a model folder of its kind.
        source: folder, audio file, list (.txt, .csv, .jsonl), tars or any other local source of `bestrq2 pretrain`.
        output: CSV file to write: path, label (of several classes: those at or above the threshold, with ";" between
            them, perhaps none) and "p(CLASS)", the probability of each class; rejected recordings go to
            OUTPUT.rejected.csv. Recordings longer than the model's max_seconds are cut into windows, whose
            probabilities are averaged, weighted by their lengths.
        threshold: of several classes, the least probability of a label.
        batch_size: windows that go through the model at once.
        num_workers: processes that decode; 0 decodes in this one.
        device: such as "cpu" or "cuda:0"; CUDA where there is one by default.

    Returns:
        The CSV file.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    output = Path(output)
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold is {threshold}; it must lie between 0 and 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if output.exists():
        raise ConfigError(f"{output}: exists already; delete it or name another --output")
    check_writable(output)
    opened = open_recordings(source)
    classifier = load_classifier(model, device)
    listing = output.with_name(f"{output.name}.rejected.csv")
    with disk_errors(output):
        listing.unlink(missing_ok=True)  # of an earlier output that was deleted
        rejections = RejectionLog(listing)
        rows: list[tuple[str, np.ndarray]] = []
        predictions = classifier.predict(opened, batch_size, num_workers)
        for found in tqdm(predictions, total=len(opened), desc="predict", unit="file", disable=None):
            if found.reason:
                rejections.add([(opened.describe(found.recording), found.reason)])
            else:
                rows.append((opened.describe(found.recording), found.probabilities))
        if not rows:
            raise DataError(
                f"{source}: not one of {counted(len(opened), 'recording')} could be read; see {rejections.path}"
            )
        write_text(output, predictions_table(rows, classifier.classes, classifier.multi_label, threshold))
    logger.info("%s: %d of %s, %d rejected", output, len(rows), counted(len(opened), "recording"), len(rejections))
    return output


def predictions_table(
    rows: Iterable[tuple[str, np.ndarray]],
    classes: tuple[str, ...],
    multi_label: bool,
    threshold: float = 0.5,
    truth: Iterable[np.ndarray] | None = None,
) -> str:
    """Predictions as the text of a CSV file.

    Args:
        rows: path and probabilities, float [classes], of every recording.
        classes: their names.
        multi_label: whether a recording may have any number of them.
        threshold: of several classes, the least probability of a label.
        truth: [classes] of every recording, 1 for those that are true; they go into a column "true".
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    known = None if truth is None else list(truth)
    writer.writerow(["path", *([] if known is None else ["true"]), "label", *(f"p({name})" for name in classes)])
    for place, (path, probabilities) in enumerate(rows):
        chosen = probabilities >= threshold if multi_label else np.arange(len(classes)) == probabilities.argmax()
        true = [] if known is None else [_joined(classes, known[place])]
        writer.writerow([path, *true, _joined(classes, chosen), *(f"{value:.6g}" for value in probabilities)])
    return table.getvalue()


def _joined(classes: tuple[str, ...], chosen: np.ndarray) -> str:
    return SEPARATOR.join(name for name, one in zip(classes, chosen, strict=True) if one)
