"""Two-dimensional coordinates and clusters of vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bestrq2.errors import ConfigError

# Fewer points say no more by t-SNE than by their principal components, and scikit-learn takes a second to import.
FEWEST_FOR_TSNE = 40
SEED = 0
# t-SNE of so many rows takes about 8 s of processor time, k-means a second. Both run in one thread: many gain little,
# and wait for each other on a busy machine (k-means of 4000 rows then took ten times as long).
MOST_FOR_TSNE, MOST_FOR_CLUSTERS = 2000, 20_000
COMPONENTS = 50
_BLOCK_ROWS = 4096


def project(vectors: NDArray[np.floating]) -> tuple[NDArray[np.float64], str]:
    """Two coordinates [N, 2] of vectors [N, D], and the name of the method.

    t-SNE from a PCA start with perplexity 30, or less where there are few clips; principal components alone below
    FEWEST_FOR_TSNE clips and in one dimension.
    """
    n, d = vectors.shape
    if n < FEWEST_FOR_TSNE or d < 2:
        left, strength, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
        flat = (left * strength)[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "principal components"
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (n - 1) / 4)
    with threadpool_limits(1):
        flat = TSNE(init="pca", perplexity=perplexity, random_state=SEED).fit_transform(vectors)
    return np.asarray(flat, dtype=np.float64), f"t-SNE, perplexity {perplexity:.0f}, from a PCA start"


def lay_out(units: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
    """Places of vectors on a map, and the name of the method.

    t-SNE of up to MOST_FOR_TSNE rows, evenly taken; each of the others goes between its three nearest of these.

    Args:
        units: [N, D], rows of length 1 or 0.

    Returns:
        float32 [N, 2].
    """
    places = np.zeros((len(units), 2), np.float32)
    chosen = _evenly(len(units), MOST_FOR_TSNE)
    sample = units[chosen]
    flat, method = project(_reduced(sample))
    places[chosen] = flat
    others = np.setdiff1d(np.arange(len(units)), chosen)
    for rows in np.array_split(others, -(-len(others) // _BLOCK_ROWS)) if len(others) else ():
        similarities = units[rows] @ sample.T
        nearest = np.argpartition(-similarities, 3, axis=1)[:, :3]
        distances = 1 - np.take_along_axis(similarities, nearest, axis=1)
        weights = 1 / (distances + 1e-3) ** 2  # so that the nearest decides, unless others are as near
        weights /= weights.sum(axis=1, keepdims=True)
        places[rows] = np.einsum("nk,nkd->nd", weights, flat[nearest])
    if len(others):
        method += f", of {len(sample):,} recordings; the others are between their nearest of these"
    return places, method


def cluster(units: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Cluster of every vector by k-means, fitted to up to MOST_FOR_CLUSTERS rows, [N], largest cluster first.

    Args:
        units: [N, D], rows of length 1 or 0.
        count: number of clusters, at most N.

    Raises:
        ConfigError: `count` is below 1.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; there must be at least one cluster")
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        fitted = KMeans(min(count, len(units)), random_state=SEED).fit(units[_evenly(len(units), MOST_FOR_CLUSTERS)])
        found = fitted.predict(units)
    sizes = np.bincount(found, minlength=fitted.n_clusters)
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return rank[found]


def _evenly(rows: int, most: int) -> NDArray[np.int64]:
    """Numbers of up to `most` of the rows, evenly taken."""
    return np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)


def _reduced(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Principal components [N, COMPONENTS] of vectors, which take t-SNE less time than all values."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    if centred.shape[1] <= COMPONENTS:
        return centred
    _, axes = np.linalg.eigh(centred.T @ centred)
    return np.asarray(centred @ axes[:, : -COMPONENTS - 1 : -1])
