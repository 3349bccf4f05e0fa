"""PCM on standard input to frames on standard output, as JSON lines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from bestrq2.errors import AudioError, ConfigError
from bestrq2.inference.embedder import Embedder
from bestrq2.inference.inputs import checked_rate

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
# Beginnings of WAV, FLAC, Ogg and MP3 files, which as samples would be loud noise.
_FILES = (b"RIFF", b"fLaC", b"OggS", b"ID3")


def embed_pcm(embedder: Embedder, rate: float | None, **options: Any) -> None:
    """Write every frame of standard input to standard output as soon as it is final.

    Args:
        embedder: encoder.
        rate: rate of the samples in Hz; None for the model's.
        options: options of `Embedder.stream`.

    Raises:
        AudioError: standard input has no samples, or is an audio file.
        ConfigError: standard input is a terminal or closed, or an argument is out of range.
    """
    rate = checked_rate(rate, embedder.config.sampling_rate, "rate")
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there are no samples on standard input; pipe 16-bit mono PCM into it")
    stream = embedder.stream(_samples(sys.stdin.buffer), rate, **options)
    logger.info("reading 16-bit mono samples at %g Hz; frames follow %.3g s behind", rate, embedder.latency_seconds)
    for frames, moments in stream:
        if not np.isfinite(frames).all():
            raise AudioError("the embedding of standard input is not finite.")
        for frame, moment in zip(frames, moments, strict=True):
            # Nine digits restore every float32.
            vector = [float(f"{value:.9g}") for value in frame.tolist()]
            print(json.dumps({"time": round(float(moment), 6), "embedding": vector}))
        sys.stdout.flush()


def _samples(file: BinaryIO) -> Iterator[np.ndarray]:
    """Whole samples, int16 [n], as they arrive."""
    rest, begun = b"", False
    while piece := file.read1(_READ_BYTES):  # type: ignore[attr-defined]
        if not begun and piece.startswith(_FILES):
            raise AudioError(
                "standard input is an audio file, not samples; embed the file by its path, or pipe it through "
                "`ffmpeg -i FILE -f s16le -ac 1 -ar RATE -`."
            )
        begun, piece = True, rest + piece
        whole = len(piece) - len(piece) % 2
        rest = piece[whole:]
        yield np.frombuffer(piece[:whole], "<i2")
    if rest:
        logger.warning("standard input ended within a 16-bit sample; its last byte is left out")
