"""Online probe: a small probe that is repeated during pretraining."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.errors import AudioError, DataError
from bestrq2.evaluate.score_table import mean_of_means
from bestrq2.evaluate.task_probe import FeatureExtractor, probe_features

logger = logging.getLogger(__name__)


class OnlineProbe:
    """Linear probes on a fixed subset of labelled tasks, for curves during pretraining.

    The clips are chosen once, so that scores of different steps are comparable.

    Args:
        tasks: labelled tasks.
        max_train: largest number of training clips per task, drawn at random.
        max_test: largest number of test clips per task, drawn at random.
        seed: random seed of the choice and of the probes.
        batch: number of clips embedded at a time.
    """

    def __init__(
        self, tasks: Sequence[LabelledTask], max_train: int = 200, max_test: int = 200, seed: int = 0, batch: int = 32
    ) -> None:
        self.tasks = [
            replace(task, train=_part(task.train, max_train, seed), test=_part(task.test, max_test, seed))
            for task in tasks
        ]
        self.seed = seed
        self.batch = batch

    def run(self, features: FeatureExtractor, first: bool = False) -> dict[str, float]:
        """Probe the features of the encoder as it is now.

        Args:
            features: features to probe.
            first: whether nothing was trained yet; a task that cannot be scored then is an error.

        Returns:
            "probe/<task>" for every task (see `probe_features`), "probe/<domain>" for the mean of its tasks and
            "probe/mean" for the mean over domains. A task that cannot be scored later, e.g. because the encoder gives
            NaN, is NaN, and so are the means over it; a warning gives the reason.

        Raises:
            BestRQ2Error: a task cannot be scored although `first` is set.
        """
        found: dict[str, tuple[str, float]] = {}
        for task in self.tasks:
            value = math.nan
            try:
                (score,) = probe_features(
                    features, [task], methods=("linear",), seed=self.seed, batch=self.batch, progress=False
                )
                value = score.score
            except (DataError, AudioError) as error:
                if first:
                    raise
                logger.warning("online probe: %s", error)
            found[task.name] = (task.domain or "other", value)
        if not found:
            return {}
        results = {name: value for name, (_, value) in found.items()} | mean_of_means(found.values())
        return {f"probe/{name}": value for name, value in results.items()}


def _part(clips: LabelledClips, most: int, seed: int) -> LabelledClips:
    """At most `most` clips, drawn at random, in their original order."""
    if len(clips) <= most:
        return clips
    return clips.part(np.sort(np.random.default_rng(seed).permutation(len(clips))[:most]))
