"""Entry point of `bestrq2 probe`: a model on labelled audio or on a frozen benchmark, beside baselines."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestrq2.convert.loading import random_encoder
from bestrq2.convert.readout import set_readout
from bestrq2.data.audio import shorter_files
from bestrq2.data.labels import ClipAudio, LabelledTask, load_labelled
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.benchmark import Benchmark, benchmark_result, find_benchmark, run_benchmark
from bestrq2.evaluate.provenance import is_run_folder, model_name, model_provenance
from bestrq2.evaluate.readouts import compare_readouts, readout_parts
from bestrq2.evaluate.result import PROBE, Result, TaskScore, write_result
from bestrq2.evaluate.score_table import all_means, probe_parts
from bestrq2.evaluate.task_probe import FeatureExtractor, probe_features
from bestrq2.files import check_writable, disk_errors
from bestrq2.inference.embedder import Embedder, Embeddings, load
from bestrq2.inference.inputs import mono_blocks
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.log_mel import LogMel
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.readout import Layers
from bestrq2.text import counted

logger = logging.getLogger(__name__)

PROBES = "probes"
"""Folder of a run with the results on labels of one's own."""
RANDOM_ENCODER, LOG_MEL = "random encoder", "log-mel statistics"
"""Names of baselines in results; a model of one of these names could not be told from the baseline."""


def run_probe(
    model: str | os.PathLike[str],
    labelled: str | os.PathLike[str],
    baselines: bool = True,
    output: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    layers: Layers | None = None,
    frequency: str | None = None,
    pooling: str | None = None,
) -> Result:
    """Probe a model on labelled audio or on a frozen benchmark; see `bestrq2.probe` for the arguments.

    The result is written to `output`, and, unless options choose a readout, also into a run folder: that of a frozen
    benchmark as NAME.json, others as probes/NAME.json, where a later probe of the same labels replaces it.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    labelled = os.fspath(labelled)
    benchmark = find_benchmark(labelled)
    files = [] if output is None else [Path(output)]
    options: dict[str, Any] = {"layers": layers, "frequency": frequency, "pooling": pooling}
    kept = is_run_folder(model) and not any(value is not None for value in options.values())
    if benchmark is not None:
        _check_frozen(benchmark, seed)
        if kept:
            files.insert(0, Path(model) / f"{benchmark.name}.json")
    elif kept:
        files.insert(0, kept_result(Path(model), labelled))
        with disk_errors(files[0]):
            files[0].parent.mkdir(exist_ok=True)
    for file in files:
        check_writable(file)
    embedder = _load_named(model, device)
    set_readout(embedder.model, **options)
    # read before scoring: a run folder may change while the probes run
    provenance = model_provenance(model, embedder.config, ["bestrq2 probe", os.fspath(model), labelled])
    provenance["readout"] = embedder.model.readout.settings()
    embedder.name += "".join(f", {name} {value}" for name, value in options.items() if value is not None)
    features: list[FeatureExtractor] = [embedder]
    if baselines:
        features += [random_twin(embedder), LogMelStatistics()]
    if benchmark is not None:
        result = benchmark_result(benchmark, embedder.name, run_benchmark(features, benchmark), provenance)
    else:
        with shorter_files() as shorter:
            tasks = load_labelled(labelled, seed=seed)
            scores = probe_all(features, tasks, seed)
        provenance["protocol"] = {"labelled": labelled, "seed": seed, "clips": fingerprint(tasks)}
        if shorter:
            every = sorted(set(shorter))
            provenance["shorter_than_announced"] = [one._asdict() for one in every]
            first = f"{every[0].path} ({every[0].announced:.2f} s announced, {every[0].found:.2f} s found)"
            logger.warning("%s shorter than announced, the first: %s", counted(len(every), "recording"), first)
        result = Result(PROBE, embedder.name, tuple(scores), {}, provenance)
    for file in files:
        with disk_errors(file):
            write_result(file, result, all_means(result.scores))
        logger.info("%s: result of %s", file, result.benchmark)
    return replace(result, parts=probe_parts)


def run_readouts(
    model: str | os.PathLike[str],
    labelled: str | os.PathLike[str],
    output: Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Result:
    """Find the readout of a model that serves labelled audio best; see `bestrq2.probe`, and `compare_readouts`.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    labelled = os.fspath(labelled)
    benchmark = find_benchmark(labelled)
    if benchmark is not None:
        _check_frozen(benchmark, seed)
    if output is not None:
        check_writable(output)
    embedder = _load_named(model, device)
    provenance = model_provenance(model, embedder.config, ["bestrq2 probe", os.fspath(model), labelled, "--readouts"])
    if benchmark is None:
        tasks = load_labelled(labelled, seed=seed)
        provenance["protocol"] = {"labelled": labelled, "seed": seed, "clips": fingerprint(tasks)}
    else:
        tasks = benchmark.choosing_tasks(progress=True)
        provenance["protocol"] = {"labelled": labelled} | benchmark.protocol()
    scores, found = compare_readouts(embedder, tasks, seed)
    result = Result(PROBE, embedder.name, tuple(scores), {}, provenance | found, readout_parts)
    if output is not None:
        with disk_errors(output):
            write_result(output, result, all_means(result.scores))
    return result


def _check_frozen(benchmark: Benchmark, seed: int) -> None:
    """Raise an error unless a benchmark can be run as it was frozen."""
    if seed != 0:
        raise ConfigError(f"seed is {seed}, but {benchmark.name} is frozen with seeds of its own; leave it out")
    benchmark.check()


def _load_named(model: str | os.PathLike[str], device: str | None) -> Embedder:
    """Load an embedder named after the model's folder, since every run folder would otherwise be called "run"."""
    embedder = load(model, device)
    if Path(model).is_dir():
        embedder.name = model_name(model)
    if embedder.name in (RANDOM_ENCODER, LOG_MEL):
        raise DataError(f"{model}: {embedder.name!r} is the name of a baseline in results; rename the model's folder")
    return embedder


def kept_result(run: Path, labelled: str) -> Path:
    """File of a run folder for the result on labels of one's own: probes/NAME-HASH.json, by their place."""
    place = os.path.abspath(labelled) if os.path.exists(labelled) else labelled
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(place) or place)
    return run / PROBES / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"


def fingerprint(tasks: Sequence[LabelledTask]) -> str:
    """Identity of labelled clips and their splits, as a hash of names and labels, whatever folder they are in.

    Clips in memory are identified by their samples. A file changed under the same name is not noticed.
    """
    found = hashlib.sha256()
    for task in tasks:
        found.update(repr((task.name, task.kind, task.classes)).encode())
        for split in (task.train, task.test):
            if split.source is None:
                names = [hashlib.sha256(np.asarray(clip).tobytes()).hexdigest() for clip in split.audio]
            else:
                names = ["/".join(name.replace("\\", "/").split("/")[-2:]) for name in split.source.names()]
            for name, label in zip(names, split.labels, strict=True):
                found.update(repr((name, np.asarray(label).tolist())).encode())
            found.update(b"|")
    return found.hexdigest()[:16]


def probe_all(features: Sequence[FeatureExtractor], tasks: Sequence[LabelledTask], seed: int = 0) -> list[TaskScore]:
    """Probe several kinds of features on the same tasks; see `probe_features`."""
    return [score for one in features for score in probe_features(one, tasks, seed=seed)]


# --- baselines ---


def random_twin(embedder: Embedder) -> Embedder:
    """The same architecture with random weights from seed 0; input statistics are kept, as they are not learned."""
    twin: BestRQ2Model = random_encoder(embedder.config, 0)
    twin.statistics.load_state_dict(embedder.model.statistics.state_dict())
    return Embedder(twin, embedder.device, name=RANDOM_ENCODER)


class LogMelStatistics:
    """Frames of the paper's log-mel spectrogram in dB, one each 39 ms, as a baseline that learns nothing.

    Probes give it the same statistics over time as any encoder. Clips are never padded, so results do not depend on the
    batch.

    Attributes:
        name: name of the features in tables.
    """

    name = LOG_MEL

    def __init__(self) -> None:
        self._config = BestRQ2Config()
        self._log_mel = LogMel(self._config)

    def embed(self, audio: list[ClipAudio], sampling_rate: int | None = None) -> Embeddings:
        """Compute the features of clips.

        Args:
            audio: waveforms [samples] or [channels, samples] at `sampling_rate`, or files.
            sampling_rate: sampling rate of the waveforms in Hz; None for 16 000.

        Returns:
            `Embeddings` with D = 128: a frame has the level of each mel band, a clip their means.

        Raises:
            AudioError: a clip cannot be decoded, is empty, or holds NaN or infinity.
        """
        spectrograms = [self._spectrogram(one, sampling_rate) for one in audio]
        counts = np.array([len(one) for one in spectrograms], dtype=np.int64)
        frames = np.zeros((len(audio), max(counts, default=0), self._config.num_mel_bands), dtype=np.float32)
        mask = np.arange(frames.shape[1]) < counts[:, None]
        for row, spectrogram in enumerate(spectrograms):
            frames[row, : len(spectrogram)] = spectrogram
        clip = np.array([one.mean(axis=0) for one in spectrograms], dtype=np.float32)
        seconds = self._config.hop_length / self._config.sampling_rate
        timestamps = np.where(mask, np.arange(frames.shape[1]) * seconds, np.nan)
        return Embeddings(clip.reshape(len(audio), -1), frames, mask, timestamps)

    def _spectrogram(self, audio: ClipAudio, sampling_rate: int | None) -> np.ndarray:
        """Log-mel spectrogram of one clip, float64 [frames, bands]."""
        rate = self._config.sampling_rate
        name = "audio" if isinstance(audio, np.ndarray) else str(audio)
        waveform = np.concatenate(list(mono_blocks(name, audio, sampling_rate or rate, rate)))
        with torch.inference_mode():
            log_mel, _ = self._log_mel(torch.from_numpy(waveform)[None])
        return log_mel[0].T.double().numpy()
