"""The two classifiers of X-ARES (github.com/jimbozhang/xares) on embeddings made before: a linear layer and k-NN.

Unlike those of `classifiers.py` nothing is chosen by validation: all numbers are given, so that scores of a frozen
benchmark stay comparable. Nothing here sees test labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.classifiers import knn_predict

EPOCHS = 10
BATCH_CLIPS = 32
LEARNING_RATE = 1e-3
SEED = 42


class LinearProbe(nn.Module):
    """LayerNorm and a linear layer: the probe's model in X-ARES, in float64.

    Args:
        width: D, values of an embedding.
        classes: C.
        generator: draws weights and biases uniformly within 1/sqrt(D), PyTorch's default; None uses the global one.
    """

    def __init__(self, width: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.linear = nn.utils.skip_init(nn.Linear, width, classes, dtype=torch.float64)
        bound = 1 / math.sqrt(width)
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound, generator=generator)
            self.linear.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings float64 [N, D] to logits float64 [N, C]."""
        return torch.as_tensor(self.linear(self.norm(rows)))


def fit_linear_probe(
    rows: np.ndarray,
    targets: np.ndarray,
    *,
    classes: int,
    groups: np.ndarray | None = None,
    epochs: int = EPOCHS,
    batch: int = BATCH_CLIPS,
    lr: float = LEARNING_RATE,
    seed: int = SEED,
) -> LinearProbe:
    """Fit a linear probe as X-ARES does: cross-entropy, Adam, cosine decay to 0 over all steps.

    It runs in float64 on one thread, draws from its own generators, and so gives the same weights whatever else goes on
    in the process.

    Args:
        rows: float [N, D], embeddings as they are.
        targets: int [N], each in [0, classes).
        classes: C.
        groups: int [N], the clip of each row, for frame tasks: a batch then holds all frames of its clips, and all
            classes weigh the same, because balanced accuracy is what is scored. None: every row is a clip.
        epochs: passes over the clips.
        batch: clips in a step; the last step of an epoch has what is left.
        lr: learning rate at the start.
        seed: of the weights and of the order of clips.

    Raises:
        ConfigError: epochs or batch below 1, or a learning rate that is not above 0.
        DataError: no rows, or rows and targets that differ in number.
    """
    if epochs < 1 or batch < 1 or not lr > 0:
        raise ConfigError(f"A linear probe needs epochs and batch >= 1 and lr > 0, but got {epochs}, {batch} and {lr}.")
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
        model = LinearProbe(inputs.shape[1], classes, torch.Generator().manual_seed(seed))
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


def xares_linear_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    epochs: int = EPOCHS,
    batch: int = BATCH_CLIPS,
    lr: float = LEARNING_RATE,
    seed: int = SEED,
) -> np.ndarray:
    """Classes of the test rows by the linear probe of X-ARES.

    Args:
        train: float [N, D].
        labels: int [N].
        test: float [M, D].
        groups: int [N], the clip of each training row, for frame tasks; see `fit_linear_probe`.
        epochs: passes over the training clips.
        batch: clips in a step.
        lr: learning rate at the start.
        seed: of the weights and of the order of clips.

    Returns:
        int [M], values out of `labels` (the lowest of a tie).

    Raises:
        ConfigError: as `fit_linear_probe`.
        DataError: as `fit_linear_probe`.
    """
    names, targets = np.unique(labels, return_inverse=True)
    model = fit_linear_probe(
        train, targets, classes=len(names), groups=groups, epochs=epochs, batch=batch, lr=lr, seed=seed
    )
    with _one_thread(), torch.inference_mode():
        logits = model(torch.from_numpy(np.asarray(test, dtype=np.float64)))
    return np.asarray(names[logits.argmax(dim=1).numpy()])


def xares_knn_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    balanced: bool = False,
    k: int = 10,
    temperature: float = 0.07,
) -> np.ndarray:
    """Classes of the test rows by k-NN with the numbers of X-ARES, on embeddings as they are.

    The similarity is the cosine. The harness itself scales the columns of the training rows instead of the rows, so its
    scores differ by some points (docs/benchmarks.md).

    Args:
        train: float [N, D].
        labels: int [N].
        test: float [M, D].
        balanced: votes of all classes weigh the same, for frame tasks.
        k: neighbours.
        temperature: of the votes, exp(cosine / temperature).

    Returns:
        int [M], values out of `labels`.
    """
    return knn_predict(train, labels, test, k=k, temperature=temperature, balanced=balanced)


def _rows_of_clips(groups: np.ndarray) -> list[np.ndarray]:
    """For every clip, in the order of their numbers, the places of its rows, int64 [rows of the clip]."""
    order = np.argsort(groups, kind="stable")
    _, starts = np.unique(groups[order], return_index=True)
    return np.split(order, starts[1:])


def _even_weights(targets: Tensor, classes: int) -> Tensor:
    """Weights float64 [classes] under which every class counts the same over all rows; 0 for one that has none."""
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
