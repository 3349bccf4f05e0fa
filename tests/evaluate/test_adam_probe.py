"""The linear probe of soundworld-1 against gradients written in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bestrq2.errors import DataError
from bestrq2.evaluate.adam_probe import adam_probe_predict, fit_adam_probe

SETTINGS = {"epochs": 2, "batch": 32, "lr": 1e-3, "seed": 42}


def blobs(seed: int, n: int, classes: int = 3, width: int = 5, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around the centre of their class; the centres are the same for every seed."""
    centres = 2 * np.random.default_rng(99).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    return (centres[labels] + noise * generator.normal(size=(n, width))).astype(np.float32), labels


def numpy_probe(
    rows: np.ndarray,
    targets: np.ndarray,
    batches: list[np.ndarray],
    lr: float,
    weight: np.ndarray,
    bias: np.ndarray,
    class_weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """LayerNorm, linear layer, weighted cross-entropy and Adam with cosine decay, gradients by hand."""
    parameters = {"gain": np.ones(rows.shape[1]), "shift": np.zeros(rows.shape[1]), "weight": weight, "bias": bias}
    first = {name: np.zeros_like(value) for name, value in parameters.items()}
    second = {name: np.zeros_like(value) for name, value in parameters.items()}
    for step, batch in enumerate(batches):
        x = rows[batch].astype(np.float64)
        normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        hidden = normal * parameters["gain"] + parameters["shift"]
        logits = hidden @ parameters["weight"].T + parameters["bias"]
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        row_weights = class_weights[targets[batch]]
        error = (shares - np.eye(len(bias))[targets[batch]]) * (row_weights / row_weights.sum())[:, None]
        back = error @ parameters["weight"]
        gradients = {
            "gain": (back * normal).sum(0),
            "shift": back.sum(0),
            "weight": error.T @ hidden,
            "bias": error.sum(0),
        }
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            parameters[name] = parameters[name] - rate * mean / (np.sqrt(square) + 1e-8)
    return parameters


def initial_weights(width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator, bound = torch.Generator().manual_seed(seed), width**-0.5
    weight = torch.empty(classes, width, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(classes, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    return weight.numpy(), bias.numpy()


def orders(clips: int, epochs: int, batch: int, seed: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(clips, generator=generator).numpy() for _ in range(epochs)]
    return [order[first : first + batch] for order in drawn for first in range(0, clips, batch)]


def assert_parameters(model, expected: dict[str, np.ndarray]) -> None:
    found = {
        "gain": model[0].weight,
        "shift": model[0].bias,
        "weight": model[1].weight,
        "bias": model[1].bias,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=0, atol=1e-9, err_msg=name)


def test_the_linear_probe_is_adam_with_cosine_decay_on_cross_entropy():
    rows, labels = blobs(0, 45)
    model = fit_adam_probe(rows, labels, 3, epochs=3, batch=16, lr=0.01, seed=7)
    batches = orders(45, 3, 16, 7)
    assert len(batches) == 9, "the last batch of an epoch has 13 clips"
    expected = numpy_probe(rows, labels, batches, 0.01, *initial_weights(5, 3, 7), np.ones(3))
    assert_parameters(model, expected)


def test_frames_come_clip_by_clip_and_classes_weigh_the_same():
    rows, _ = blobs(1, 60)
    generator = np.random.default_rng(2)
    clip = np.repeat([3, 5, 8, 11, 12, 20], 10)[generator.permutation(60)]  # any numbers, in any order
    present = (generator.random(60) < 0.2).astype(int)
    model = fit_adam_probe(rows, present, 2, groups=clip, epochs=2, batch=4, lr=0.01, seed=42)
    batches = [
        np.concatenate([np.flatnonzero(clip == np.unique(clip)[one]) for one in drawn]) for drawn in orders(6, 2, 4, 42)
    ]
    assert [len(batch) for batch in batches] == [40, 20, 40, 20]
    weights = 60 / (2 * np.bincount(present))
    assert weights[1] > 2 * weights[0]
    assert_parameters(model, numpy_probe(rows, present, batches, 0.01, *initial_weights(5, 2, 42), weights))


def test_answers_are_the_same_for_any_threads_and_leave_the_global_state_alone():
    rows, labels = blobs(0, 300, width=64, noise=8.0)
    test, _ = blobs(1, 200, width=64, noise=8.0)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fitted = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            fitted.append(fit_adam_probe(rows, labels, 3, **SETTINGS))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fitted[0][1].weight, fitted[1][1].weight)
    assert torch.equal(fitted[0][0].weight, fitted[1][0].weight)
    torch.manual_seed(6)
    with torch.inference_mode():
        again = adam_probe_predict(rows, labels, test, **SETTINGS)
    np.testing.assert_array_equal(again, adam_probe_predict(rows, labels, test, **SETTINGS))
    assert (again != adam_probe_predict(rows, labels, test, **(SETTINGS | {"seed": 1}))).any(), "the seed matters"


def test_rows_without_labels_are_refused():
    rows, labels = blobs(0, 10)
    for given, names in ((rows, labels[:9]), (rows[:0], labels[:0])):
        with pytest.raises(DataError, match="as many rows as labels"):
            adam_probe_predict(given, names, rows, **SETTINGS)
