"""Linear probe of the frozen benchmark soundworld-1: LayerNorm and a linear layer, trained by Adam.

It follows X-ARES (github.com/jimbozhang/xares) with every number fixed, so that published scores stay comparable. All
other probes use `classifiers.LinearProbe`, which converges and chooses its regularisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.errors import DataError


def adam_probe_predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, groups: np.ndarray | None = None, **settings: Any
) -> np.ndarray:
    """Predict classes, int [M], of embeddings float [M, D] by a probe fitted to float [N, D] and labels int [N].

    `groups` and the settings are those of `fit_adam_probe`. The lowest class of a tie is predicted.
    """
    names, targets = np.unique(labels, return_inverse=True)
    model = fit_adam_probe(train, targets, len(names), groups=groups, **settings)
    with _one_thread(), torch.inference_mode():
        logits = model(torch.from_numpy(np.asarray(test, dtype=np.float64)))
    return np.asarray(names[logits.argmax(dim=1).numpy()])


def fit_adam_probe(
    rows: np.ndarray,
    targets: np.ndarray,
    classes: int,
    *,
    groups: np.ndarray | None = None,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
) -> nn.Sequential:
    """Fit LayerNorm and a linear layer: cross-entropy, Adam, cosine decay to 0 over all steps.

    It runs in float64 on one thread and draws from its own generators, so that it gives the same weights whatever else
    runs in the process.

    Args:
        rows: embeddings as they are, float [N, D].
        targets: classes, int [N] in [0, classes).
        classes: number of classes.
        groups: clip of each row, int [N], for frame tasks: a batch then holds all frames of its clips, and all classes
            weigh the same. None if every row is a clip.
        epochs: number of passes over the clips.
        batch: clips per step; the last step of an epoch has the rest.
        lr: learning rate at the start.
        seed: random seed of the weights and of the order of clips.

    Raises:
        DataError: there are no rows, or rows and targets differ in number.
    """
    if len(rows) == 0 or len(rows) != len(targets):
        raise DataError(f"A linear probe needs as many rows as labels, at least one, but got {len(rows)}.")
    places = np.arange(len(rows)) if groups is None else groups
    steps = epochs * -(-len(np.unique(places)) // batch)
    order = torch.Generator().manual_seed(seed)
    with _one_thread(), torch.inference_mode(False), torch.enable_grad():
        clips = [torch.from_numpy(found) for found in _rows_of_clips(places)]
        inputs = torch.from_numpy(np.asarray(rows, dtype=np.float64))
        truth = torch.from_numpy(np.asarray(targets, dtype=np.int64))
        loss = nn.CrossEntropyLoss(None if groups is None else _even_weights(truth, classes))
        model = _model(inputs.shape[1], classes, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
        for _ in range(epochs):
            for drawn in torch.randperm(len(clips), generator=order).split(batch):
                chosen = torch.cat([clips[clip] for clip in drawn.tolist()])
                optimizer.zero_grad()
                loss(model(inputs[chosen]), truth[chosen]).backward()
                optimizer.step()
                decay.step()
    return model.eval()


def _model(width: int, classes: int, generator: torch.Generator) -> nn.Sequential:
    """LayerNorm and linear layer in float64; weights and biases uniform within 1/sqrt(width), PyTorch's default."""
    linear = nn.utils.skip_init(nn.Linear, width, classes, dtype=torch.float64)
    bound = 1 / math.sqrt(width)
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)
    return nn.Sequential(nn.LayerNorm(width, dtype=torch.float64), linear)


def _rows_of_clips(groups: np.ndarray) -> list[np.ndarray]:
    """Rows of every clip, int64 [rows of the clip], in the order of their numbers."""
    order = np.argsort(groups, kind="stable")
    _, starts = np.unique(groups[order], return_index=True)
    return np.split(order, starts[1:])


def _even_weights(targets: Tensor, classes: int) -> Tensor:
    """Weights, float64 [classes], under which every class counts the same over all rows; 0 for an absent class."""
    counts = torch.bincount(targets, minlength=classes).double()
    return torch.where(counts > 0, len(targets) / (classes * counts), 0.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one fixed order; the tensors here are too small to gain from more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
