"""Training, validation and test splits of labelled recordings, and class-balanced sampling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bestrq2.data.sources import SubsetSource
from bestrq2.errors import DataError
from bestrq2.seeding import generator
from bestrq2.text import nearest

SPLITS = ("train", "valid", "test")
SHARES = {"valid": 0.1, "test": 0.2}
"""Share of the recordings in each split that is drawn; training gets the rest."""

_WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
# First word of the seed sequence, so that splits share no random numbers with anything else.
_DRAWN = 0xD1715


def split_named(word: str) -> str:
    """Name of the split for a word in any case, such as "valid" for "dev"; "" for other words."""
    return _SPLIT_OF.get(word.lower(), "")


def split_in(name: str) -> str:
    """The split that a file name mentions, such as "test" for "speech-eval-000.tar"; "" where there is none."""
    found = {split_named(word) for word in re.split(r"[^a-z]+", name.lower())}
    return next((split for split in SPLITS if split in found), "")


def checked_split(origin: object, word: str) -> str:
    """Name of the split for a value of a split column; "" for an empty one.

    Raises:
        DataError: another word.
    """
    split = split_named(word)
    if word and not split:
        hint = nearest(word.lower(), _SPLIT_OF)
        raise DataError(f"{origin} has the split {word!r}; expected 'train', 'valid' or 'test'{hint}")
    return split


def complete_splits(
    origin: object, given: Sequence[str], names: Sequence[str], targets: np.ndarray, groups: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """Recordings of each split; splits that are not given are drawn from the training recordings.

    Args:
        origin: name of the corpus in messages.
        given: split of each recording; "" where it is not given.
        names: name of each recording; the draw is a function of the sorted names.
        targets: [recordings, classes], 1 for the classes of each recording.
        groups: group of each recording; "" for none. Recordings of a group are never separated.
        seed: random seed of the draw.

    Returns:
        For "train", "valid" and "test" int64 [recordings of the split], rising and disjoint; empty where there are too
        few recordings to draw from.

    Raises:
        DataError: the split is given for some recordings only, or there are no training recordings.
    """
    places = {split: [place for place, one in enumerate(given) if one == split] for split in (*SPLITS, "")}
    if places[""] and len(places[""]) < len(given):
        raise DataError(f"{origin} gives the split of some recordings only; give it for all or none.")
    if not places[""] and not places["train"]:
        raise DataError(f"{origin} has no recordings in the split 'train'; give some, or no split at all.")
    missing = [split for split in SPLITS if split == "train" or not places[split]]
    order = np.array(sorted(places[""] or places["train"], key=names.__getitem__), np.int64)
    drawn = stratified_splits(targets[order], [groups[place] for place in order], missing, seed)
    return {
        split: np.sort(order[drawn == split]) if split in missing else np.array(places[split], np.int64)
        for split in SPLITS
    }


def stratified_splits(targets: np.ndarray, groups: Sequence[str], splits: Sequence[str], seed: int) -> np.ndarray:
    """Assign recordings to splits so that every class has its share in each and no group is separated.

    Iterative stratification after Sechidis et al., "On the stratification of multi-label data" (2011): the rarest class
    first, each of its recordings, in random order, goes to the split that lacks most of that class.

    Args:
        targets: [recordings, classes], 1 for the classes of each; recordings without any form a class of their own.
        groups: group of each recording; "" for none.
        splits: "train" and others out of `SPLITS`; training gets what the `SHARES` of the others leave.
        seed: random seed of the order.

    Returns:
        The split of each recording, str [recordings].
    """
    names = [f"group {group}" if group else f"recording {place}" for place, group in enumerate(groups)]
    units, unit_of = np.unique(names, return_inverse=True)
    columns = _class_columns(targets)
    counts = np.zeros((len(units), columns.shape[1]))
    np.add.at(counts, unit_of, columns)
    total = counts.sum(axis=0)
    lacking = np.stack([_wanted(total, split, splits) for split in splits])
    given = np.zeros_like(lacking)
    chosen = np.full(len(units), -1)
    largest_first = sorted(range(len(splits)), key=lambda row: -SHARES.get(splits[row], 1))
    shuffled = generator(_DRAWN, seed).permutation(len(units))
    for column in np.argsort(total, kind="stable"):
        inside = shuffled[(counts[shuffled, column] > 0) & (chosen[shuffled] < 0)]
        for unit in inside[np.argsort(-counts[inside, column], kind="stable")]:  # large groups first
            # Ties go to a split that has none of the class yet, then to the one that lacks most of all classes.
            need = [(lacking[row, column], given[row, column] == 0, lacking[row].sum()) for row in range(len(splits))]
            best = max(largest_first, key=need.__getitem__)
            chosen[unit] = best
            lacking[best] -= counts[unit]
            given[best] += counts[unit]
    return np.array(splits)[chosen[unit_of]]


def _class_columns(targets: np.ndarray) -> np.ndarray:
    """Targets float64 [recordings, classes + 1]; the last class holds the recordings without any."""
    return np.column_stack([targets, ~targets.any(axis=1)]).astype(np.float64)


def _wanted(total: np.ndarray, split: str, splits: Sequence[str]) -> np.ndarray:
    """Recordings of each class that a split should have, at least one of each class there is."""
    if split != "train":
        return np.where(total > 0, np.maximum(1, SHARES[split] * total), 0)
    others = [_wanted(total, other, splits) for other in splits if other != "train"]
    return np.where(total > 0, np.maximum(1, total - sum(others, np.zeros_like(total))), 0)


@dataclass(frozen=True)
class BalancedSource(SubsetSource):
    """Recordings that are drawn by their probabilities, see `BalancedRows`.

    Attributes:
        probabilities: float64 [recordings], summing to 1.
    """

    probabilities: np.ndarray


def balanced(subset: SubsetSource, targets: np.ndarray) -> BalancedSource:
    """A source in which every class comes equally often.

    Each recording is as probable as the sum, over its classes, of one over the number of recordings of the class.

    Args:
        subset: the recordings.
        targets: [recordings, classes], 1 for the classes of each; recordings without any form a class of their own.
    """
    columns = _class_columns(targets)
    weights = columns @ (1 / np.maximum(1, columns.sum(axis=0)))
    return BalancedSource(subset.whole, subset.indices, subset.name, weights / weights.sum())
