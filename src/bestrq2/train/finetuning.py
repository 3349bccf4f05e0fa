"""Fine-tuning: an encoder and a linear head on labelled recordings, from a model to a run folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bestrq2.convert.hub import write_model
from bestrq2.convert.loading import load_encoder
from bestrq2.convert.shipped import ENCODERS
from bestrq2.convert.weights import quiet_hub
from bestrq2.data.batch import AudioBatch
from bestrq2.data.labels import LabelledTask, load_task
from bestrq2.data.loader import end_workers, training_batches, training_rows
from bestrq2.data.rejections import RejectionLog, Shorter
from bestrq2.data.rows import describe_rows
from bestrq2.data.sources import SubsetSource
from bestrq2.data.splits import SPLITS, balanced
from bestrq2.errors import AudioError, ConfigError, DataError
from bestrq2.evaluate.finetuned import Predictions, finetune_result, read_finetune_result, write_finetune_result
from bestrq2.evaluate.metrics import BEST_BY, log_loss, point_metrics
from bestrq2.evaluate.provenance import model_name, software_provenance
from bestrq2.evaluate.result import Result
from bestrq2.files import disk_errors, folder_lock
from bestrq2.inference.classifier import AudioClassifier, load_classifier
from bestrq2.inference.embedder import checked_device
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.model.modeling_bestrq2 import MULTI, SINGLE, BestRQ2ForAudioClassification, BestRQ2Model
from bestrq2.progress import Progress
from bestrq2.recipe_book import recipes
from bestrq2.report.classifier import write_classifier_report
from bestrq2.text import counted
from bestrq2.train.checkpoints import read_checkpoint
from bestrq2.train.heard import Heard
from bestrq2.train.loop import Run, make_run, train
from bestrq2.train.optimizer import layer_groups
from bestrq2.train.processes import (
    disconnect,
    first_process,
    follow_launcher,
    gathered,
    launch,
    lost_processes_named,
    quiet_fabric,
)
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.settings import FinetuneConfig, LoaderConfig, LoggingConfig, TrainerConfig, WatchConfig
from bestrq2.train.stopping import StopRequest
from bestrq2.train.task import Inputs, Sums, Task, without_empty_rows
from bestrq2.train.watch import Watch

logger = logging.getLogger(__name__)

_GRADIENT_NORM = 1.0


def run_finetuning(config: FinetuneConfig, *, resume: bool = False) -> Result:
    """Fine-tune an encoder as configured; the epoch that is best in validation is kept and tested.

    Args:
        config: all settings.
        resume: continue the run in `config.output`; start it if there is none.

    Returns:
        Scores on the test split, over all classes and for each.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        StoppedBySignal: by Ctrl-C or another signal; the run can be resumed.
    """
    follow_launcher()
    folder, first, stop = RunFolder(config.output), first_process(), StopRequest()
    with stop.listening(), quiet_fabric(), disk_errors(folder.root):
        data = load_task(config.labelled, config.seed)
        if first:
            sizes = ", ".join(f"{len(data.clips(split)):,} {split}" for split in SPLITS)
            logger.info("%s: %s; recordings: %s", config.labelled, counted(len(data.classes), "class"), sizes)
        encoder = load_encoder(config.model)
        config = config.with_rate(encoder.config.hidden_size)
        if resume and folder.config.exists():
            _check_resumable(folder, config, data)
        model = make_classifier(encoder, data.classes, data.multi_label, config.max_seconds, config.seed)
        task = ClassificationTask(model, config, data, RejectionLog(folder.rejected))
        if first:
            folder.create(resume)
        with folder_lock(folder.root) if first else nullcontext(), lost_processes_named(folder.root):
            step, checkpoint = folder.store(_trainer(config, task)).newest()
            known = read_finetune_result(folder.root)
            if step == task.max_steps and known is not None and folder.report.exists():
                logger.info("%s: finished, all %d epochs are done", folder.root, config.epochs)
                return known
            if first:
                folder.remove_leftovers()
                folder.write_config(config.to_dict())
                folder.write_environment(_facts(config, data))
                task.rejections.add(task.rows.rejected)
                facts = describe_rows(task.rows, len(task.source), task.batch_rows, model.config)
                logger.info("%s: %s", task.source.name, "; ".join(facts.values()))
            result = _finetune(config, folder, task, checkpoint, stop)
            disconnect()
            return result


def _finetune(
    config: FinetuneConfig, folder: RunFolder, task: ClassificationTask, checkpoint: Path | None, stop: StopRequest
) -> Result:
    """Launch the processes, train, and test the model of the best epoch."""
    trainer = _trainer(config, task)
    fabric = launch(trainer, None if config.device is None else checked_device(config.device))
    run = make_run(
        task,
        fabric,
        folder,
        trainer=trainer,
        rates=config.optimizer,
        groups=layer_groups(task.model, config),
        watch=lambda clock: Watch(
            folder.warnings, clock, trainer, config.optimizer, WatchConfig(),
            LoaderConfig(num_workers=config.num_workers),
        ),
        logging=LoggingConfig(),
        settings=config.to_dict(),
        stop=stop,
        rejections=task.rejections,
        heard=Heard(task.source, task.model.config.sampling_rate),
        state=None if checkpoint is None else read_checkpoint(checkpoint),
    )  # fmt: skip
    if run.step < trainer.max_steps:
        loader = _loader(config, task, run)
        try:
            train(run, loader)
        finally:
            end_workers(loader)
    classifier = load_classifier(folder.root, fabric.device)
    predictions = task.predictions(classifier, "test", fabric)
    best_epoch = run.best_step // task.steps_per_epoch
    provenance = software_provenance(["bestrq2 finetune", config.model, config.labelled])
    result = finetune_result(
        model_name(folder.root), task.data.classes, task.data.multi_label, best_epoch, predictions, config.seed,
        provenance,
    )  # fmt: skip
    if fabric.is_global_zero:
        write_finetune_result(folder.root, result, predictions)
        write_classifier_report(folder.root, classifier.model.config, result, predictions, task.data.source("test"))
    return result


class ClassificationTask(Task):
    """Classes of recordings, by cross-entropy over crops; validated on whole recordings after every epoch.

    Args:
        model: encoder with a head.
        config: settings of the run.
        data: labelled recordings.
        rejections: list of recordings that could not be used.
    """

    label = "finetune"
    exports_best = True
    saves_frozen = False

    def __init__(
        self, model: BestRQ2ForAudioClassification, config: FinetuneConfig, data: LabelledTask, rejections: RejectionLog
    ) -> None:
        super().__init__(model, config.seed)
        self.config, self.data, self.rejections = config, data, rejections
        self.trained = choose_trainable(model, config.mode, config.layers)
        self.targets = data.targets("train")
        self.number = {name: place for place, name in enumerate(data.source("train").names())}
        training = data.source("train")
        self.source = balanced(training, self.targets) if config.balanced else training
        self.rows = training_rows(self.source, model.config, config.seed)
        # As many rows as hold `batch_size` clips on average.
        self.batch_rows = max(1, round(config.batch_size * len(self.rows) / self.rows.clips))
        self.steps_per_epoch = math.ceil(len(self.rows) / self.batch_rows)
        self.max_steps = config.epochs * self.steps_per_epoch

    def forward(self, inputs: Inputs) -> Sums:
        """Sums over the clips of a batch; see `Task.forward`."""
        assert inputs.labels is not None
        clips = len(inputs.labels)
        output = self.model(inputs.input_values, labels=inputs.labels, packing=inputs.packing)
        loss = output.loss if clips else output.logits.sum()  # the mean over no clips is NaN
        return {"loss": loss * clips, "terms": torch.full_like(loss, clips)}

    def inputs(self, batch: AudioBatch, device: torch.device) -> Inputs:
        """A batch with its labels on the device."""
        targets = torch.from_numpy(self.targets[[self.number[name] for name in batch.recordings]])
        labels = targets if self.data.multi_label else targets.argmax(dim=1)
        if self.model.config.encoder_type == "conformer":
            batch = without_empty_rows(batch)
        return Inputs(batch.to(device).input_values, batch.packing, labels=labels.to(device))

    def terms(self, batch: AudioBatch) -> int:
        """Number of clips."""
        return len(batch)

    def summarise(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean loss over the clips."""
        return {"train/loss": sums["loss"] / sums["terms"]}

    def train_mode(self) -> None:
        """Put the trained parts into training mode; what is frozen stays as it is in use."""
        self.model.eval()
        for module in self.trained:
            module.train()

    def validate(self, model: nn.Module, fabric: Fabric, step: int, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss and metrics on the validation recordings, in float32."""
        classifier = AudioClassifier(self.model, fabric.device)
        predictions = self.predictions(classifier, "valid", fabric)
        targets, probabilities = predictions.targets, predictions.probabilities
        several = self.data.multi_label
        metrics = point_metrics(targets, probabilities, several)
        values = {"epoch": step // self.steps_per_epoch, "valid/loss": log_loss(targets, probabilities, several)}
        return values | {f"valid/{name}": value for name, value in metrics.items()}

    def rank(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """The metric of the task; of equal epochs, the lower loss."""
        return values[f"valid/{BEST_BY[self.data.multi_label]}"], -values["valid/loss"]

    def describe(self, values: Mapping[str, float], better: bool) -> str:
        """One line per epoch."""
        metric = BEST_BY[self.data.multi_label]
        return (
            f"epoch {values['epoch']:.0f}/{self.config.epochs}: loss {values.get('train/loss', math.nan):.4f}, "
            f"validation loss {values['valid/loss']:.4f}, {metric} {100 * values[f'valid/{metric}']:.1f} %"
            f"{', the best so far' if better else ''}"
        )

    def export(self, model: nn.Module, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Write the classifier with its code and preprocessor."""
        write_model(folder, self.model)

    def predictions(self, classifier: AudioClassifier, split: str, fabric: Fabric) -> Predictions:
        """Predictions for the readable recordings of a split.

        Processes share the recordings; all get the whole result.

        Raises:
            DataError: no recording can be read.
        """
        source = self.data.source(split)
        own = np.arange(fabric.global_rank, len(source), fabric.world_size)
        part = SubsetSource(source, own, source.name)
        shorter: list[Shorter] = []
        results = classifier.predict(part, self.config.batch_size, self.config.num_workers, shorter)
        found: list[tuple[int, str, np.ndarray]] = []
        with Progress(f"{split} split", len(part), "recordings", leave=False) as progress:
            for place, one in zip(own.tolist(), results, strict=True):
                found.append((place, str(one), np.zeros(0)) if isinstance(one, AudioError) else (place, "", one))
                progress.advance()
        every = sorted((entry for entries in gathered(found) for entry in entries), key=lambda entry: entry[0])
        shorter = [entry for entries in gathered(shorter) for entry in entries]
        if fabric.is_global_zero:
            self.rejections.shorter.add(shorter)
            self.rejections.add([(source.describe(place), reason) for place, reason, _ in every if reason])
        places = [place for place, reason, _ in every if not reason]
        if not places:
            raise DataError(
                f"{source.name}: none of {counted(len(source), 'recording')} can be read; see {self.rejections.path}"
            )
        probabilities = np.stack([values for _, reason, values in every if not reason])
        names = [source.describe(place) for place in places]
        return Predictions(names, self.data.targets(split)[places], probabilities)


def make_classifier(
    encoder: BestRQ2Model, classes: tuple[str, ...], multi_label: bool, max_seconds: float | None, seed: int
) -> BestRQ2ForAudioClassification:
    """The encoder with a new head, a function of the seed.

    Raises:
        ConfigError: the encoder cannot take clips of `max_seconds`.
    """
    settings = {name: getattr(encoder.config, name) for name in (*field_names(), "readout")}
    settings["max_seconds"] = max_seconds or settings["max_seconds"]
    names = dict(enumerate(classes))
    try:
        config = BestRQ2Config(
            **settings,
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type=MULTI if multi_label else SINGLE,
        )
    except ValueError as error:
        raise ConfigError(f"max_seconds is {max_seconds}, which does not fit the model: {error}") from error
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(seed)
        model = BestRQ2ForAudioClassification(config)
    model.bestrq2.load_state_dict(encoder.state_dict())
    return model


def choose_trainable(model: BestRQ2ForAudioClassification, mode: str, layers: int | None) -> list[nn.Module]:
    """Let gradients reach the head ("linear"), also the last blocks and the norm behind them ("partial"), or all.

    Returns:
        The modules that are trained.

    Raises:
        ConfigError: there are fewer blocks than `layers`.
    """
    trained: list[nn.Module] = [model.classifier]
    if mode == "full":
        trained = [model]
    elif mode == "partial":
        assert layers is not None
        encoder = model.bestrq2.encoder
        if layers > len(encoder.blocks):
            raise ConfigError(
                f"layers is {layers}, but the encoder has {len(encoder.blocks)} blocks; give at most that"
            )
        trained += encoder.blocks[-layers:]
        if isinstance(norm := getattr(encoder, "norm", None), nn.Module):
            trained.append(norm)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return trained


def _trainer(config: FinetuneConfig, task: ClassificationTask) -> TrainerConfig:
    """Settings of the loop: everything that is not a step happens after every epoch."""
    device = checked_device(config.device)
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return TrainerConfig(
        max_steps=task.max_steps,
        accelerator=device.type,
        devices=config.devices,
        precision="bf16-mixed" if bfloat16 else "32-true",
        gradient_clip_val=_GRADIENT_NORM,
        log_every_n_steps=task.steps_per_epoch,
        val_every_n_steps=task.steps_per_epoch,
        checkpoint_every_n_steps=task.steps_per_epoch,
    )


def _loader(config: FinetuneConfig, task: ClassificationTask, run: Run) -> Any:
    """Batches of this process from the step on from which the run (re)starts."""
    world, rows = run.fabric.world_size, task.batch_rows
    if rows % world:
        least = math.ceil((math.ceil(rows / world) * world - 0.5) * task.rows.clips / len(task.rows))
        raise ConfigError(
            f"batch_size ({config.batch_size}) makes {counted(rows, 'row')} of {task.model.config.max_seconds:g} s, "
            f"which must be a multiple of the {world} devices; give about {least}"
        )
    return training_batches(
        task.source,
        task.rows,
        task.model.config,
        seed=config.seed,
        batch_rows=rows,
        start_step=run.step,
        num_workers=config.num_workers,
        max_steps=task.max_steps,
        rank=run.fabric.global_rank,
        world_size=world,
    )


def _check_resumable(folder: RunFolder, config: FinetuneConfig, data: LabelledTask) -> None:
    """Check that the run of a folder is the same one.

    Raises:
        ConfigError: naming what differs.
    """
    changes = config.changes_from(folder.read_config())
    before, now = folder.read_environment().get("recordings"), _count(data)
    if before not in (None, now):
        changes.append(f"there were {before} labelled recordings and are now {now}")
    if changes:
        raise ConfigError(
            f"{folder.root}: cannot be resumed with other settings: {'; '.join(changes)}; leave out what "
            "differs, or name a new folder with --output"
        )


def _facts(config: FinetuneConfig, data: LabelledTask) -> dict[str, Any]:
    """Sizes of the splits, and the hub id of the model if it came from there, for environment.json."""
    # What was loaded, but is no path here and not of the package, came from the hub.
    is_here = Path(config.model).exists() or config.model in (*ENCODERS, *recipes())
    sizes = {split: len(data.clips(split)) for split in SPLITS}
    return {"recordings": _count(data), **sizes, "base_model": None if is_here else config.model}


def _count(data: LabelledTask, splits: Sequence[str] = SPLITS) -> int:
    return sum(len(data.clips(split)) for split in splits)
