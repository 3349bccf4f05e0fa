"""One pretraining run from configuration to run folder."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger

from bestrq2.convert.weights import quiet_hub
from bestrq2.data.batches import AudioBatch, Crop, CropKey, collate
from bestrq2.data.feeding import count_recordings, fixed_crops, make_feed, split_any
from bestrq2.data.labelled import load_labelled
from bestrq2.data.opening import open_source
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.remote import StreamSource
from bestrq2.data.sources import Source
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.online import OnlineProbe
from bestrq2.files import disk_errors
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.model.transformer import Transformer
from bestrq2.report.of_run import write_run_report
from bestrq2.train.callbacks import Evaluation, MovingAverage, RunKeeper
from bestrq2.train.config import PretrainConfig, changed_settings, resolve
from bestrq2.train.metrics import MetricsFile
from bestrq2.train.module import MaskDrawer, PretrainingModule
from bestrq2.train.optimizer import ema_decay, warmup_steps
from bestrq2.train.progress import Progress
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.shard_counts import ShardCounts, with_known_counts
from bestrq2.train.statistics import band_statistics

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 16
# Recordings in the report of a run that holds none out.
_SHOWN = 16
_SHARD_COUNTS = "shards.json"


def pretrain(
    *,
    data: str | os.PathLike[str] | Source | StreamSource,
    output: str | os.PathLike[str],
    recipe: str = "best-rq-2",
    seed: int = 0,
    resume: bool = False,
    model: dict[str, Any] | None = None,
    loader: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    probe: dict[str, Any] | None = None,
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

    Returns:
        The run folder.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        KeyboardInterrupt: if it was stopped by Ctrl-C; the run can be resumed.
    """
    source = data if isinstance(data, Source | StreamSource) else None
    settings: dict[str, Any] = {
        "recipe": recipe, "data": source.name if source else str(data), "output": str(output), "seed": seed,
        "model": model, "loader": loader, "optimizer": optimizer, "trainer": trainer, "probe": probe,
    }  # fmt: skip
    return run_pretraining(resolve(settings), resume=resume, source=source)


def run_pretraining(config: PretrainConfig, resume: bool = False, source: Source | StreamSource | None = None) -> Path:
    """Pretrain as configured; see `pretrain`."""
    source = open_source(config.data) if source is None else source
    folder = RunFolder(config.output)
    folder.create(resume)
    start = _resume_point(folder, config) if resume else 0
    with disk_errors(folder.root), quiet_lightning():
        if start == config.trainer.max_steps and folder.report.exists():
            logger.info("%s: all %d steps are done already", folder.root, start)
            return folder.root
        folder.write_config(config.to_dict())
        source = with_known_counts(source, folder.root / _SHARD_COUNTS)
        training, held_out = split_any(source, config.loader.validation_clips, config.seed)
        counts = {"recordings": count_recordings(source), "held_out": count_recordings(held_out)}
        folder.write_environment(counts)
        run = _Run(config, folder, training, held_out, start)
        run.fit()
    return folder.root


class _Run:
    """The parts of one run, put together."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        training: Source | StreamSource,
        held_out: Source | StreamSource | None,
        start: int,
    ) -> None:
        self.config, self.folder, self.start = config, folder, start
        self.rejections = RejectionLog(folder.rejected)
        model = config.model
        shortest = model.min_training_samples
        self.feed = make_feed(training, model.sampling_rate, model.max_seconds, config.seed, shortest)
        torch.manual_seed(config.seed)
        with quiet_hub():
            pretraining_model = BestRQ2ForPreTraining(model)
        if config.trainer.gradient_checkpointing:
            for part in pretraining_model.modules():
                if isinstance(part, Transformer):
                    part.gradient_checkpointing = True
        self.module = PretrainingModule(pretraining_model, config)
        if model.uses_dataset_statistics and not start:
            self._estimate_statistics()
        self.keeper = RunKeeper(folder, self.rejections)
        self.shown = self._fixed_crops(held_out or training, config.loader.validation_clips or _SHOWN)
        self.trainer = self._trainer(self.shown if held_out else [])

    def _estimate_statistics(self) -> None:
        clips = self.config.loader.statistics_clips
        batch_size = min(_VALIDATION_BATCH, clips)
        steps = -(-clips // batch_size)
        batches = self.feed.loader(batch_size, num_workers=self.config.loader.num_workers, max_steps=steps)
        mean, deviation, rejected = band_statistics(self.module.model.base_model, batches)
        self.rejections.add(rejected)
        self.module.model.base_model.set_statistics(mean, deviation)

    def _fixed_crops(self, source: Source | StreamSource, count: int) -> list[np.ndarray]:
        model = self.config.model
        rejected: list[tuple[str, str]] = []
        crops = fixed_crops(
            source,
            count,
            self.config.seed,
            model.sampling_rate,
            model.max_seconds,
            model.min_training_samples,
            rejected,
        )
        self.rejections.add(rejected)
        if not crops:
            logger.warning("not one of the recordings held out can be used: no validation")
        return crops

    def _trainer(self, held_out: list[np.ndarray]) -> pl.Trainer:
        config, settings = self.config, self.config.trainer
        callbacks: list[pl.Callback] = []
        if settings.ema:
            steps = warmup_steps(settings.max_steps, config.optimizer)
            callbacks.append(MovingAverage(ema_decay(settings.max_steps, config.optimizer), steps))
        callbacks += [Evaluation(self._validation_batches(held_out), self._online_probe()), self.keeper, Progress()]
        callbacks.append(ShardCounts(self.folder.root / _SHARD_COUNTS))
        launched = "SLURM_NTASKS" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        try:
            return pl.Trainer(
                accelerator=settings.accelerator,
                devices=settings.devices,
                precision=settings.precision,  # type: ignore[arg-type]
                max_steps=settings.max_steps,
                max_epochs=-1,
                accumulate_grad_batches=settings.accumulate_grad_batches,
                gradient_clip_val=settings.gradient_clip_val,
                callbacks=callbacks,
                logger=self._loggers(),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=self.folder.root,
                plugins=None if launched else [LightningEnvironment()],
            )
        except (ValueError, TypeError, RuntimeError, pl.utilities.exceptions.MisconfigurationException) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    def _loggers(self) -> list[Logger]:
        loggers: list[Logger] = [MetricsFile(self.folder.metrics, self.start)]
        try:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(self.folder.root, name="tensorboard", version=""))
        except ModuleNotFoundError:
            logger.info("no TensorBoard events: pip install 'bestrq2[tensorboard]' adds them")
        return loggers

    @staticmethod
    def _validation_batches(crops: list[np.ndarray]) -> list[AudioBatch]:
        items = [Crop(CropKey(0, index, 0, index), crop) for index, crop in enumerate(crops)]
        return [collate(items[first : first + _VALIDATION_BATCH]) for first in range(0, len(items), _VALIDATION_BATCH)]

    def _online_probe(self) -> OnlineProbe | None:
        probe = self.config.probe
        if probe.data is None:
            return None
        return OnlineProbe(load_labelled(probe.data), max_train=probe.clips, seed=self.config.seed)

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            KeyboardInterrupt: if stopped.
        """
        resume_from = self.folder.last_checkpoint if self.start else None
        if self.start < self.config.trainer.max_steps:
            with self.keeper.listening():
                self.trainer.fit(self.module, self._loader(), ckpt_path=resume_from, weights_only=True)
        if self.trainer.is_global_zero and self.folder.model.is_dir():
            write_run_report(self.folder.root, self.shown)
        if self.keeper.interrupted:
            raise KeyboardInterrupt(f"stopped after step {self.trainer.global_step} of {self.folder.root}")

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
        return self.feed.loader(
            clips,
            self.start * batches,
            config.loader.num_workers,
            MaskDrawer(config.model, config.seed, batches, clips),
            rank=self.trainer.global_rank,
            world_size=world,
        )


def _resume_point(folder: RunFolder, config: PretrainConfig) -> int:
    """Steps done in the run that lies here; 0 where there is none.

    Raises:
        ConfigError: if the settings differ in what makes it another run.
        CheckpointError: if the checkpoint is damaged.
    """
    if not folder.config.exists():
        return 0
    changes = changed_settings(folder.read_config(), config.to_dict())
    if changes:
        raise ConfigError(f"{folder.root}: cannot be resumed with other settings: {'; '.join(changes)}")
    if not folder.last_checkpoint.exists():
        return 0
    try:
        checkpoint = torch.load(folder.last_checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(checkpoint["global_step"])
    except Exception as error:
        raise CheckpointError(
            f"{folder.last_checkpoint}: damaged ({type(error).__name__}); delete it to start the run anew"
        ) from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices (devices, tips, workers) from hiding ours."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*(srun|LeafSpec|isinstance\(treespec|lr_scheduler\.step).*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
