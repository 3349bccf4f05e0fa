"""Dividing labelled recordings into splits in which every class has its share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bestrq2.seeding import generator

SPLITS = ("train", "valid", "test")
SHARES = {"valid": 0.1, "test": 0.2}
# First word of its seed sequence, so that it shares no random numbers with others.
DIVISION = 0xD1715


def divide(targets: np.ndarray, groups: Sequence[str], splits: Sequence[str], seed: int) -> np.ndarray:
    """Assign every recording to a split, so that classes have their shares in each and no group is separated.

    After Sechidis et al., "On the stratification of multi-label data" (2011): the rarest class first, its recordings
    in random order, each goes to the split that lacks most of that class.

    Args:
        targets: [recordings, classes], 1 for the classes of each; recordings without any are a class of their own.
        groups: of every recording, its group; "" for none.
        splits: "train" and others out of `SPLITS`; training gets what the `SHARES` of the others leave.
        seed: of the random order.

    Returns:
        The split of every recording, str [recordings].
    """
    names = [f"group {group}" if group else f"recording {place}" for place, group in enumerate(groups)]
    units, unit_of = np.unique(names, return_inverse=True)
    columns = np.column_stack([targets, ~targets.any(axis=1)]).astype(np.float64)
    counts = np.zeros((len(units), columns.shape[1]))
    np.add.at(counts, unit_of, columns)
    total = counts.sum(axis=0)
    lacking = np.stack([_wanted(total, split, splits) for split in splits])
    given = np.zeros_like(lacking)
    chosen = np.full(len(units), -1)
    largest_first = sorted(range(len(splits)), key=lambda row: -SHARES.get(splits[row], 1))
    shuffled = generator(DIVISION, seed).permutation(len(units))
    for column in np.argsort(total, kind="stable"):
        inside = shuffled[(counts[shuffled, column] > 0) & (chosen[shuffled] < 0)]
        for unit in inside[np.argsort(-counts[inside, column], kind="stable")]:  # large groups first
            # Of equals, the split that has none of the class yet, then the one that lacks most of all classes.
            need = [(lacking[row, column], given[row, column] == 0, lacking[row].sum()) for row in range(len(splits))]
            best = max(largest_first, key=need.__getitem__)
            chosen[unit] = best
            lacking[best] -= counts[unit]
            given[best] += counts[unit]
    return np.array(splits)[chosen[unit_of]]


def _wanted(total: np.ndarray, split: str, splits: Sequence[str]) -> np.ndarray:
    """Recordings of every class that a split should have, at least one of each class there is."""
    if split != "train":
        return np.where(total > 0, np.maximum(1, SHARES[split] * total), 0)
    others = [_wanted(total, other, splits) for other in splits if other != "train"]
    return np.where(total > 0, np.maximum(1, total - sum(others, np.zeros_like(total))), 0)
