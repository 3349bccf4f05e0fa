"""The probe of X-ARES against references written another way: numpy gradients, neighbours by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.classifiers import knn_predict
from bestrq2.evaluate.xares_probe import fit_linear_probe, xares_knn_predict, xares_linear_predict


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
        "gain": model.norm.weight,
        "shift": model.norm.bias,
        "weight": model.linear.weight,
        "bias": model.linear.bias,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=0, atol=1e-9, err_msg=name)


def test_the_linear_probe_is_adam_with_cosine_decay_on_cross_entropy():
    rows, labels = blobs(0, 45)
    model = fit_linear_probe(rows, labels, classes=3, epochs=3, batch=16, lr=0.01, seed=7)
    batches = orders(45, 3, 16, 7)
    assert len(batches) == 9, "the last batch of an epoch has 13 clips"
    expected = numpy_probe(rows, labels, batches, 0.01, *initial_weights(5, 3, 7), np.ones(3))
    assert_parameters(model, expected)


def test_frames_come_clip_by_clip_and_classes_weigh_the_same():
    rows, _ = blobs(1, 60)
    generator = np.random.default_rng(2)
    clip = np.repeat([3, 5, 8, 11, 12, 20], 10)[generator.permutation(60)]  # any numbers, in any order
    present = (generator.random(60) < 0.2).astype(int)
    model = fit_linear_probe(rows, present, classes=2, groups=clip, epochs=2, batch=4, lr=0.01, seed=42)
    batches = [
        np.concatenate([np.flatnonzero(clip == np.unique(clip)[one]) for one in drawn]) for drawn in orders(6, 2, 4, 42)
    ]
    assert [len(batch) for batch in batches] == [40, 20, 40, 20]
    weights = 60 / (2 * np.bincount(present))
    assert weights[1] > 2 * weights[0]
    assert_parameters(model, numpy_probe(rows, present, batches, 0.01, *initial_weights(5, 2, 42), weights))


def test_the_initial_weights_are_pytorchs_distribution():
    rows, labels = blobs(0, 10, width=400)
    model = fit_linear_probe(rows, labels, classes=3, epochs=1, batch=10, lr=1e-12)
    weight = model.linear.weight.detach()
    assert weight.abs().max() <= 1 / 20
    assert float(weight.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05), "uniform"


def test_separable_classes_are_told_apart_and_keep_their_names():
    rows, labels = blobs(0, 200, noise=0.05)
    test, truth = blobs(1, 100, noise=0.05)
    names = np.array([4, 7, 1])
    assert (xares_linear_predict(rows, names[labels], test, epochs=20, lr=3e-2) == names[truth]).all()
    assert (xares_knn_predict(rows, names[labels], test) == names[truth]).all()


def test_rare_frames_are_found_because_classes_weigh_the_same():
    generator = np.random.default_rng(0)
    present = (generator.random(4000) < 0.05).astype(int)
    rows = generator.normal(size=(4000, 4)) + 1.5 * present[:, None] * np.array([1, -1, 0, 0])
    half, clip = 2000, np.arange(2000) // 20
    fitted = {"epochs": 60, "lr": 3e-2}
    answers = xares_linear_predict(rows[:half], present[:half], rows[half:], groups=clip, **fitted)
    unweighted = xares_linear_predict(rows[:half], present[:half], rows[half:], batch=640, **fitted)
    recall = [(given[present[half:] == 1] == 1).mean() for given in (answers, unweighted)]
    assert recall[0] > 0.8
    assert recall[0] > recall[1] + 0.2


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
            fitted.append(fit_linear_probe(rows, labels, classes=3, epochs=2))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fitted[0].linear.weight, fitted[1].linear.weight)
    assert torch.equal(fitted[0].norm.weight, fitted[1].norm.weight)
    torch.manual_seed(6)
    with torch.inference_mode():
        again = xares_linear_predict(rows, labels, test, epochs=2)
    np.testing.assert_array_equal(again, xares_linear_predict(rows, labels, test, epochs=2))
    assert (again != xares_linear_predict(rows, labels, test, epochs=2, seed=1)).any(), "the seed matters"


def test_test_rows_do_not_change_each_others_answers():
    rows, labels = blobs(0, 100, noise=4.0)
    test, _ = blobs(1, 80, noise=4.0)
    for predict in (xares_linear_predict, xares_knn_predict):
        np.testing.assert_array_equal(predict(rows, labels, test)[:20], predict(rows, labels, test[:20]))


def test_neighbours_vote_by_their_cosine_as_they_are():
    def at(degrees: float, length: float = 1.0) -> list[float]:
        return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]

    train = np.array([at(0, 9), at(20), at(21, 0.1), at(22), at(180)])
    labels = np.array([0, 1, 1, 1, 2])
    test = np.array([at(5)])
    votes = {0: math.exp(math.cos(math.radians(5)) / 0.07)}
    votes[1] = sum(math.exp(math.cos(math.radians(angle)) / 0.07) for angle in (15, 16, 17))
    assert votes[0] < votes[1]
    assert xares_knn_predict(train, labels, test).tolist() == [1]
    assert xares_knn_predict(train, labels, test, k=1).tolist() == [0]
    sharper = {0: math.exp(math.cos(math.radians(5)) / 0.01)}
    sharper[1] = sum(math.exp(math.cos(math.radians(angle)) / 0.01) for angle in (15, 16, 17))
    assert sharper[0] > sharper[1]
    assert xares_knn_predict(train, labels, test, temperature=0.01).tolist() == [0]
    assert xares_knn_predict(train, labels, test, balanced=True).tolist() == [0], "three votes of 1 count as one"


def test_neighbours_see_offsets_that_standardising_would_remove():
    rows, labels = blobs(0, 60, noise=2.0)
    test, _ = blobs(1, 60, noise=2.0)
    np.testing.assert_array_equal(xares_knn_predict(rows, labels, test), knn_predict(rows, labels, test))
    assert (xares_knn_predict(rows + 100, labels, test + 100) != xares_knn_predict(rows, labels, test)).any()


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": math.nan}])
def test_impossible_settings_are_refused(changes):
    rows, labels = blobs(0, 10)
    with pytest.raises(ConfigError, match=r"epochs and batch >= 1 and lr > 0"):
        xares_linear_predict(rows, labels, rows, **changes)


def test_rows_without_labels_are_refused():
    rows, labels = blobs(0, 10)
    for given, names in ((rows, labels[:9]), (rows[:0], labels[:0])):
        with pytest.raises(DataError, match="as many rows as labels"):
            xares_linear_predict(given, names, rows)
