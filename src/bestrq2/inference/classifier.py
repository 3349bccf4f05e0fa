"""Classification of recordings of any length by a fine-tuned encoder."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from bestrq2.convert.loading import load_classification
from bestrq2.data.labels import SEPARATOR
from bestrq2.data.rejections import Shorter
from bestrq2.data.sources import Source
from bestrq2.data.spans import Span, SpanStream, Stretch, sample_reader, span_samples
from bestrq2.errors import AudioError
from bestrq2.inference.embedder import checked_device
from bestrq2.inference.windows import padded
from bestrq2.model.modeling_bestrq2 import MULTI, BestRQ2ForAudioClassification


@dataclass
class _Mean:
    """Mean over the windows of one recording, weighted by their lengths."""

    total: np.ndarray | float = 0.0
    samples: int = 0
    pending: int = 0
    is_read: bool = False
    problem: AudioError | None = None

    def add(self, probabilities: np.ndarray, samples: int) -> None:
        # Weighted by length, so that a short last window counts for what it is.
        self.total = self.total + samples * probabilities
        self.samples += samples
        self.pending -= 1


class AudioClassifier:
    """Class probabilities of recordings.

    A recording longer than the model's `max_seconds` is cut into adjacent windows of that length; its probabilities are
    the mean of theirs, weighted by their lengths.

    Args:
        model: the model; it is put into evaluation mode.
        device: device to run on; None for CUDA if available, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """

    def __init__(self, model: BestRQ2ForAudioClassification, device: str | torch.device | None = None) -> None:
        self.device = checked_device(device)
        self.model = model.eval().to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""
        return tuple(self.model.config.id2label[number] for number in range(self.model.config.num_labels))

    @property
    def multi_label(self) -> bool:
        """Whether a recording may have any number of classes."""
        return bool(self.model.config.problem_type == MULTI)

    def predict(
        self, source: Source, batch_size: int = 16, num_workers: int = 0, shorter: list[Shorter] | None = None
    ) -> Iterator[np.ndarray | AudioError]:
        """Classify every recording of a source, in its order.

        Args:
            source: recordings.
            batch_size: windows that go through the model at once; the results differ by rounding only.
            num_workers: processes that decode; 0 decodes in a thread.
            shorter: recordings that end before their header promised are added to it.

        Yields:
            float32 [classes] of each recording, summing to 1 unless a recording may have several classes; or the error
            that says why it cannot be used.
        """
        reader = sample_reader(source, self.model.config.sampling_rate)
        everything = [Stretch((0, 0), len(source))]
        with SpanStream(reader, everything, num_workers, source.describe) as stream:
            spans = _noting_shorter(stream, shorter if shorter is not None else [])
            recordings = (span_samples(group) for _, group in groupby(spans, key=lambda span: span.recording))
            yield from self.classify(recordings, batch_size)

    def classify(
        self, recordings: Iterable[Iterable[np.ndarray]], batch_size: int = 16
    ) -> Iterator[np.ndarray | AudioError]:
        """Probabilities of recordings, in their order.

        Args:
            recordings: each as float32 [samples] blocks at the model's rate, read when its turn comes.
            batch_size: windows that go through the model at once.

        Yields:
            float32 [classes] of each recording, or the error that its blocks raised.
        """
        waiting, batch = deque[_Mean](), list[tuple[_Mean, np.ndarray]]()
        for blocks in recordings:
            mean = _Mean()
            waiting.append(mean)
            try:
                for window in _windows(blocks, self.model.config.max_samples):
                    batch.append((mean, window))
                    mean.pending += 1
                    if len(batch) == batch_size:
                        self._run(batch)
                        batch = []
            except AudioError as error:
                mean.problem = error  # windows already batched are computed, and their mean is not used
            mean.is_read = True
            yield from self._complete(waiting)
        self._run(batch)
        yield from self._complete(waiting)

    def _complete(self, waiting: deque[_Mean]) -> Iterator[np.ndarray | AudioError]:
        """Results of the first recordings, as far as all their windows are done."""
        while waiting and waiting[0].is_read and not waiting[0].pending:
            mean = waiting.popleft()
            if mean.problem is None and not mean.samples:
                mean.problem = AudioError("holds no samples.")
            yield mean.problem or (np.asarray(mean.total) / mean.samples).astype(np.float32)

    @torch.inference_mode()
    def _run(self, batch: list[tuple[_Mean, np.ndarray]]) -> None:
        """Add the probabilities of windows, which go through the model together, to the means of their recordings."""
        if not batch:
            return
        waveforms, mask = padded([window for _, window in batch])
        # float64, so that means over many windows keep their precision.
        logits = self.model(waveforms.to(self.device), mask).logits.double()
        probabilities = (logits.sigmoid() if self.multi_label else logits.softmax(dim=1)).cpu().numpy()
        for (mean, window), values in zip(batch, probabilities, strict=True):
            mean.add(values, len(window))


def _noting_shorter(spans: Iterable[Span], shorter: list[Shorter]) -> Iterator[Span]:
    for span in spans:
        if span.shorter:
            shorter.append(span.shorter)
        yield span


def _windows(blocks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Adjacent windows of `length` samples, the last one as long as it is."""
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block]) if len(held) else block
        whole = len(held) - len(held) % length
        for start in range(0, whole, length):
            yield held[start : start + length]
        held = held[whole:]
    if len(held):
        yield held


def load_classifier(source: str | os.PathLike[str], device: str | torch.device | None = None) -> AudioClassifier:
    """Load a model made by `bestrq2 finetune`.

    Args:
        source: run folder of `bestrq2 finetune`, model folder of that kind, or hub id.
        device: device such as "cpu" or "cuda:0"; None for CUDA if available, else the CPU.

    Raises:
        CheckpointError: it is not a classifier, or its weights are damaged or of another architecture.
    """
    return AudioClassifier(load_classification(source), device)


def label_of(probabilities: np.ndarray, classes: Sequence[str], multi_label: bool, threshold: float = 0.5) -> str:
    """Label of a recording: its most probable class, or all classes at or above `threshold`, joined by ";"."""
    chosen = probabilities >= threshold if multi_label else np.arange(len(classes)) == probabilities.argmax()
    return SEPARATOR.join(name for name, one in zip(classes, chosen, strict=True) if one)
