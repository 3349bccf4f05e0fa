"""Cost and accuracy of an encoder on one core, as on a phone: ONNX with weights of 32 and of 8 bits.

    python examples/onnx_on_one_core.py [MODEL]              # the encoder of the package by default

For each of the two graphs the table has
- its size, and how many seconds of audio it embeds in a second of one core, from waveforms in memory to numpy arrays,
  and without the spectrogram;
- the cosine between its embeddings of test clips and those of 32 bits, mean and minimum;
- the accuracy of a linear probe of them on a task of SoundWorld, and its change, with a 95 % interval over the clips.

Needs `pip install 'bestrq2[onnx]'`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bestrq2.convert import numpy_front_end
from bestrq2.convert.onnx import INT8_FILE, MODEL_FILE, export_onnx
from bestrq2.data.labels import LabelledTask, soundworld_tasks
from bestrq2.evaluate.classifiers import LinearProbe
from bestrq2.soundworld import TASKS

GRAPHS = {"float32": MODEL_FILE, "int8": INT8_FILE}


def open_on_one_core(graph: Path) -> Any:
    """Session of a graph that computes on one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def embed(session: Any, clips: Sequence[Any]) -> np.ndarray:
    """Clip embeddings of waveforms at 16 kHz, float32 [clips, D]."""
    front_end = numpy_front_end.FrontEnd.of(session)
    return np.stack([numpy_front_end.embed(session, np.asarray(clip), 16_000, front_end)[0] for clip in clips])


def times_real_time(session: Any, seconds: float) -> tuple[float, float]:
    """Seconds of audio embedded per second of processor time: with the spectrogram, and by the encoder alone."""
    front_end = numpy_front_end.FrontEnd.of(session)
    rate = front_end.sampling_rate
    audio = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * rate), dtype=np.float32)
    spectrograms = [front_end.log_mel(window) for _, window, _ in front_end.windows(audio, overlap=0)]

    def speed(call: Callable[[], object]) -> float:
        took = []
        for _ in range(6):
            start = time.process_time()  # unlike the wall clock, the same on a busy machine
            call()
            took.append(time.process_time() - start)
        return seconds / statistics.median(took[1:])  # the first call allocates

    return (
        speed(lambda: numpy_front_end.embed(session, audio, rate, front_end, overlap=0)),
        speed(lambda: [numpy_front_end.encode(session, [one]) for one in spectrograms]),
    )


def probed(session: Any, task: LabelledTask) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the test clips, and whether a linear probe classifies each correctly."""
    train, test = (embed(session, split.audio[:]) for split in (task.train, task.test))
    return test, LinearProbe(train, np.asarray(task.train.labels)).predict(test) == task.test.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="bestrq2-tiny", help="model as in `bestrq2.load`")
    clip_tasks = [name for name, task in TASKS.items() if task.kind == "clip"]
    parser.add_argument("--task", default="environment/event", choices=clip_tasks, metavar="TASK")
    parser.add_argument("--train", type=int, default=400, help="training clips")
    parser.add_argument("--test", type=int, default=400, help="test clips")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the recording that is timed")
    arguments = parser.parse_args()
    logging.getLogger("bestrq2").setLevel(logging.WARNING)
    (task,) = soundworld_tasks([arguments.task], arguments.train, arguments.test)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(arguments.model, Path(folder) / "exported", int8=True)
        sessions = {name: open_on_one_core(exported / file) for name, file in GRAPHS.items()}
        sizes = {name: (exported / file).stat().st_size / 1e6 for name, file in GRAPHS.items()}
    print(f"{arguments.model} on one core, {arguments.task} with {arguments.train} and {arguments.test} clips\n")
    print("| | MB | times real time | encoder alone | cosine, mean | minimum | probe (%) | change (points) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    full: tuple[np.ndarray, np.ndarray] | None = None
    for name, session in sessions.items():
        speed, alone = times_real_time(session, arguments.seconds)
        vectors, right = probed(session, task)
        full = full or (vectors, right)
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(full[0], axis=1)
        cosine = (vectors * full[0]).sum(axis=1) / norms
        gains = 100 * (right.astype(float) - full[1])
        gain, half = gains.mean(), 1.96 * gains.std(ddof=1) / len(gains) ** 0.5
        cells = [
            f"{sizes[name]:.1f} | {speed:.0f} | {alone:.0f} | {cosine.mean():.6f} | {cosine.min():.6f}",
            f"{100 * right.mean():.1f} | {gain:+.1f} [{gain - half:+.1f}, {gain + half:+.1f}]",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
