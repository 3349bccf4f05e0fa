"""Supervised scores of an architecture on soundworld-1; with many labels, an upper bound.

    python benchmarks/supervised_bound.py --recipe best-rq-2-tiny --output supervised.json

One encoder with random weights learns all 14 tasks at once. Every task has a head (LayerNorm and Linear) on the mean
over frames (on each frame for the frame task). A step takes some clips of every task; the cross-entropies are averaged
over the tasks. The predictions of the heads on the benchmark's test clips are scored by the benchmark's metrics and
written as a result file with one row, "supervised": method "linear" is the heads, "knn" is k-NN on the trained encoder.
Test clips are not used for any choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bestrq2 import BestRQ2Config, BestRQ2Model, recipe
from bestrq2.convert.loading import random_encoder
from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.data.prepare.summary import BandSums
from bestrq2.errors import BestRQ2Error
from bestrq2.evaluate.benchmark import (
    SOUNDWORLD_1,
    benchmark_result,
    benchmark_tasks,
    run_benchmark,
    score_on_benchmark,
)
from bestrq2.evaluate.provenance import software_provenance
from bestrq2.evaluate.result import TaskScore, write_result
from bestrq2.evaluate.score_table import format_scores
from bestrq2.evaluate.task_probe import embed_split, event_present
from bestrq2.files import check_writable
from bestrq2.inference.embedder import Embedder
from bestrq2.train.optimizer import learning_rate_factor, make_optimizer
from bestrq2.train.settings import OptimizerConfig

NAME = "supervised"
WEIGHT_DECAY, WARMUP_FRACTION, GRADIENT_NORM = 0.05, 0.1, 1.0


class SupervisedEncoder(nn.Module):
    """An encoder with a head for every task."""

    def __init__(self, encoder: BestRQ2Model, tasks: list[LabelledTask], seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(seed)
        width = encoder.config.hidden_size
        self.heads = nn.ModuleDict(
            {task.name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(task.classes))) for task in tasks}
        )

    def forward(self, waveforms: Tensor, task: LabelledTask) -> Tensor:
        """Waveforms [B, S] of equal length to logits [B, C], or [B * T, C] for the frame task."""
        output = self.encoder(waveforms)
        if task.kind == "clip":
            return self.heads[task.name](output.pooler_output)
        return self.heads[task.name](output.last_hidden_state.flatten(0, 1))


def waveforms(clips: LabelledClips, places: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([clips.audio[place] for place in places]))


def frame_labels(clips: LabelledClips, places: np.ndarray, config: BestRQ2Config) -> np.ndarray:
    """Whether an event covers the centre of each frame, int64 [clips * T]."""
    frames = config.columns(len(np.asarray(clips.audio[0])))
    moments = (np.arange(frames) + 0.5) * config.frame_hop_samples / config.sampling_rate
    return np.concatenate([event_present(moments, clips.labels[place]) for place in places])


def set_statistics(encoder: BestRQ2Model, tasks: list[LabelledTask], clips: int, order: np.random.Generator) -> None:
    """Set mean and standard deviation per mel band from training clips of all tasks in equal numbers."""
    sums, each = BandSums(encoder.config.num_mel_bands), -(-clips // len(tasks))
    for task in tasks:
        places = order.permutation(len(task.train))[:each]
        sums.add(*encoder.log_mel(waveforms(task.train, places), None))
    encoder.set_statistics(*sums.statistics())


def batches(tasks: list[LabelledTask], batch: int, order: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """One epoch: for every step, the indices of some training clips of each task."""
    shuffled = {task.name: order.permutation(len(task.train)) for task in tasks}
    for first in range(0, len(tasks[0].train), batch):
        yield {name: places[first : first + batch] for name, places in shuffled.items()}


def train(
    model: SupervisedEncoder,
    tasks: list[LabelledTask],
    epochs: int,
    batch: int,
    lr: float,
    device: torch.device,
    order: np.random.Generator,
) -> None:
    """Train with AdamW, linear warm-up and cosine decay to 0, and gradients clipped to norm 1."""
    config = model.encoder.config
    settings = OptimizerConfig(lr=lr, weight_decay=WEIGHT_DECAY, warmup_fraction=WARMUP_FRACTION, final_lr_ratio=0.0)
    optimizer = make_optimizer(model, settings, "32-true")
    steps = epochs * -(-len(tasks[0].train) // batch)
    weights = {}
    for task in tasks:
        if task.kind == "frame":  # balanced accuracy is scored
            counts = np.bincount(frame_labels(task.train, np.arange(len(task.train)), config), minlength=2)
            weights[task.name] = torch.tensor(counts.sum() / (2 * np.maximum(counts, 1)), dtype=torch.float32).to(
                device
            )
    model.train().to(device)
    with tqdm(total=steps, desc=f"{NAME} encoder", unit="step") as bar:
        for _ in range(epochs):
            for drawn in batches(tasks, batch, order):
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate_factor(int(bar.n), steps, settings)
                optimizer.zero_grad()
                losses = []
                for task in tasks:
                    places = drawn[task.name]
                    frames = task.kind == "frame"
                    truth = frame_labels(task.train, places, config) if frames else task.train.labels[places]
                    logits = model(waveforms(task.train, places).to(device), task)
                    loss = cross_entropy(logits, torch.from_numpy(truth).to(device), weights.get(task.name))
                    (loss / len(tasks)).backward()
                    losses.append(loss.detach())
                nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
                optimizer.step()
                bar.set_postfix(loss=f"{torch.stack(losses).mean().item():.3f}", refresh=False)
                bar.update()


def scores_of(model: SupervisedEncoder, tasks: list[LabelledTask], device: torch.device) -> list[TaskScore]:
    """Predictions of the heads on the test clips, scored by the benchmark's metrics."""
    embedder, heads = Embedder(model.encoder, device, name=NAME), model.heads.cpu().eval()
    scores = [score for score in run_benchmark([embedder], SOUNDWORLD_1) if score.method == "knn"]
    for task in tasks:
        test = embed_split(embedder, task, "test", progress=True)
        with torch.inference_mode():
            answers = heads[task.name](torch.from_numpy(test.features)).argmax(dim=1).numpy()
        # the chance level is that of the benchmark's own training clips
        labels = np.asarray(task.train.labels[: SOUNDWORLD_1.train]) if task.kind == "clip" else np.zeros(0)
        scores.append(score_on_benchmark(NAME, task, "linear", labels, test, answers, SOUNDWORLD_1))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best-rq-2-tiny", help="recipe whose architecture is trained")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and order of clips")
    parser.add_argument("--clips", type=int, default=1600, help="labelled training clips per task")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training clips")
    parser.add_argument("--batch", type=int, default=8, help="clips of every task per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write the result to")
    options = parser.parse_args()
    for name in ("clips", "epochs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        check_writable(options.output)
        settings = recipe(options.recipe)
        tasks = benchmark_tasks(SOUNDWORLD_1, train=options.clips)
        encoder = random_encoder(BestRQ2Config(**settings["model"]), options.seed)
        order = np.random.default_rng(options.seed)
        if encoder.config.uses_dataset_statistics:
            set_statistics(encoder, tasks, settings.get("loader", {}).get("statistics_clips", 512), order)
        model = SupervisedEncoder(encoder, tasks, options.seed)
        device = torch.device(options.device)
        train(model, tasks, options.epochs, options.batch, options.lr, device, order)
        scores = scores_of(model, tasks, device)
        provenance = {
            "model": "benchmarks/supervised_bound.py",
            "recipe": options.recipe,
            "seed": options.seed,
            "clips": options.clips,
            "epochs": options.epochs,
            "batch": options.batch,
            "lr": options.lr,
            "objective": "supervised on the labels of all tasks",
            "encoder_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
            **software_provenance(),
        }
        write_result(options.output, benchmark_result(SOUNDWORLD_1, NAME, scores, provenance))
    except BestRQ2Error as error:
        raise SystemExit(f"supervised_bound: {error}") from error
    print(format_scores(scores))


if __name__ == "__main__":
    main()
