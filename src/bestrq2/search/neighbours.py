"""Exact neighbours of vectors by blocked matrix products: nearest rows, similar pairs, similarity to the nearest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bestrq2.progress import Progress

# Values of a block of similarities (64 MB): larger ones are no faster.
_BLOCK_VALUES = 16_000_000


def unit_length(vectors: NDArray[np.floating]) -> None:
    """Scale [N, D] in place to Euclidean length 1; vectors that are zero up to rounding become zero."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    np.divide(vectors, lengths, out=vectors, where=lengths > 1e-12)
    vectors[lengths[:, 0] <= 1e-12] = 0


def nearest_rows(
    units: NDArray[np.float32], query: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows that are most similar to a query.

    Args:
        units: [N, D], rows of length 1.
        query: [D], of length 1.
        count: number of rows, at most all.

    Returns:
        Row numbers [count] and cosines [count], most similar first, rows of equal similarity in their order.
    """
    similarity = units @ query
    count = min(count, len(similarity))
    if count < len(similarity):
        least = np.partition(similarity, len(similarity) - count)[len(similarity) - count]
        rows = np.flatnonzero(similarity >= least)
    else:
        rows = np.arange(count)
    rows = rows[np.argsort(-similarity[rows], kind="stable")][:count]
    return rows, similarity[rows]


def similar_pairs(
    units: NDArray[np.float32], threshold: float, most: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Pairs of rows above a similarity.

    Args:
        units: [N, D], rows of length 1.
        threshold: least cosine.
        most: largest number of pairs; the most similar ones are kept.

    Returns:
        Row numbers [pairs, 2], the smaller first, and cosines [pairs], most similar first.
    """
    rows, similarities = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    size = max(1, _BLOCK_VALUES // max(1, len(units)))
    with Progress("near-duplicates", len(units), "recordings", leave=False) as progress:
        for start in range(0, len(units), size):
            products = units[start : start + size] @ units[start:].T
            first, second = np.nonzero(products >= threshold)
            first, second = first[second > first], second[second > first]
            rows = np.concatenate([rows, np.column_stack([first, second]) + start])
            similarities = np.concatenate([similarities, products[first, second]])
            if len(rows) > most:
                kept = np.argsort(-similarities, kind="stable")[:most]
                rows, similarities = rows[kept], similarities[kept]
                threshold = float(similarities[-1])
            progress.show(min(start + size, len(units)))
    order = np.argsort(-similarities, kind="stable")
    return rows[order], similarities[order]


def mean_similarities(units: NDArray[np.float32], neighbours: int) -> NDArray[np.float32]:
    """Mean cosine of every row [N] to its nearest other rows.

    Args:
        units: [N, D], rows of length 1.
        neighbours: number of other rows, at most all.
    """
    neighbours = min(neighbours, len(units) - 1)
    means = np.ones(len(units), np.float32)
    size = max(1, _BLOCK_VALUES // max(1, len(units)))
    with Progress("outliers", len(units), "recordings", leave=False) as progress:
        for start in range(0, len(units) if neighbours > 0 else 0, size):
            products = units[start : start + size] @ units.T
            own = np.arange(len(products))
            products[own, start + own] = -np.inf
            nearest = np.partition(products, len(units) - neighbours, axis=1)[:, len(units) - neighbours :]
            means[start : start + size] = nearest.mean(axis=1)
            progress.show(min(start + size, len(units)))
    return means
