"""Classes of recordings of any length, by a fine-tuned encoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bestrq2.convert.weights import load_model_folder
from bestrq2.data.audio import read_span
from bestrq2.data.loader import worker_settings
from bestrq2.data.sources import Source
from bestrq2.errors import AudioError, CheckpointError
from bestrq2.model.modeling_bestrq2 import MULTI, BestRQ2ForAudioClassification


@dataclass(frozen=True)
class _Window:
    """A stretch of a recording; the last one of each says so. A rejected recording has a reason and no samples."""

    recording: int
    waveform: np.ndarray
    last: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one recording.

    Attributes:
        recording: its number in the source.
        probabilities: float32 [classes], summing to 1 where a recording has one class; empty if it was rejected.
        reason: why it was rejected; "" if it was not.
    """

    recording: int
    probabilities: np.ndarray
    reason: str = ""


class AudioClassifier:
    """Names the classes of recordings.

    A recording longer than the model's `max_seconds` is cut into windows of that length, one behind the other; its
    probabilities are the mean of theirs, weighted by their lengths.

    Args:
        model: it is put into evaluation mode.
        device: where it runs; None for CUDA where there is one, else the CPU.
    """

    def __init__(self, model: BestRQ2ForAudioClassification, device: str | torch.device | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""
        return tuple(self.model.config.id2label[number] for number in range(self.model.config.num_labels))

    @property
    def multi_label(self) -> bool:
        """Whether a recording may have any number of classes."""
        return bool(self.model.config.problem_type == MULTI)

    def predict(self, source: Source, batch_size: int = 16, num_workers: int = 0) -> Iterator[Prediction]:
        """Predict every recording of a source, in its order; those that cannot be read come with the reason.

        Args:
            source: recordings.
            batch_size: windows that go through the model at once; it changes nothing but rounding.
            num_workers: processes that decode; 0 decodes in this one.
        """
        config = self.model.config
        dataset = _Windows(source, config.sampling_rate, config.max_samples)
        loader = DataLoader(dataset, batch_size, collate_fn=list, **worker_settings(num_workers))
        sums: dict[int, np.ndarray] = {}
        samples: dict[int, int] = {}
        ready: dict[int, Prediction] = {}
        following = 0
        for batch in loader:
            heard = [window for window in batch if not window.reason]
            for window, probabilities in zip(heard, self._probabilities(heard), strict=True):
                number, size = window.recording, len(window.waveform)
                sums[number] = sums.get(number, 0) + size * probabilities
                samples[number] = samples.get(number, 0) + size
            for window in batch:
                if window.last:
                    total, count = sums.pop(window.recording, np.zeros(0)), samples.pop(window.recording, 1)
                    mean = np.zeros(0) if window.reason else total / count
                    ready[window.recording] = Prediction(window.recording, mean.astype(np.float32), window.reason)
            while following in ready:
                yield ready.pop(following)
                following += 1

    @torch.inference_mode()
    def _probabilities(self, windows: Sequence[_Window]) -> np.ndarray:
        """float64 [windows, classes]."""
        if not windows:
            return np.zeros((0, self.model.config.num_labels))
        lengths = torch.tensor([len(window.waveform) for window in windows])
        padded = np.zeros((len(windows), int(lengths.max())), np.float32)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window.waveform)] = window.waveform
        mask = None
        if len(set(lengths.tolist())) > 1:
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
        logits = self.model(torch.from_numpy(padded).to(self.device), mask).logits.double()
        return (logits.sigmoid() if self.multi_label else logits.softmax(dim=1)).cpu().numpy()


class _Windows(IterableDataset[_Window]):
    """The windows of all recordings of a source; workers take turns."""

    def __init__(self, source: Source, sampling_rate: int, samples: int) -> None:
        self.source, self.sampling_rate, self.samples = source, sampling_rate, samples

    def __iter__(self) -> Iterator[_Window]:
        worker = get_worker_info()
        mine: Iterable[int] = range(len(self.source))
        if worker is not None:
            mine = range(worker.id, len(self.source), worker.num_workers)
        for recording in mine:
            yield from self._of(recording)

    def _of(self, recording: int) -> Iterator[_Window]:
        """One window after the other, so that a long recording takes no more memory than a short one."""
        start, held = 0, np.zeros(0, np.float32)
        try:
            with self.source.opened(recording) as decoder:
                while True:
                    following = read_span(decoder, start, self.samples, self.sampling_rate)
                    if not len(following):
                        break
                    if len(held):
                        yield _Window(recording, held)
                    start, held = start + len(following), following
                    if len(held) < self.samples:
                        break
            if not len(held):
                raise AudioError("holds no samples.")
        except AudioError as error:
            reason = str(error).removeprefix(f"{self.source.describe(recording)}: ")
            yield _Window(recording, held[:0], last=True, reason=reason)
            return
        yield _Window(recording, held, last=True)


def load_classifier(source: str | os.PathLike[str], device: str | torch.device | None = None) -> AudioClassifier:
    """Load what `bestrq2 finetune` made.

    Args:
        source: run folder of `bestrq2 finetune`, a model folder of its kind, or a hub id.
        device: such as "cpu" or "cuda:0"; None for CUDA where there is one, else the CPU.

    Raises:
        CheckpointError: if it is no classifier, or the weights are damaged or of another architecture.
    """
    path, name = Path(source), os.fspath(source)
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise CheckpointError(f"{name}: there is no such folder; name a run of `bestrq2 finetune`")
    folder: str | Path = name
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
    return AudioClassifier(load_model_folder(folder, BestRQ2ForAudioClassification), device)
