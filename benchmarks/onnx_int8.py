"""Speed and accuracy of an encoder exported to ONNX, with weights of 32 and of 8 bits.

    python benchmarks/onnx_int8.py runs/mine

Speed: 16 clips of `max_seconds`, from waveforms in memory to numpy arrays, and the encoder alone from the log-mel
spectrogram on. Cosine: similarity to the clip embeddings of torch on the test clips, mean and minimum. Probe: the
linear probe of `bestrq2 probe` on the tasks of soundworld-2, mean accuracy over the tasks; the difference to torch
has a 95 % interval from a bootstrap over test clips, paired, with every task keeping its number of clips.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from machine import seconds_per_call

import bestrq2
from bestrq2.convert import numpy_front_end
from bestrq2.convert.onnx import INT8_FILE, MODEL_FILE, SpectrogramEncoder, export_onnx
from bestrq2.data.labels import LabelledTask, soundworld_tasks
from bestrq2.evaluate.benchmark import SOUNDWORLD_2
from bestrq2.evaluate.classifiers import LinearProbe
from bestrq2.evaluate.intervals import hierarchical_interval
from bestrq2.evaluate.task_probe import FeatureExtractor, embed_split
from bestrq2.inference.embedder import Embeddings

TASKS = list(SOUNDWORLD_2.tasks)
FILES = {"ONNX float32": MODEL_FILE, "ONNX int8": INT8_FILE}
SPEED_CLIPS = 16


class OnnxEmbedder:
    """Features of an exported graph, with the interface that probes use."""

    def __init__(self, name: str, graph: Path) -> None:
        self.name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.front_end = numpy_front_end.FrontEnd.of(self.session)

    def embed(self, audio: list[np.ndarray | Path], sampling_rate: int | None = None) -> Embeddings:
        """Waveforms of one length, at most `max_seconds`, at the encoder's rate."""
        states = np.stack(numpy_front_end.encode(self.session, [self.front_end.log_mel(clip) for clip in audio]))
        seconds = np.tile((np.arange(states.shape[1]) + 0.5) * self.front_end.hop_seconds, (len(states), 1))
        return Embeddings(states.mean(axis=1), states, np.ones(states.shape[:2], bool), seconds)


def probed(features: FeatureExtractor, tasks: list[LabelledTask]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Embeddings of all test clips, and per task whether the linear probe classifies each correctly."""
    embeddings, right = [], []
    for task in tasks:
        train, test = (embed_split(features, task, split, progress=True) for split in ("train", "test"))
        embeddings.append(test.features)
        right.append(LinearProbe(train.features, train.labels).predict(test.features) == test.labels)
    return np.concatenate(embeddings), right


def difference(right: list[np.ndarray], baseline: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean over tasks of accuracy above the baseline's, with its interval."""
    gains = [one.astype(float)[None] - other for one, other in zip(right, baseline, strict=True)]
    found = hierarchical_interval([gains], np.full(len(gains), 1 / len(gains)))
    return found.estimate, found.estimate - found.half_width, found.estimate + found.half_width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, exported folder, checkpoint or recipe")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK")
    parser.add_argument("--train", type=int, default=SOUNDWORLD_2.train, help="training clips per task")
    parser.add_argument("--test", type=int, default=SOUNDWORLD_2.test, help="test clips per task")
    arguments = parser.parse_args()
    logging.getLogger("bestrq2").setLevel(logging.WARNING)
    tasks = soundworld_tasks(arguments.tasks, arguments.train, arguments.test)
    embedder = bestrq2.load(arguments.model, "cpu")
    config, device = embedder.config, torch.device("cpu")
    audio = list(0.1 * np.random.default_rng(0).standard_normal((SPEED_CLIPS, config.max_samples), dtype=np.float32))
    encoder = SpectrogramEncoder(embedder.model)
    log_mel, frames = (part.detach() for part in embedder.model.log_mel(torch.from_numpy(np.stack(audio))))
    inputs = {"log_mel": log_mel.numpy(), "frames_per_clip": frames.numpy()}

    @torch.inference_mode()
    def in_torch() -> object:
        return encoder(log_mel, frames)

    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(arguments.model, Path(folder) / "exported", int8=True)
        graphs = {name: OnnxEmbedder(name, exported / file) for name, file in FILES.items()}
        sizes = {name: (exported / file).stat().st_size / 1e6 for name, file in FILES.items()}
    rows: list[tuple[FeatureExtractor, Callable[[], object]]] = [(embedder, in_torch)]
    rows += [(one, lambda one=one: one.session.run(None, inputs)) for one in graphs.values()]
    embedder.name = "torch float32"
    sizes[embedder.name] = sum(value.numel() * 4 for value in embedder.model.state_dict().values()) / 1e6
    print(f"{len(tasks)} tasks, {arguments.train} training and {arguments.test} test clips each")
    print(f"{torch.get_num_threads()} threads, clips of {config.max_seconds:g} s\n")
    print("| | MB | audio s/s, whole way | encoder alone | cosine, mean | least | probe (%) | above torch (points) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    yardstick: tuple[np.ndarray, list[np.ndarray]] | None = None
    for features, alone in rows:
        speeds = [
            SPEED_CLIPS * config.max_seconds / seconds_per_call(call, device)
            for call in (lambda features=features: features.embed(audio), alone)
        ]
        embeddings, right = probed(features, tasks)
        yardstick = yardstick or (embeddings, right)
        norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(yardstick[0], axis=1)
        cosine = (embeddings * yardstick[0]).sum(axis=1) / norms
        gain, low, high = (100 * value for value in difference(right, yardstick[1]))
        score = 100 * np.mean([one.mean() for one in right])
        print(
            f"| {features.name} | {sizes[features.name]:.1f} | {speeds[0]:.0f} | {speeds[1]:.0f} | {cosine.mean():.6f} "
            f"| {cosine.min():.6f} | {score:.2f} | {gain:+.2f} [{low:+.2f}, {high:+.2f}] |",
            flush=True,
        )


if __name__ == "__main__":
    main()
