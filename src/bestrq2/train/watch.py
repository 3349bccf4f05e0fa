"""Warnings with advice: collapsing codes, a stalled loss, skipped steps, slow data. They change nothing in training."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bestrq2.files import write_text
from bestrq2.model.fields import ModelFields
from bestrq2.train.clock import RunClock
from bestrq2.train.optimizer import warmup_steps
from bestrq2.train.settings import LoaderConfig, OptimizerConfig, TrainerConfig, WatchConfig

logger = logging.getLogger(__name__)

# The share of time spent waiting is judged over at least so many steps and seconds.
_WINDOW_STEPS, _WINDOW_SECONDS = 50, 30.0
# A mean loss that is lower by less than this, in nats, has not fallen.
_IMPROVEMENT = 0.01
# How often each kind of warning is given: when it starts, and once more if it went away and came back.
_TIMES = 2


class WarningList:
    """Gives each kind of warning when it begins to hold, at most twice, into the log and `warnings.txt`.

    Args:
        path: the file; made with the first warning, one line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.given: dict[str, int] = {}
        self.holding: set[str] = set()

    def judge(self, kind: str, step: int, text: str | None) -> None:
        """Note whether a condition holds, and warn if it begins to.

        Args:
            kind: kind of the warning.
            step: steps done.
            text: the warning in one line; None if the condition does not hold.
        """
        if text is None:
            self.holding.discard(kind)
            return
        if kind in self.holding:
            return
        self.holding.add(kind)
        self.given[kind] = self.given.get(kind, 0) + 1
        if self.given[kind] > _TIMES:
            return
        logger.warning("step %d: %s", step, text)
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(f"step {step}: {text}\n".encode())
        except OSError as error:
            logger.info("%s: cannot be written (%s)", self.path, error.strerror)

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run takes again."""
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        # A full disk may have cut a line short: lines without a step are dropped, too.
        steps = [re.match(r"step (\d+): .*\n", line) for line in lines]
        kept = [line for line, match in zip(lines, steps, strict=True) if match and int(match[1]) <= step]
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))


class Watch:
    """Warns when the codes collapse, the data comes too slowly, the loss stalls, or steps are skipped.

    Args:
        path: `warnings.txt` of the run.
        clock: measures the time spent waiting for data.
        trainer: settings of the loop.
        optimizer: course of the learning rate.
        watch: thresholds.
        loader: seconds per step, workers and validation clips.
        model: architecture of a pretraining run; None for a run without codes.
    """

    def __init__(
        self,
        path: Path,
        clock: RunClock,
        trainer: TrainerConfig,
        optimizer: OptimizerConfig,
        watch: WatchConfig,
        loader: LoaderConfig,
        model: ModelFields | None = None,
    ) -> None:
        self.clock, self.trainer, self.settings, self.loader, self.model = clock, trainer, watch, loader, model
        self.warnings = WarningList(path)
        self._skipped = 0.0
        # Excess loss in this stretch of steps: sum, count, first step; and the mean of the stretch before.
        self._stretch = [0.0, 0.0, float(warmup_steps(trainer.max_steps, optimizer))]
        self._mean_before = math.nan
        self._window: tuple[int, float, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Warnings given so far, except for those of waiting, which another machine may not deserve."""
        given = {kind: times for kind, times in self.warnings.given.items() if kind != "waiting"}
        holding = sorted(self.warnings.holding - {"waiting"})
        stall = {"stretch": self._stretch, "mean_before": self._mean_before}
        return {"given": given, "holding": holding, "skipped": self._skipped, **stall}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if there had been no interruption."""
        self.warnings.given, self.warnings.holding = dict(state_dict["given"]), set(state_dict["holding"])
        self._skipped = state_dict["skipped"]
        self._stretch, self._mean_before = list(state_dict["stretch"]), state_dict["mean_before"]

    def look(self, latest: Mapping[str, float], step: int, logged: bool) -> None:
        """Give the warnings that are due after a step.

        Args:
            latest: newest logged values by name.
            step: steps done.
            logged: whether the training values are those of this step.
        """
        if logged:
            self.look_at_skipped(latest, step)
            self.look_at_loss(latest, step)
            if self.model is not None:
                self.look_at_codes(latest, self.model, step)
        self.look_at_waiting(step)

    def look_at_codes(self, latest: Mapping[str, float], model: ModelFields, step: int) -> None:
        """Warn where few codes are in use.

        Args:
            latest: newest logged values by name.
            model: architecture.
            step: steps done.
        """
        watch = self.settings
        perplexity, coverage, top_share = (
            latest.get(f"train/{name}", math.nan) for name in ("code_perplexity", "code_coverage", "top_code_share")
        )
        if not math.isfinite(latest.get("train/loss", math.nan)):
            return
        fault = None
        if perplexity < watch.min_code_perplexity:
            fault = f"perplexity {perplexity:.1f} of {model.codebook_size}"
        elif coverage < watch.min_code_coverage and self._targets(model) >= model.codebook_size:
            fault = f"{100 * coverage:.2g} % of {model.codebook_size} codes in use"
        elif top_share > watch.max_top_code_share:
            fault = f"the most frequent code is {100 * top_share:.0f} % of all"
        text = fault and (
            f"the training targets collapse ({fault}): the model can win by naming a few codes; set "
            "model.quantizer_normalization layernorm or model.input_normalization dataset, and listen to the data"
        )
        self.warnings.judge("codes", step, text)

    def _targets(self, model: ModelFields) -> float:
        """Approximate number of hidden patches in the steps from one logged step to the next."""
        clips = float(self.loader.batch_seconds) / model.max_seconds * self.trainer.log_every_n_steps
        return clips * model.columns(model.max_samples) * model.patch_rows * model.mask_ratio[0]

    def look_at_loss(self, latest: Mapping[str, float], step: int) -> None:
        """Warn where the loss stays above the entropy of the codes and does not fall from one stretch to the next."""
        excess = latest.get("train/excess_loss", math.nan)
        if not math.isfinite(excess) or step <= self._stretch[2]:
            return
        self._stretch[0] += excess
        self._stretch[1] += 1
        if step - self._stretch[2] < self.settings.stall_steps:
            return
        mean, before = self._stretch[0] / self._stretch[1], self._mean_before
        text = None
        if mean > 0 and mean > before - _IMPROVEMENT:
            text = (
                f"the loss has not fallen in {step - int(self._stretch[2])} steps and is {mean:.3f} nats above what "
                "knowing the frequency of each code gives: try another optimizer.lr, a lower model.mask_ratio, or more "
                "and other data"
            )
        self.warnings.judge("stall", step, text)
        self._stretch, self._mean_before = [0.0, 0.0, float(step)], mean

    def look_at_skipped(self, latest: Mapping[str, float], step: int) -> None:
        """Warn where steps were skipped; a float16 run skips some by design, to find the scale of its loss."""
        skipped = latest.get("train/skipped_steps", 0.0)
        text = None
        if skipped > self._skipped and not self.trainer.precision.startswith("16"):
            text = (
                f"skipped steps so far: {skipped:.0f}, as loss or gradient was not finite: try a lower learning rate, "
                "trainer.gradient_clip_val 1.0 or trainer.precision 32-true"
            )
        self._skipped = skipped
        self.warnings.judge("skipped", step, text)

    def look_at_waiting(self, step: int) -> None:
        """Warn where a good part of the time since the last look was spent waiting for data."""
        now = (step, self.clock.elapsed, self.clock.waited)
        if self._window is None:  # the first batch waits for the workers to start
            self._window = now
            return
        steps, seconds, waited = (new - old for new, old in zip(now, self._window, strict=True))
        if steps < _WINDOW_STEPS or seconds < _WINDOW_SECONDS:
            return
        self._window = now
        text = None
        if min(1.0, waited / seconds) > self.settings.max_waiting_share:
            text = (
                f"{100 * waited / seconds:.0f} % of the time is spent waiting for data: set num_workers higher "
                f"than {self.loader.num_workers}, or pack the data into shards with bestrq2 prepare"
            )
        self.warnings.judge("waiting", step, text)
