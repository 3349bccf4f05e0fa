"""A small probe that runs again and again while an encoder is pretrained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.errors import AudioError, DataError
from bestrq2.evaluate.probe import FeatureExtractor, probe_features

logger = logging.getLogger(__name__)


class OnlineProbe:
    """Linear probes on a fixed small part of labelled tasks, for curves during pretraining.

    Attributes:
        tasks: the tasks cut to their part.
        seed: of the choice of clips and of the probes.
        batch: clips embedded at a time.
    """

    def __init__(
        self, tasks: Sequence[LabelledTask], max_train: int = 200, max_test: int = 200, seed: int = 0, batch: int = 32
    ) -> None:
        """Choose the clips once, so that scores of different steps are comparable.

        Args:
            tasks: labelled tasks.
            max_train: most training clips per task, drawn at random.
            max_test: most test clips per task, drawn at random.
            seed: of the choice.
            batch: clips embedded at a time.
        """
        self.tasks = [
            replace(task, train=_part(task.train, max_train, seed), test=_part(task.test, max_test, seed))
            for task in tasks
        ]
        self.seed = seed
        self.batch = batch

    def run(self, features: FeatureExtractor, first: bool = False) -> dict[str, float]:
        """Probe the features now.

        Args:
            features: of the encoder as it is.
            first: nothing was trained yet: a task that cannot be scored never will be.

        Returns:
            "probe/<task>" for every task (accuracy, or balanced accuracy for frame tasks), "probe/<domain>" for the
            mean of its tasks and "probe/mean" for the mean over domains. A task that cannot be scored, say because
            the encoder gives NaN, is NaN and so are the means over it; a warning says why, training goes on.

        Raises:
            BestRQ2Error: a task cannot be scored the first time.
        """
        by_domain: dict[str, list[float]] = {}
        results: dict[str, float] = {}
        for task in self.tasks:
            try:
                (score,) = probe_features(
                    features, [task], methods=("linear",), seed=self.seed, batch=self.batch, progress=False
                )
                results[f"probe/{task.name}"] = score.score
            except (DataError, AudioError) as error:
                if first:
                    raise
                logger.warning("online probe: %s", error)
                results[f"probe/{task.name}"] = float("nan")
            by_domain.setdefault(task.domain or "other", []).append(results[f"probe/{task.name}"])
        means = {f"probe/{domain}": float(np.mean(values)) for domain, values in by_domain.items()}
        if means:
            results |= {**means, "probe/mean": float(np.mean(list(means.values())))}
        return results


def _part(clips: LabelledClips, most: int, seed: int) -> LabelledClips:
    """At most `most` clips, drawn at random, in their order."""
    if len(clips) <= most:
        return clips
    return clips.part(np.sort(np.random.default_rng(seed).permutation(len(clips))[:most]))
