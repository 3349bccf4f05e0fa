"""Seconds of audio trained per second of wall time: packed rows, and one clip in each row as in earlier versions.

    python benchmarks/packing.py
    python benchmarks/packing.py --data recordings/

Without --data on generated clips: of 0.5 to 2.5 s with one in twenty of 10 s, relative to clips of 10 s. With --data on
a corpus, with segments of up to 4 and 10 s, relative to one crop of each recording, padded to the longest of its batch.
A step is loading, forward, backward and AdamW of a recipe. Steps of all kinds alternate, so that other work on the
machine slows all of them down alike; the figures are medians over the rounds. The last column counts the audio in whole
patches only, without the rest of up to one patch at the end of each clip.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bestrq2.data.audio import AudioError
from bestrq2.data.loader import training_batches, training_rows
from bestrq2.data.open_source import open_source
from bestrq2.data.order import EpochOrder
from bestrq2.data.sources import ArraySource, Source
from bestrq2.data.waveforms import to_float32
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.train.objective import MaskDrawer, PretrainingTask, model_config
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig, PretrainConfig, resolve

RATE = 16_000
Step = Callable[[], tuple[float, float, float]]
"""Takes a training step; gives its audio (s), its audio in whole patches (s), and the share of patches with audio."""


def generated(seconds: np.ndarray, name: str) -> ArraySource:
    """Noise with a tremolo, one clip of each duration."""
    rng = np.random.default_rng(0)
    clips = []
    for duration in seconds:
        time_axis = np.arange(round(duration * RATE)) / RATE
        tremolo = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 8) * time_axis)
        clips.append((0.1 * tremolo * rng.standard_normal(len(time_axis))).astype(np.float32))
    return ArraySource(clips, RATE, name)


class Trainer:
    """A model, and steps of several kinds that train it.

    Args:
        settings: recipe and its settings.
    """

    def __init__(self, settings: PretrainConfig) -> None:
        torch.manual_seed(0)
        self.settings, self.config = settings, model_config(settings.model)
        self.task = PretrainingTask(BestRQ2ForPreTraining(self.config), 0)
        self.task.train_mode()
        self.optimizer = make_optimizer(self.task.model, OptimizerConfig(), "32-true")

    def packed(self, source: Source) -> tuple[str, Step]:
        """Steps on packed rows, and how full these are."""
        rows, number = training_rows(source, self.config, 0), self.settings.step_rows
        draw = MaskDrawer(self.config, 0, 1, number)
        batches = iter(training_batches(source, rows, self.config, seed=0, batch_rows=number, draw_mask=draw))

        def step() -> tuple[float, float, float]:
            batch = next(batches)
            output = self.task(self.task.inputs(batch, torch.device("cpu")))
            self._learn(output["loss"] / output["terms"])
            taken = batch.packing.segments != 0
            return int(batch.lengths.sum()) / RATE, self._duration(int(taken.sum())), float(taken.float().mean())

        fill = "unknown" if rows.fill is None else f"{rows.fill:.1%}"
        return f"{len(rows):,} rows, fill {fill}", step

    def one_per_row(self, source: Source) -> Step:
        """Steps on one random crop of each recording, padded to the longest in the batch."""
        crops = self._crops(source)

        def step() -> tuple[float, float, float]:
            clips = list(itertools.islice(crops, self.settings.step_rows))
            lengths = torch.tensor([len(clip) for clip in clips])
            values = torch.zeros(len(clips), int(lengths.max()))
            for row, clip in zip(values, clips, strict=True):
                row[: len(clip)] = torch.from_numpy(clip)
            columns = [self.config.columns(len(clip)) for clip in clips]
            mask = draw_hidden_mask(self.config, columns, 0, 0, range(len(clips)))
            same = bool((lengths == values.shape[1]).all())
            output = self.task.model(values, hidden_mask=mask, lengths=None if same else lengths, output_logits=False)
            self._learn(output.loss)
            share = sum(columns) / (len(clips) * max(columns))
            return int(lengths.sum()) / RATE, self._duration(sum(columns)), share

        return step

    def _duration(self, columns: int) -> float:
        return columns * self.config.frame_hop_samples / RATE

    def _crops(self, source: Source) -> Iterator[np.ndarray]:
        order = EpochOrder(len(source), 0)
        for number in itertools.count():
            epoch, index = order(number)
            try:
                crop = source.read(index, RATE, np.random.default_rng((epoch, index)), self.config.max_seconds)
            except AudioError:
                continue
            if len(crop) >= self.config.min_training_samples:
                yield to_float32(crop)

    def _learn(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grads_with_norm_(list(self.task.parameters()), 1.0, torch.tensor(1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(steps: dict[str, Step], rounds: int, reference: str) -> None:
    """Take steps of all kinds in turn, after a first round to warm up, and print a line for each kind."""
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            seconds, whole, share = step()
            elapsed = time.perf_counter() - began
            if number:
                figures[name].append((seconds / elapsed, whole / elapsed, share))
    medians = {name: np.median(rows, axis=0) for name, rows in figures.items()}
    for name, (speed, whole, share) in medians.items():
        ratios = f"{speed / medians[reference][0]:.2f} x, {whole / medians[reference][1]:.2f} x"
        print(f"{name:<22} {speed:>7.1f} s of audio/s, {share:>4.0%} of the batch audio, {ratios}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best-rq-2-tiny")
    parser.add_argument("--data", help="corpus to measure on in place of generated clips")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def trainer(max_seconds: float) -> Trainer:
        loader = {"batch_seconds": arguments.rows * max_seconds}
        model = {"max_seconds": max_seconds}
        given = {"recipe": arguments.recipe, "data": "none", "output": "none", "loader": loader, "model": model}
        return Trainer(resolve(given))

    if arguments.data is None:
        ten = trainer(10.0)
        durations = np.random.default_rng(1).uniform(0.5, 2.5, 3000)
        durations[::20] = 10.0
        uneven, even = generated(durations, "uneven"), generated(np.full(200, 10.0), "even")
        filled, packed = ten.packed(uneven)
        print(f"clips of 0.5 to 2.5 s, one in twenty of 10 s: {filled}")
        steps = {"clips of 10 s": ten.packed(even)[1], "the same, padded": ten.one_per_row(even)}
        steps |= {"uneven clips, packed": packed, "uneven clips, padded": ten.one_per_row(uneven)}
        measure(steps, arguments.rounds, "clips of 10 s")
        return
    source = open_source(arguments.data)
    for seconds in (4.0, 10.0):
        one = trainer(seconds)
        filled, packed = one.packed(source)
        print(f"{arguments.data}, segments of up to {seconds:g} s: {filled}")
        measure({"padded": one.one_per_row(source), "packed": packed}, arguments.rounds, "padded")


if __name__ == "__main__":
    main()
