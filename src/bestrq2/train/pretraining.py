"""One pretraining run from configuration to run folder."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from bestrq2.convert.weights import quiet_hub
from bestrq2.data.loader import end_workers, fixed_batches, fixed_crops, split_source, training_batches
from bestrq2.data.open_source import open_source
from bestrq2.data.prepare.summary import prepared_statistics
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.sources import Source
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.evaluate.online import OnlineProbe
from bestrq2.files import disk_errors, folder_lock
from bestrq2.inference.compiling import compile_parts
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.report.page import write_run_report
from bestrq2.train.callbacks import Evaluation, MovingAverage, RunKeeper
from bestrq2.train.checkpoints import RunCheckpointIO
from bestrq2.train.config import resolve
from bestrq2.train.failures import FailureKeeper
from bestrq2.train.loggers import make_loggers
from bestrq2.train.module import MaskDrawer, PretrainingModule, ShardedPretrainingModule, checkpoint_activations
from bestrq2.train.online_probing import OnlineProbing, open_probe
from bestrq2.train.optimizer import ema_decay, learning_rate_factor, warmup_steps
from bestrq2.train.processes import (
    ChildEndFilter,
    cluster_environment,
    connected,
    first_process,
    launched_shape,
    lost_processes_named,
    make_strategy,
    started_by_lightning,
    watch_parent,
)
from bestrq2.train.progress import Progress
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.settings import PretrainConfig, changed_rounding, changed_settings
from bestrq2.train.statistics import band_statistics
from bestrq2.train.stopping import StopRequest
from bestrq2.train.timing import Timing
from bestrq2.train.watch import Watch

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 16
# Recordings in the report of a run that holds none out.
_SHOWN = 16


def pretrain(
    *,
    data: str | os.PathLike[str] | Source,
    output: str | os.PathLike[str],
    recipe: str = "best-rq-2",
    seed: int = 0,
    resume: bool = False,
    model: dict[str, Any] | None = None,
    loader: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    probe: dict[str, Any] | None = None,
    watch: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
) -> Path:
    """Pretrain an encoder on unlabelled audio.

    Args:
        data: folder, file, list, "soundworld", or a `Source`.
        output: run folder to write.
        recipe: where all settings start from.
        seed: of weights, data order, crops and masks.
        resume: continue the run in `output`; start it if there is none.
        model: fields of `BestRQ2Config` that differ from the recipe; likewise the other groups.
        loader: see `LoaderConfig`.
        optimizer: see `OptimizerConfig`.
        trainer: see `TrainerConfig`.
        probe: see `OnlineProbeConfig`.
        watch: see `WatchConfig`.
        logging: see `LoggingConfig`.

    Returns:
        The run folder.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        KeyboardInterrupt: if it was stopped by Ctrl-C; the run can be resumed.
    """
    source = data if isinstance(data, Source) else None
    settings: dict[str, Any] = {
        "recipe": recipe, "data": source.name if source else str(data), "output": str(output), "seed": seed,
        "model": model, "loader": loader, "optimizer": optimizer, "trainer": trainer, "probe": probe,
        "watch": watch, "logging": logging,
    }  # fmt: skip
    return run_pretraining(resolve(settings), resume=resume, source=source)


def run_pretraining(config: PretrainConfig, resume: bool = False, source: Source | None = None) -> Path:
    """Pretrain as configured; see `pretrain`."""
    source = open_source(config.data) if source is None else source
    folder, first = RunFolder(config.output), first_process()
    if started_by_lightning():
        watch_parent()
    if first:
        folder.create(resume)
    stop = StopRequest()
    with (
        disk_errors(folder.root),
        quiet_lightning(),
        folder_lock(folder.root) if first else nullcontext(),
        stop.listening(),
        lost_processes_named(folder.root),
    ):
        start, checkpoint = _resume_point(folder, config, len(source)) if resume else (0, None)
        if start == config.trainer.max_steps and folder.report.exists():
            logger.info("%s: all %d steps are done already", folder.root, start)
            return folder.root
        probe = open_probe(config)
        training, held_out = split_source(source, config.loader.validation_clips, config.seed)
        if first:
            folder.remove_leftovers()
            folder.write_config(config.to_dict())
            counts = {"recordings": len(source), "held_out": len(held_out) if held_out else 0}
            folder.write_environment(counts)
        _Run(config, folder, training, held_out, start, checkpoint, stop, probe).fit()
    return folder.root


class _Run:
    """The parts of one run, put together."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        training: Source,
        held_out: Source | None,
        start: int,
        checkpoint: Path | None,
        stop: StopRequest,
        probe: OnlineProbe | None,
    ) -> None:
        self.probe = probe
        self.config, self.folder, self.start, self.checkpoint, self.stop = config, folder, start, checkpoint, stop
        self.rejections = RejectionLog(folder.rejected)
        self.io = RunCheckpointIO(folder.store(config.trainer))
        model = config.model
        self.training = training
        self.crops: dict[str, Any] = {
            "seed": config.seed,
            "sampling_rate": model.sampling_rate,
            "max_seconds": model.max_seconds,
            "min_samples": model.min_training_samples,
        }
        torch.manual_seed(config.seed)
        with quiet_hub():
            pretraining_model = BestRQ2ForPreTraining(model)
        if config.trainer.gradient_checkpointing:
            checkpoint_activations(pretraining_model)
        if config.trainer.compile:
            compile_parts(pretraining_model)
        kind = ShardedPretrainingModule if config.trainer.strategy == "fsdp" else PretrainingModule
        self.module = kind(pretraining_model, config)
        if model.uses_dataset_statistics and not start:
            self._set_statistics(training)
        self.keeper = RunKeeper(folder, self.rejections, self.io, stop, start)
        self.shown = self._fixed_crops(held_out or training, config.loader.validation_clips or _SHOWN)
        self.trainer = self._trainer(self.shown if held_out else [])

    def _set_statistics(self, training: Source) -> None:
        """Take the statistics of a prepared corpus; estimate those of any other."""
        encoder = self.module.model.base_model
        if known := prepared_statistics(training, self.config.model):
            logger.info("%s: mean and deviation per mel band are those of its summary", training.name)
            encoder.set_statistics(*known)
            return
        clips = self.config.loader.statistics_clips
        batch_size = min(_VALIDATION_BATCH, clips)
        steps = -(-clips // batch_size)
        workers = self.config.loader.num_workers
        batches = training_batches(training, **self.crops, batch_size=batch_size, num_workers=workers, max_steps=steps)
        mean, deviation, rejected = band_statistics(encoder, batches)
        self._reject(rejected)
        encoder.set_statistics(mean, deviation)

    def _reject(self, rejected: list[tuple[str, str]]) -> None:
        if first_process():
            self.rejections.add(rejected)

    def _fixed_crops(self, source: Source, count: int) -> list[np.ndarray]:
        rejected: list[tuple[str, str]] = []
        crops = fixed_crops(source, count, **self.crops, rejected=rejected)
        self._reject(rejected)
        if not crops:
            logger.warning("not one of the recordings held out can be used: no validation")
        return crops

    def _trainer(self, held_out: list[np.ndarray]) -> pl.Trainer:
        config, settings = self.config, self.config.trainer
        callbacks: list[pl.Callback] = []
        if settings.ema:
            steps = warmup_steps(settings.max_steps, config.optimizer)
            callbacks.append(MovingAverage(ema_decay(settings.max_steps, config.optimizer), steps))
        evaluation, progress = Evaluation(fixed_batches(held_out, _VALIDATION_BATCH)), Progress()
        failures = FailureKeeper(self.folder.root, config.watch.max_skipped_in_a_row)
        watch = Watch(config, self.folder.warnings, progress.clock)
        timing = Timing(self.folder.timing, self.start)
        probing = [OnlineProbing(self.probe, config.probe, self.folder.online_probe, timing)] if self.probe else []
        callbacks += [failures, evaluation, *probing, timing, watch, self.keeper, progress]
        try:
            devices, num_nodes = launched_shape(settings)
            return pl.Trainer(
                accelerator=settings.accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=make_strategy(settings, devices, num_nodes),
                precision=settings.precision,  # type: ignore[arg-type]
                max_steps=settings.max_steps,
                max_epochs=-1,
                accumulate_grad_batches=settings.accumulate_grad_batches,
                gradient_clip_val=settings.gradient_clip_val,
                callbacks=callbacks,
                logger=make_loggers(config, self.folder, self.start),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=self.folder.root,
                plugins=[cluster_environment(), self.io],
            )
        except (ValueError, TypeError, RuntimeError, pl.utilities.exceptions.MisconfigurationException) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            KeyboardInterrupt: if stopped.
        """
        if self.start < self.config.trainer.max_steps:
            loader = self._loader()
            try:
                self.trainer.fit(self.module, loader, ckpt_path=self.checkpoint, weights_only=True)
            finally:
                end_workers(loader)
        if self.trainer.is_global_zero and self.folder.model.is_dir():
            write_run_report(self.folder.root, self.shown)
        if connected():
            self.trainer.strategy.barrier()
        if self.io.failure:
            raise BestRQ2Error(
                f"{self.folder.root}: the disk is full: the last state could not be saved ({self.io.failure}); what "
                "was written before is whole: free space and run the command again with --resume"
            )
        # Lightning would take another exit code of a process it started for a crash.
        if self.stop.stopping and not started_by_lightning():
            raise self.stop.error(f"after step {self.trainer.global_step} of {self.folder.root}")

    def _loader(self) -> Any:
        config = self.config
        batches = config.trainer.accumulate_grad_batches
        clips = config.loader.batch_size // batches
        world = self.trainer.world_size
        if clips % world:
            raise ConfigError(
                f"loader.batch_size ({config.loader.batch_size}) must be a multiple of the {world} devices times "
                f"trainer.accumulate_grad_batches ({batches})"
            )
        return training_batches(
            self.training,
            **self.crops,
            batch_size=clips,
            start_step=self.start * batches,
            num_workers=config.loader.num_workers,
            draw_mask=MaskDrawer(config.model, config.seed, batches, clips),
            rank=self.trainer.global_rank,
            world_size=world,
        )


def _resume_point(folder: RunFolder, config: PretrainConfig, recordings: int) -> tuple[int, Path | None]:
    """Steps done in the run that lies here, and its newest sound state; (0, None) where there is none.

    Raises:
        ConfigError: if settings or data differ in what makes it another run.
        CheckpointError: if every state is damaged.
    """
    if not folder.config.exists():
        return 0, None
    old = folder.read_config()
    step, path = folder.store(config.trainer).newest()
    changes = changed_settings(old, config.to_dict())
    before = folder.read_environment().get("recordings")
    if before not in (None, recordings):
        changes.append(f"data held {before} recordings and now holds {recordings}")
    if changes:
        raise ConfigError(f"{folder.root}: cannot be resumed with other settings: {'; '.join(changes)}")
    if path is not None and (rounding := changed_rounding(old, config.to_dict())):
        logger.info("%s: goes on, equal but for rounding: %s", folder.root, "; ".join(rounding))
    planned = old["trainer"]["max_steps"]
    if path is not None and config.trainer.max_steps > planned:
        rates = [
            config.optimizer.lr * learning_rate_factor(step, steps, config.optimizer)
            for steps in (planned, config.trainer.max_steps)
        ]
        logger.info(
            "%s: extended from %d to %d steps; the learning rate follows the curve of the longer run from step %d on "
            "(%.3g instead of %.3g)", folder.root, planned, config.trainer.max_steps, step, rates[1], rates[0],
        )  # fmt: skip
    return step, path


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices (devices, tips, workers) from hiding ours."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    launcher, reword = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script"), ChildEndFilter()
    levels = {name: logging.getLogger(name).level for name in (*names, launcher.name, "bestrq2")}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    launcher.setLevel(logging.INFO)
    launcher.addFilter(reword)
    if not first_process():
        logging.getLogger("bestrq2").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*(srun|LeafSpec|isinstance\(treespec|lr_scheduler\.step).*")
            yield
    finally:
        launcher.removeFilter(reword)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
