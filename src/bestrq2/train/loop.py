"""The training loop of pretraining and fine-tuning: `take_steps`, from top to bottom, and the `Run` that it advances.

One iteration is one optimiser step: draw, forward and backward, guard, clip, step, log, validate, save, stop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bestrq2._version import __version__
from bestrq2.convert.weights import write_exported_step
from bestrq2.data.batch import AudioBatch
from bestrq2.data.rejections import RejectionLog, Shorter
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.files import write_folder
from bestrq2.progress import Progress, format_duration
from bestrq2.text import counted
from bestrq2.train.checkpoints import load_optimizer, model_state, optimizer_state
from bestrq2.train.clock import RunClock
from bestrq2.train.guard import Guard
from bestrq2.train.heard import Heard
from bestrq2.train.loggers import Loggers, make_loggers
from bestrq2.train.objective import PretrainingTask
from bestrq2.train.online_probe import OnlineProbing
from bestrq2.train.optimizer import MovingAverage, ema_decay, learning_rate_factor, make_optimizer, warmup_steps
from bestrq2.train.processes import all_reduced, connected, disconnect, gathered, launched_by_first, usable_parts
from bestrq2.train.replay import save_failure
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.settings import LoggingConfig, OptimizerConfig, TrainerConfig
from bestrq2.train.stopping import StopRequest
from bestrq2.train.task import Sums, Task, added, seed_noise
from bestrq2.train.watch import Watch

logger = logging.getLogger(__name__)

# Time after the first step from which the duration of the run is estimated (s).
_PACE_SECONDS = 4.0


def train(run: Run, batches: Iterable[AudioBatch]) -> None:
    """Take the steps that are left and save the state of the last one.

    Args:
        run: the run, at the step from which it (re)starts.
        batches: batches from that step on, `accumulate_grad_batches` for each step.

    Raises:
        StoppedBySignal: a signal asked to stop; the state of the last step taken is saved.
        BestRQ2Error: too many steps in a row were not finite, or the last state could not be saved.
    """
    with run.loggers:
        run.begin()
        with run.stop.between_steps(), run.progress:
            take_steps(run, iter(batches))
    run.check_saved()


def take_steps(run: Run, batches: Iterator[AudioBatch]) -> None:
    """The loop itself."""
    settings, fabric, task, guard, optimizer = run.settings, run.fabric, run.task, run.guard, run.optimizer
    for step in range(run.step + 1, settings.max_steps + 1):
        # Draw: several batches where gradients are accumulated, so that the terms of the whole step are known.
        parts = [next(batches) for _ in range(settings.accumulate_grad_batches)]
        run.clock.batches_arrived()
        for part in parts:
            run.heard.add(part)

        # Forward and backward: each term of the loss weighs the same, whatever batch and process it belongs to.
        # Processes average their gradients, hence the factor world_size.
        run.set_learning_rate(step)
        weight = fabric.world_size / run.total_terms(parts)
        sums: Sums = {}
        for number, part in enumerate(parts, start=1):
            seed_noise(task.seed, part.step, fabric.global_rank, fabric.device)
            with fabric.no_backward_sync(run.model, enabled=number < len(parts)):
                output = run.model(task.inputs(part, fabric.device))
                fabric.backward(guard.see(output["loss"]) * weight)
            sums = added(sums, output)

        # Guard, clip, step: a step that is not finite changes nothing but the count of such steps.
        fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
        norm = guard.judge(run.parameters, optimizer.optimizer)
        if settings.gradient_clip_val is not None:
            torch.nn.utils.clip_grads_with_norm_(run.parameters, settings.gradient_clip_val, norm)
        optimizer.step()
        optimizer.zero_grad()
        run.finish_step(step, sums)

        # Log, validate, probe, warn.
        last = step == settings.max_steps
        if step % settings.log_every_n_steps == 0 or last:
            run.log_training(step)
        if guard.too_many(run.max_skipped_in_a_row):
            run.fail(step, parts)
        better = run.is_due(settings.val_every_n_steps, step) and run.validate(step)
        if run.probing is not None and run.is_due(run.probing.every_n_steps, step):
            run.probe(step)
        run.give_warnings(step)

        # Save, stop: all processes agree on the step after which they stop.
        run.list_rejected(parts)
        stopping = run.stop.agreed()
        if step % settings.checkpoint_every_n_steps == 0 or last or stopping:
            run.save(step, export=True, better=better)
        elif better:
            run.save(step, export=task.exports_best, better=True)
        run.show(step)
        if stopping and not last:
            run.leave()


@dataclass
class Run:
    """What a run consists of while it trains; a checkpoint saves and restores the part of it that changes.

    Attributes:
        task: model and loss.
        fabric: devices, processes and precision, launched.
        model: the task as Fabric wraps it: its forward pass runs in the precision and strategy of the run.
        optimizer: optimiser as Fabric wraps it.
        settings: settings of the loop.
        rates: peak and course of the learning rate.
        config: all settings of the run as plain values, kept in checkpoints.
        folder: run folder.
        stop: signals that ask to stop.
        loggers: destinations of the figures.
        watch: warnings.
        clock: time of training, and of waiting for data.
        rejections: list of recordings that could not be used.
        heard: audio heard so far.
        average: moving average of the weights; None for none.
        probing: online probe; None for none.
        max_skipped_in_a_row: steps in a row that are not finite after which the run fails.
        step: steps done.
    """

    task: Task
    fabric: Fabric
    model: Any
    optimizer: Any
    settings: TrainerConfig
    rates: OptimizerConfig
    config: dict[str, Any]
    folder: RunFolder
    stop: StopRequest
    loggers: Loggers
    watch: Watch
    clock: RunClock
    rejections: RejectionLog
    heard: Heard
    average: MovingAverage | None = None
    probing: OnlineProbing | None = None
    max_skipped_in_a_row: int = 10
    step: int = 0
    guard: Guard = field(default_factory=Guard)
    best: tuple[float, ...] | None = None
    best_step: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    disk_failure: str | None = None

    def __post_init__(self) -> None:
        """Set up the store of checkpoints, the trained parameters and the progress display."""
        self.store = self.folder.store(self.settings)
        self.parameters = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        self._window: Sums = {}
        self._rejected: list[tuple[str, str]] = []
        self._shorter: list[Shorter] = []
        self._told = False
        self._paced: tuple[int, float] | None = None
        self.progress = Progress(
            self.task.label, self.settings.max_steps, "steps", self.step, shown=self.fabric.is_global_zero
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the weights of the task are loaded already."""
        facts = state["bestrq2"]
        self.step = self.progress.first = self.progress.done = int(state["global_step"])
        if self.fabric.is_global_zero:
            logger.info("%s: continues after step %d of %d", self.folder.root, self.step, self.settings.max_steps)
        load_optimizer(self.task, self.optimizer.optimizer, state["optimizer_states"][0])
        self.fabric.strategy.precision.load_state_dict(facts["precision"])
        self.guard.load_state_dict(facts["guard"])
        if facts["watch"] is not None:
            self.watch.load_state_dict(facts["watch"])
        self.best = tuple(facts["best"]) if facts["best"] is not None else None
        self.best_step = facts["best_step"]
        self.heard.restore(facts["heard"], self.fabric.global_rank)
        if self.average is not None and "average" in state:
            self.average.model.load_state_dict(state["average"])
        windows, rank = facts["windows"], self.fabric.global_rank
        if len(windows) == self.fabric.world_size:
            self._window = dict(windows[rank])
        elif rank == 0:  # with another number of processes the first one takes the sums of all
            self._window = {key: torch.stack([window[key] for window in windows]).sum(dim=0) for key in windows[0]}

    def begin(self) -> None:
        """Prepare for the first step."""
        device = self.fabric.device
        self.guard.to(device)
        self._window = {name: value.to(device) for name, value in self._window.items()}
        self.task.train_mode()
        if self.fabric.is_global_zero:
            self.watch.warnings.forget_after(self.step)
        if self.probing is not None and self.step == 0:
            self.probe(0)
        self.clock.start(device)

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rate of a step (from 1); a run that was extended follows the curve of the longer run."""
        factor = learning_rate_factor(step - 1, self.settings.max_steps, self.rates)
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def total_terms(self, parts: list[AudioBatch]) -> float | Tensor:
        """Number of terms of the loss in a whole step, over all its batches and processes; at least 1."""
        own = sum(self.task.terms(part) for part in parts)
        if not connected():
            return max(1, own)
        total = torch.full((), float(own), device=self.fabric.device)
        dist.all_reduce(total)
        return total.clamp_min(1)

    def finish_step(self, step: int, sums: Sums) -> None:
        """Count a step; the sums of one that was skipped are left out of the averages."""
        self.step = step
        kept = self.guard.kept(sums)
        self._window = added(self._window, kept)
        if self.average is not None:
            self.average.update(self.task.model, step)
        self.clock.step_ended()

    def is_due(self, every: int, step: int) -> bool:
        """Whether an action with an interval in steps (0 for never) is due; after the last step it always is."""
        return bool(every) and (step % every == 0 or step == self.settings.max_steps)

    def log_training(self, step: int) -> None:
        """Log the averages since the last time; `Task.running_sums` go on."""
        values = dict(self.task.summarise(all_reduced(self._window)))
        values["train/skipped_steps"] = self.guard.skipped
        values["train/learning_rate"] = self.optimizer.optimizer.param_groups[0]["lr"]
        values["audio_seconds"] = self.heard.seconds(self.fabric.device)
        self._window = {name: value for name, value in self._window.items() if name in self.task.running_sums}
        self.publish(values, step)
        if self.fabric.is_global_zero:
            self.clock.record(step)

    def publish(self, values: Mapping[str, Tensor | float], step: int) -> None:
        """Hand values to all loggers and the progress display."""
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        self.latest.update(scalars)
        if self.fabric.is_global_zero:
            self.loggers.log(scalars, step)

    def model_in_use(self, step: int) -> Any:
        """The model that is validated, probed and exported: averaged weights where there are any."""
        if self.average is not None and step > self.average.start:
            return self.average.model
        return self.task.model

    def validate(self, step: int) -> bool:
        """Validate; returns whether the model is better than after any step before."""
        sums = all_reduced(self._window)
        with usable_parts(self.task.model):
            values = self.fabric.broadcast(self.task.validate(self.model_in_use(step), self.fabric, step, sums))
        self.task.train_mode()
        if not values:
            return False
        self.publish(values, step)
        rank = tuple(-math.inf if math.isnan(value) else value for value in self.task.rank(values))
        better = self.best is None or rank > self.best
        if better:
            self.best, self.best_step = rank, step
        if line := self.task.describe({**self.latest, "step": step}, better):
            logger.info(line)
        return better

    def probe(self, step: int) -> None:
        """Probe the encoder on labelled data; replicas leave the work to the first process."""
        assert self.probing is not None
        if self.fabric.is_global_zero or isinstance(self.task.model, FSDPModule):
            self.publish(self.probing.run(self.model_in_use(step), self.fabric, step), step)
        self.task.train_mode()

    def give_warnings(self, step: int) -> None:
        """Give the warnings that are due."""
        logged = step % self.settings.log_every_n_steps == 0 or step == self.settings.max_steps
        if self.fabric.is_global_zero:
            self.watch.look(self.latest, step, logged=logged)

    def show(self, step: int) -> None:
        """Update the progress display."""
        elapsed, parts = max(1e-9, self.clock.elapsed), []
        for name, text in (
            ("loss", "training loss {:.3f}"),
            ("accuracy", "acc {:.1%}"),
            ("code_perplexity", "codes {:.0f}"),
        ):
            if (value := self.latest.get(f"train/{name}")) is not None:
                parts.append(text.format(value))
        parts.append(self.heard.describe(elapsed, self.fabric.world_size))
        parts.append(f"{self.clock.waited / elapsed:.0%} waiting for data")
        self.progress.show(step, details=", ".join(parts), now=step == self.settings.max_steps)
        if not self._told and self.fabric.is_global_zero:
            self.tell_duration(step, elapsed)

    def tell_duration(self, step: int, elapsed: float) -> None:
        """Log once how long the run takes at the pace of its first seconds, less the first one, which also loads."""
        if self._paced is None:
            self._paced = step, elapsed
        elif elapsed - self._paced[1] >= _PACE_SECONDS:
            self._told = True
            seconds = (elapsed - self._paced[1]) / (step - self._paced[0])
            left = self.settings.max_steps - step
            logger.info(
                "%s: the other %s take about %s at %.3g s each",
                self.task.label, counted(left, "step"), format_duration(left * seconds), seconds,
            )  # fmt: skip

    def list_rejected(self, parts: list[AudioBatch]) -> None:
        """Collect recordings that could not be used or end early; one process lists them at once, several on saving."""
        self._rejected += [entry for part in parts for entry in part.rejected]
        self._shorter += [entry for part in parts for entry in part.shorter]
        if self.fabric.world_size == 1:
            self._write_rejected()

    def _write_rejected(self) -> None:
        every = gathered((self._rejected, self._shorter))
        self._rejected, self._shorter = [], []
        if not self.fabric.is_global_zero:
            return
        for place, (listing, what) in enumerate(
            ((self.rejections, "rejected"), (self.rejections.shorter, "shorter than announced"))
        ):
            new = listing.add([entry for lists in every for entry in lists[place]])
            if len(listing).bit_length() > (len(listing) - new).bit_length():  # one line for 1, 2, 4, 8, ... of them
                logger.info("%s %s so far, listed in %s", counted(len(listing), "recording"), what, listing.path)

    def state(self, step: int) -> dict[str, Any]:
        """Everything that a checkpoint holds, whole in the first process; every process must ask."""
        weights = model_state(self.task)
        if not self.task.saves_frozen:
            trained = {name for name, parameter in self.task.named_parameters() if parameter.requires_grad}
            weights = {name: value for name, value in weights.items() if name in trained}
        state: dict[str, Any] = {
            "global_step": step,
            "state_dict": weights,
            "optimizer_states": [optimizer_state(self.task, self.optimizer.optimizer)],
            "bestrq2": {
                "version": __version__,
                "config": self.config,
                "guard": self.guard.state_dict(),
                "watch": self.watch.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "best": None if self.best is None else list(self.best),
                "best_step": self.best_step,
                "heard": self.heard.everywhere(),
                "windows": gathered({name: value.cpu() for name, value in self._window.items()}),
            },
        }
        if self.average is not None and step > self.average.start:
            state["average"] = self.average.model.state_dict()
        return state

    def save(self, step: int, export: bool, better: bool) -> None:
        """Save the state of a step, and before it the model folder, so that a checkpoint is never without its model.

        Args:
            step: steps done.
            export: whether the model folder is due; where it holds the best model, only a better one is written.
            better: whether the model is the best so far.
        """
        self._write_rejected()
        state = self.state(step)
        if not self.fabric.is_global_zero:
            return
        self.clock.record(step)  # before the state, so that a run resumed from it knows its time
        try:
            if export and (better or not self.task.exports_best):
                self._export(step, state["state_dict"])
            self.heard.write(self.folder.heard, state["bestrq2"]["heard"])
            self.store.write(step, state)
            if better:
                self.store.mark_best(step)
        except OSError as error:
            self.disk_failure = f"{error.filename or self.store.path(step)}: {error.strerror or error}"
            logger.warning("the state of step %d could not be saved (%s); training goes on", step, self.disk_failure)
            return
        self.disk_failure = None
        self.store.prune(step)

    def _export(self, step: int, state: dict[str, Tensor]) -> None:
        """Write the model folder; a model that is cut into shards is taken from the whole state of the task."""
        sharded = isinstance(self.task.model, FSDPModule)
        weights = {name.removeprefix("model."): value for name, value in state.items()} if sharded else None

        def fill(folder: Path) -> None:
            self.task.export(self.model_in_use(step), folder, weights)
            write_exported_step(folder, step)

        write_folder(self.folder.model, fill)

    def fail(self, step: int, parts: list[AudioBatch]) -> NoReturn:
        """Save the step that was skipped and end the run; every process must call it.

        Raises:
            BestRQ2Error: always; how to find out what is wrong.
        """
        folder, advice = self.folder.root / "failures" / f"step-{step:08d}", "lower --lr"
        if isinstance(self.task, PretrainingTask):
            save_failure(folder, self.state(step), parts, self.guard, self.task, self.fabric)
            advice = f"it is saved in {folder}; to see what is wrong run: bestrq2 replay {folder}"
        raise BestRQ2Error(
            f"{self.folder.root}: loss or gradient was not finite in {int(self.guard.in_a_row)} steps in a row, so "
            f"training stopped after step {step}; {advice}"
        )

    def leave(self) -> NoReturn:
        """End a run that a signal has stopped.

        Raises:
            StoppedBySignal: always, except in a process that the first one launched.
            SystemExit: there, with code 0: another code would be taken for a crash.
        """
        self.check_saved()
        disconnect()
        if launched_by_first():
            raise SystemExit(0)
        raise self.stop.error(f"after step {self.step} of {self.folder.root}")

    def check_saved(self) -> None:
        """Pass if the state of the last step is saved.

        Raises:
            BestRQ2Error: the disk was full.
        """
        if self.disk_failure:
            raise BestRQ2Error(
                f"{self.folder.root}: the disk is full: the last state could not be saved ({self.disk_failure}); what "
                "was written before is whole: free space and run the command again with --resume"
            )


def make_run(
    task: Task,
    fabric: Fabric,
    folder: RunFolder,
    *,
    trainer: TrainerConfig,
    rates: OptimizerConfig,
    watch: Callable[[RunClock], Watch],
    logging: LoggingConfig,
    settings: dict[str, Any],
    stop: StopRequest,
    rejections: RejectionLog,
    heard: Heard,
    groups: list[dict[str, Any]] | None = None,
    probing: OnlineProbing | None = None,
    max_skipped_in_a_row: int = 10,
    state: dict[str, Any] | None = None,
) -> Run:
    """Put a run together: the task on its device, in all processes, with its optimiser; continued from a checkpoint.

    Args:
        task: model and loss, on the CPU.
        fabric: devices, processes and precision, launched.
        folder: run folder.
        trainer: settings of the loop.
        rates: settings of the optimiser.
        watch: makes the warnings of the run.
        logging: services to log to.
        settings: all settings of the run, as plain values.
        stop: signals that ask to stop.
        rejections: list of recordings that could not be used.
        heard: audio heard so far, none.
        groups: parameter groups in place of the usual ones.
        probing: online probe; None for none.
        max_skipped_in_a_row: steps in a row that are not finite after which the run fails.
        state: checkpoint; None to start at the first step.

    Raises:
        ConfigError: the processes of the run found different checkpoints, or a logger cannot be opened.
    """
    start = 0 if state is None else int(state["global_step"])
    if len(starts := set(gathered(start))) > 1:
        raise ConfigError(
            f"{folder.root}: the processes find checkpoints of different steps there ({sorted(starts)}); put the run "
            "on storage that all machines share"
        )
    if state is not None:
        task.load_state_dict(state["state_dict"], strict=task.saves_frozen)
    average = None
    if trainer.ema:
        average = MovingAverage(task.model, ema_decay(trainer.max_steps, rates), warmup_steps(trainer.max_steps, rates))
        average.model.to(fabric.device)
    model = fabric.setup_module(task)
    optimizer = make_optimizer(task.model, rates, fabric.strategy.precision.precision, groups)
    clock = RunClock(folder.timing if fabric.is_global_zero else None, start)
    run = Run(
        task=task,
        fabric=fabric,
        model=model,
        optimizer=fabric.setup_optimizers(optimizer),
        settings=trainer,
        rates=rates,
        config=settings,
        folder=folder,
        stop=stop,
        loggers=make_loggers(logging, folder, start, settings) if fabric.is_global_zero else Loggers(),
        watch=watch(clock),
        clock=clock,
        rejections=rejections,
        heard=heard,
        average=average,
        probing=probing,
        max_skipped_in_a_row=max_skipped_in_a_row,
    )
    if state is not None:
        run.restore(state)
    return run
