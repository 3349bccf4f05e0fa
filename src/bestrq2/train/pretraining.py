"""Pretraining: from a configuration to a run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from bestrq2.data.batch import AudioBatch
from bestrq2.data.loader import end_workers, fixed_crops, training_batches, training_rows
from bestrq2.data.open_source import open_source
from bestrq2.data.prepare.summary import BandSums, prepared_statistics
from bestrq2.data.rejections import RejectionLog, Shorter
from bestrq2.data.rows import Rows, describe_rows
from bestrq2.data.sources import Source, split_source
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import disk_errors, folder_lock
from bestrq2.inference.compiling import compile_parts
from bestrq2.inference.cost import cost
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.progress import Progress
from bestrq2.report.page import write_run_report
from bestrq2.report.recordings import shown_recordings
from bestrq2.text import counted
from bestrq2.train.checkpoints import read_checkpoint
from bestrq2.train.heard import Heard
from bestrq2.train.initial import Initial, load_fitting, origin
from bestrq2.train.loop import Run, make_run, train
from bestrq2.train.objective import MaskDrawer, PretrainingTask, build_model, model_config
from bestrq2.train.online_probe import OnlineProbing
from bestrq2.train.optimizer import learning_rate_factor
from bestrq2.train.processes import (
    disconnect,
    first_process,
    follow_launcher,
    launch,
    lost_processes_named,
    quiet_fabric,
)
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.settings import PretrainConfig, changed_rounding, changed_settings
from bestrq2.train.step_cost import fitting_seconds
from bestrq2.train.stopping import StopRequest
from bestrq2.train.teacher import PATCHES_PER_CODE, Teacher, cut, fit_teacher, teaching_encoder
from bestrq2.train.watch import Watch

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 16


def run_pretraining(config: PretrainConfig, *, resume: bool = False, source: Source | None = None) -> Path:
    """Pretrain an encoder as configured.

    Args:
        config: all settings.
        resume: continue the run in `config.output`; start it if there is none.
        source: unlabelled audio in place of `config.data`.

    Returns:
        The run folder.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        StoppedBySignal: by Ctrl-C or another signal; the run can be resumed.
    """
    follow_launcher()
    folder, first, stop = RunFolder(config.output), first_process(), StopRequest()
    with stop.listening(), quiet_fabric(), disk_errors(folder.root):
        exists = resume and folder.config.exists()
        config = _as_begun(config, folder) if exists else config
        if exists and _is_finished(folder, config):
            logger.info(
                "%s: finished at step %d; to extend it, add --trainer.max_steps with a larger number",
                folder.root, config.trainer.max_steps,
            )  # fmt: skip
            return folder.root
        source = _open(config, exists) if source is None else source
        if first:
            folder.create(resume)
        with folder_lock(folder.root) if first else nullcontext(), lost_processes_named(folder.root):
            fabric = None
            if config.loader.batch_seconds == "auto":
                fabric = launch(config.trainer)  # the processes must agree
                loader = replace(config.loader, batch_seconds=fitting_seconds(config, fabric))
                config = replace(config, loader=loader)
            start, checkpoint = _resume_point(folder, config, len(source)) if exists else (0, None)
            initial = None
            if checkpoint is None and config.init is not None:
                initial = load_fitting(config.init, config.model, keep_statistics=not config.loader.statistics_clips)
            teaching = None
            if checkpoint is None and config.teacher is not None:
                teaching = teaching_encoder(config.teacher, config.model)
            probing = OnlineProbing(config.probe, config.seed) if config.probe.data is not None else None
            training, held_out = split_source(source, config.loader.validation_clips, config.seed)
            if first:
                folder.remove_leftovers()
                folder.write_config(config.to_dict())
            rows = training_rows(training, config.model, config.seed)
            facts = describe_rows(rows, len(training), config.step_rows, config.model)
            aside = f"; {counted(len(held_out), 'recording')} held out for validation" if held_out else ""
            logger.info("training on %s%s", "; ".join(facts.values()), aside)
            if first:
                counts = {"recordings": len(source), "held_out": len(held_out) if held_out else 0}
                origins = {
                    name: known for name in ("init", "teacher") if (known := folder.read_environment().get(name))
                }
                if initial is not None:
                    origins["init"] = origin(initial.source, initial.model.base_model)
                if teaching is not None:
                    assert config.teacher is not None
                    known = origin(config.teacher, teaching)  # of the whole encoder
                    cut(teaching, config.model)
                    origins["teacher"] = {**known, "gflops_per_clip": cost(teaching.config).inference_gflops}
                folder.write_environment({**counts, "heard": facts, **origins})
            fabric = launch(config.trainer) if fabric is None else fabric
            corpus, resumed = (training, rows), (start, checkpoint)
            _pretrain(config, fabric, folder, corpus, held_out, initial, teaching, resumed, stop, probing)
            disconnect()
    return folder.root


def _as_begun(config: PretrainConfig, folder: RunFolder) -> PretrainConfig:
    """The settings with what the run of a folder has decided: where its weights came from, and what "auto" became."""
    old, loader = folder.read_config(), config.loader
    if loader.batch_seconds == "auto":
        loader = replace(loader, batch_seconds=old["loader"]["batch_seconds"])
    return replace(config, init=old.get("init"), loader=loader)


def _pretrain(
    config: PretrainConfig,
    fabric: Fabric,
    folder: RunFolder,
    corpus: tuple[Source, Rows],
    held_out: Source | None,
    initial: Initial | None,
    teaching: BestRQ2Model | None,
    resumed: tuple[int, Path | None],
    stop: StopRequest,
    probing: OnlineProbing | None,
) -> None:
    """Put the parts of the run together, train, and write the report."""
    (training, rows), (start, checkpoint) = corpus, resumed
    rejections = RejectionLog(folder.rejected)
    if first_process():
        rejections.add(rows.rejected)
    validation = _fixed_crops(config, held_out, rejections) if held_out is not None else []
    model = build_model(config)
    if initial is not None:
        logger.info("%s: %s", folder.root, initial.fill(model))
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    if teaching is not None and first_process():
        _fit_teacher(config, teaching, corpus, rejections).save(folder.teacher)
    if config.teacher is not None:
        fabric.barrier()
    teacher = None if config.teacher is None else Teacher.load(folder.teacher)
    task = PretrainingTask(model, config.seed, validation, teacher)
    if config.trainer.compile:
        compile_parts(task.model)
    if state is None and config.model.uses_dataset_statistics and config.loader.statistics_clips:
        task.model.base_model.set_statistics(*_statistics(config, training, rows, task.model.base_model, rejections))
    run = make_run(
        task,
        fabric,
        folder,
        trainer=config.trainer,
        rates=config.optimizer,
        watch=lambda clock: Watch(
            folder.warnings, clock, config.trainer, config.optimizer, config.watch, config.loader, config.model
        ),
        logging=config.logging,
        settings=config.to_dict(),
        stop=stop,
        rejections=rejections,
        heard=Heard(training, config.model.sampling_rate),
        probing=probing,
        max_skipped_in_a_row=config.watch.max_skipped_in_a_row,
        state=state,
    )
    if start < config.trainer.max_steps:
        loader = _loader(config, training, rows, run)
        try:
            train(run, loader)
        finally:
            end_workers(loader)
    if fabric.is_global_zero and config.trainer.report and run.step == config.trainer.max_steps:
        with Progress("report", unit="", leave=False):
            write_run_report(folder.root, shown_recordings(training, held_out, config.model, config.seed))


def _loader(config: PretrainConfig, training: Source, rows: Rows, run: Run) -> Any:
    """Batches of this process from the step on from which the run (re)starts."""
    batches, world = config.trainer.accumulate_grad_batches, run.fabric.world_size
    batch_rows = config.step_rows // batches
    if batch_rows % world:
        raise ConfigError(
            f"{config.rows_in_words}, which must be a multiple of the {world} devices times "
            f"trainer.accumulate_grad_batches ({batches})"
        )
    return training_batches(
        training,
        rows,
        config.model,
        seed=config.seed,
        batch_rows=batch_rows,
        start_step=run.step * batches,
        num_workers=config.loader.num_workers,
        draw_mask=MaskDrawer(model_config(config.model), config.seed, batches, batch_rows),
        rank=run.fabric.global_rank,
        world_size=world,
        batches_per_step=batches,
    )


def _fixed_crops(config: PretrainConfig, source: Source, rejections: RejectionLog) -> list[np.ndarray]:
    """Crops for the validation loss, always the same ones."""
    rejected: list[tuple[str, str]] = []
    shorter: list[Shorter] = []
    count = config.loader.validation_clips
    crops = fixed_crops(source, count, config.model, seed=config.seed, rejected=rejected, shorter=shorter)
    if first_process():
        rejections.add(rejected)
        rejections.shorter.add(shorter)
    if not crops:
        logger.warning("no recording that is held out can be used: no validation")
    return crops


def _statistics(
    config: PretrainConfig, training: Source, rows: Rows, encoder: BestRQ2Model, rejections: RejectionLog
) -> Sequence[torch.Tensor]:
    """Mean and deviation per mel band, dB, float32 [bands] each: those of a prepared corpus, or estimated ones."""
    if known := prepared_statistics(training, encoder.config):
        logger.info("%s: mean and deviation per mel band are those of its summary", training.name)
        return known
    sums = BandSums(encoder.config.num_mel_bands)
    # As many rows as hold so many clips on average.
    needed = config.loader.statistics_clips * len(rows) / rows.clips
    for batch in _sample(config, training, rows, needed, rejections, "statistics"):
        with torch.no_grad():
            columns = encoder.log_mel.packed(batch.to("cpu").input_values, batch.packing.frames)
        columns = columns.unflatten(-1, (batch.packing.segments.shape[1], -1)).movedim(1, -1)
        sums.add_frames(columns[batch.packing.segments != 0].flatten(0, 1))
    return sums.statistics()


def _fit_teacher(
    config: PretrainConfig, encoder: BestRQ2Model, corpus: tuple[Source, Rows], rejections: RejectionLog
) -> Teacher:
    """Cluster the states of a trained encoder over a sample of the corpus."""
    patches = config.model.patch_rows * config.model.columns(config.model.max_samples)
    needed = PATCHES_PER_CODE * config.model.codebook_size / patches
    return fit_teacher(encoder, config.model, _sample(config, *corpus, needed, rejections, "teacher"))


def _sample(
    config: PretrainConfig, training: Source, rows: Rows, needed: float, rejections: RejectionLog, label: str
) -> Iterator[AudioBatch]:
    """The first batches of the corpus in the order of training, of `needed` rows or a few more."""
    count = max(1, round(needed))
    size = min(_SAMPLE_ROWS, count)
    batches = training_batches(
        training,
        rows,
        config.model,
        seed=config.seed,
        batch_rows=size,
        num_workers=config.loader.num_workers,
        max_steps=-(-count // size),
    )
    rejected: list[tuple[str, str]] = []
    shorter: list[Shorter] = []
    with Progress(label, -(-count // size), "batches", leave=False) as progress:
        for batch in batches:
            rejected += batch.rejected
            shorter += batch.shorter
            yield batch
            progress.advance()
    if first_process():
        rejections.add(rejected)
        rejections.shorter.add(shorter)


def _is_finished(folder: RunFolder, config: PretrainConfig) -> bool:
    """Whether the run of a folder has taken all its steps and written its report.

    Raises:
        ConfigError: if settings differ in what makes it another run.
    """
    if changes := changed_settings(folder.read_config(), config.to_dict()):
        raise ConfigError(
            f"{folder.root}: cannot be resumed with other settings: {'; '.join(changes)}; leave out what "
            "differs, or name a new folder with --output"
        )
    store, last = folder.store(config.trainer), config.trainer.max_steps
    done = store.steps()[-1:] == [last] and store.damage(store.path(last)) is None
    return done and (folder.report.exists() or not config.trainer.report)


def _open(config: PretrainConfig, exists: bool) -> Source:
    """The audio of a run that exists already, or of a new one."""
    try:
        return open_source(config.data)
    except DataError as error:
        if not exists:
            raise
        hint = f"if the audio of {config.output} has moved, give its place with --data"
        raise DataError(f"{str(error).rstrip('.')}; {hint}") from error


def _resume_point(folder: RunFolder, config: PretrainConfig, recordings: int) -> tuple[int, Path | None]:
    """Steps done in the run of a folder, and its newest undamaged state; (0, None) where none was saved.

    Raises:
        ConfigError: if the number of recordings differs.
        CheckpointError: if every state is damaged.
    """
    old, new = folder.read_config(), config.to_dict()
    step, path = folder.store(config.trainer).newest()
    before = folder.read_environment().get("recordings")
    if before not in (None, recordings):
        raise ConfigError(
            f"{folder.root}: cannot be resumed, since its data held {before} recordings and now holds {recordings}; "
            "give the same recordings, or name a new folder with --output"
        )
    if path is not None and (rounding := changed_rounding(old, new)):
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
