"""Fine-tuning: an encoder and a linear head on labelled recordings, from a model to a run folder."""

from __future__ import annotations

import csv
import errno
import io
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from bestrq2.convert.hub import write_model
from bestrq2.convert.loading import load_encoder
from bestrq2.convert.weights import quiet_hub, write_exported_step
from bestrq2.data.batch import AudioBatch
from bestrq2.data.labels import LabelledTask, load_task
from bestrq2.data.loader import end_workers, training_batches
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.splits import SPLITS, balanced
from bestrq2.errors import BestRQ2Error, ConfigError, DataError, StoppedBySignal
from bestrq2.evaluate.finetuned import finetune_result, read_finetune_result, write_finetune_result
from bestrq2.evaluate.metrics import BEST_BY, log_loss, point_metrics
from bestrq2.evaluate.provenance import model_name, software_provenance
from bestrq2.evaluate.result import Result
from bestrq2.files import disk_errors, folder_lock, write_folder, write_text
from bestrq2.inference.classifier import AudioClassifier, load_classifier
from bestrq2.model.configuration_bestrq2 import BestRQ2Config, field_names
from bestrq2.model.modeling_bestrq2 import MULTI, SINGLE, BestRQ2ForAudioClassification, BestRQ2Model
from bestrq2.recipe_book import recipes
from bestrq2.seeding import generator
from bestrq2.text import counted
from bestrq2.train.checkpoints import CheckpointStore
from bestrq2.train.finetune_settings import FinetuneConfig, choose_trainable, layer_groups, peak_rate
from bestrq2.train.module import unequal_lengths
from bestrq2.train.optimizer import learning_rate_factor
from bestrq2.train.run_folder import RunFolder

logger = logging.getLogger(__name__)

_GRADIENT_NORM = 1.0
# First word of the seed sequence of stochastic depth and dropout.
_NOISE = 0xF17E


def finetune(
    model: str | os.PathLike[str],
    labelled: str | os.PathLike[str],
    output: str | os.PathLike[str],
    mode: str = "full",
    layers: int | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float | None = None,
    weight_decay: float = 0.05,
    warmup_fraction: float = 0.1,
    layer_decay: float = 1.0,
    balanced: bool = False,
    max_seconds: float | None = None,
    seed: int = 0,
    num_workers: int = 1,
    device: str | None = None,
    resume: bool = False,
) -> Result:
    """Fine-tune an encoder as a classifier of recordings; the epoch that is best in validation is kept and tested.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        labelled: folder with one subfolder a class (optionally inside `train`, `valid` and `test`), table with path and
            label (or labels, for several classes a recording, with ";" between them), or WebDataset tars with labels.
        output: run folder to write.
        mode: what is trained: "linear" (the head alone), "partial" (also the last `layers` blocks) or "full".
        layers: of "partial", how many blocks.
        epochs: passes over the training recordings.
        batch_size: clips a step.
        lr: peak learning rate; 1e-3 for "linear", else 1e-4 by default.
        weight_decay: of AdamW, for matrices.
        warmup_fraction: share of the steps in which the rate rises; a cosine down to nearly 0 follows.
        layer_decay: factor of the learning rate from each block to the one before it; 1 for the same rate everywhere.
        balanced: draw recordings of rare classes as often as those of frequent ones.
        max_seconds: longest random crop in training, and the window in which longer recordings are classified; that of
            the model by default.
        seed: of splits that are not given, head, order and crops.
        num_workers: processes that decode; 0 decodes in this one.
        device: such as "cpu" or "cuda:0"; CUDA, with bfloat16, where there is one by default.
        resume: continue the run in `output` after its last whole epoch; start it if there is none.

    Returns:
        Scores on the test recordings, and the run folder.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
        KeyboardInterrupt: if it was stopped by Ctrl-C; the run can be resumed.
    """
    config = FinetuneConfig(
        os.fspath(model), os.fspath(labelled), Path(output), mode, layers, epochs, batch_size, peak_rate(mode, lr),
        weight_decay, warmup_fraction, layer_decay, balanced, max_seconds, seed, num_workers, device,
    )  # fmt: skip
    folder = RunFolder(config.output)
    data = load_task(labelled, seed)
    if resume and folder.config.exists():
        _check_resumable(folder, config, data)
    classifier = make_classifier(load_encoder(config.model), data.classes, data.multi_label, max_seconds, seed)
    trained = choose_trainable(classifier, mode, layers)
    folder.create(resume)
    with disk_errors(folder.root), folder_lock(folder.root):
        folder.remove_leftovers()
        run = _Run(config, folder, data, classifier, trained)
        if run.epoch == epochs and (known := read_finetune_result(folder.root)) is not None:
            logger.info("%s: all %d epochs are done already", folder.root, epochs)
            return known
        folder.write_config(config.to_dict())
        counts = {split: len(data.clips(split)) for split in SPLITS}
        # What was loaded, but lies nowhere here and is no recipe, came from the hub.
        is_here = Path(config.model).exists() or config.model in recipes()
        base = None if is_here else config.model
        folder.write_environment({"recordings": sum(counts.values()), **counts, "base_model": base})
        try:
            run.fit()
            return run.test()
        except KeyboardInterrupt as interrupt:
            message = f"{run.epoch} of {epochs} epochs of {folder.root} are done and saved; add --resume to continue"
            raise StoppedBySignal(message, int(getattr(interrupt, "signal", 2))) from interrupt


def _check_resumable(folder: RunFolder, config: FinetuneConfig, data: LabelledTask) -> None:
    old = folder.read_config()
    if "labelled" not in old:
        raise ConfigError(f"{folder.root}: holds another kind of run; name a new folder with --output")
    changes = config.changes_from(old)
    before = folder.read_environment().get("recordings")
    now = sum(len(data.clips(split)) for split in SPLITS)
    if before not in (None, now):
        changes.append(f"there were {before} labelled recordings and are now {now}")
    if changes:
        raise ConfigError(f"{folder.root}: cannot be resumed with other settings: {'; '.join(changes)}")


def make_classifier(
    encoder: BestRQ2Model, classes: tuple[str, ...], multi_label: bool, max_seconds: float | None, seed: int
) -> BestRQ2ForAudioClassification:
    """The encoder with a new head, a function of the seed.

    Raises:
        ConfigError: the encoder cannot take clips of `max_seconds`.
    """
    settings = {name: getattr(encoder.config, name) for name in field_names()}
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


class _Run:
    """The state of one run: `epoch` epochs are done."""

    def __init__(
        self,
        config: FinetuneConfig,
        folder: RunFolder,
        data: LabelledTask,
        model: BestRQ2ForAudioClassification,
        trained: list[nn.Module],
    ) -> None:
        self.config, self.folder, self.data, self.model, self.trained = config, folder, data, model, trained
        self.classifier = AudioClassifier(model, config.device)
        self.device = self.classifier.device
        self.optimizer = torch.optim.AdamW(layer_groups(model, config), lr=config.lr)
        self.rejections = RejectionLog(folder.rejected)
        training = data.source("train")
        self.targets = data.targets("train")
        self.number = {name: place for place, name in enumerate(training.names())}
        self.steps_per_epoch = math.ceil(len(training) / config.batch_size)
        self.store = CheckpointStore(folder.checkpoints)
        self.history: list[dict[str, float]] = []
        self._restore()

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def best(self) -> int:
        """The epoch (from 1) that is best in validation; of equals that of the lowest loss, of these the first."""
        metric = f"valid/{BEST_BY[self.data.multi_label]}"
        ranks = [(row[metric], -row["valid/loss"]) for row in self.history]
        return 1 + ranks.index(max(ranks))

    def _restore(self) -> None:
        """Take up the newest whole state, if there is one."""
        _, path = self.store.newest()
        if path is None:
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]

    def fit(self) -> None:
        """Train the epochs that are left; each leaves a state, metrics and, if it is the best, the model."""
        if self.epoch == self.config.epochs:
            return
        loader = self._loader()
        bar = tqdm(
            total=self.config.epochs * self.steps_per_epoch, initial=self.epoch * self.steps_per_epoch,
            desc="finetune", unit="step", disable=None, dynamic_ncols=True,
        )  # fmt: skip
        try:
            batches = iter(loader)
            while self.epoch < self.config.epochs:
                self._fit_epoch(batches, bar)
        finally:
            bar.close()
            end_workers(loader)

    def _loader(self) -> Any:
        config, training = self.config, self.data.source("train")
        if config.balanced:
            training = balanced(training, self.targets)
        architecture = self.model.config
        steps = self.steps_per_epoch
        return training_batches(
            training,
            sampling_rate=architecture.sampling_rate,
            max_seconds=architecture.max_seconds,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=self.epoch * steps,
            num_workers=config.num_workers,
            max_steps=config.epochs * steps,
        )

    def _fit_epoch(self, batches: Iterator[AudioBatch], bar: tqdm) -> None:
        self.model.eval()  # what is frozen stays as it is in use
        for module in self.trained:
            module.train()
        losses = []
        for _ in range(self.steps_per_epoch):
            batch = next(batches)
            self.rejections.add(batch.rejected)
            losses.append(self._step(batch))
            bar.update()
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise BestRQ2Error(
                f"{self.folder.root}: the loss of epoch {self.epoch + 1} is not finite; lower --lr (it is "
                f"{self.config.lr:g})"
            )
        _, targets, probabilities = self._predictions("valid")
        found = point_metrics(targets, probabilities, self.data.multi_label)
        row = {"step": float((self.epoch + 1) * self.steps_per_epoch), "train/loss": loss}
        row |= {"valid/loss": log_loss(targets, probabilities, self.data.multi_label)}
        self.history.append(row | {f"valid/{name}": value for name, value in found.items()})
        self._save()
        metric = BEST_BY[self.data.multi_label]
        best = ", the best so far" if self.best == self.epoch else ""
        bar.clear()
        logger.info(
            "epoch %d/%d: loss %.4f, validation loss %.4f, %s %.1f %%%s",
            self.epoch, self.config.epochs, loss, row["valid/loss"], metric, 100 * found[metric], best,
        )  # fmt: skip

    def _step(self, batch: AudioBatch) -> Tensor:
        """One step; the loss, which costs no synchronisation."""
        config = self.config
        factor = learning_rate_factor(batch.step, config.epochs * self.steps_per_epoch, config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        torch.manual_seed(int(generator(_NOISE, config.seed, batch.step).integers(2**62)))
        mask = _padding_mask(batch)
        targets = torch.from_numpy(self.targets[[self.number[name] for name in batch.recordings]])
        labels = targets if self.data.multi_label else targets.argmax(dim=1)
        bfloat16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            loss = self.model(batch.to(self.device).input_values, mask, labels.to(self.device)).loss
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        self.optimizer.step()
        return loss.detach()

    def _predictions(self, split: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names, targets and probabilities [recordings, classes] of what can be read of a split."""
        source = self.data.source(split)
        names, places, probabilities = [], [], []
        for found in self.classifier.predict(source, self.config.batch_size, self.config.num_workers):
            name = source.describe(found.recording)
            if found.reason:
                self.rejections.add([(name, found.reason)])
                continue
            names.append(name)
            places.append(found.recording)
            probabilities.append(found.probabilities)
        if not names:
            raise DataError(
                f"{source.name}: not one of {counted(len(source), 'recording')} can be read; see {self.rejections.path}"
            )
        return names, self.data.targets(split)[places], np.stack(probabilities)

    def _save(self) -> None:
        """Write what the epoch just done leaves: first the model if it is the best, then the state, then the table."""
        step = int(self.history[-1]["step"])
        if self.best == self.epoch:
            write_folder(self.folder.model, lambda folder: self._write_model(folder, step))
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name in trained}
        state = {"model": weights, "optimizer": self.optimizer.state_dict(), "history": self.history}
        self.store.write(step, state)
        self.store.prune(step)
        table = io.StringIO()
        writer = csv.DictWriter(table, ["step", "epoch", *list(self.history[0])[1:]], lineterminator="\n")
        writer.writeheader()
        for number, row in enumerate(self.history, 1):
            writer.writerow({**row, "step": int(row["step"]), "epoch": number})
        write_text(self.folder.metrics, table.getvalue())

    def _write_model(self, folder: Path, step: int) -> None:
        try:
            write_model(folder, self.model)
        except SafetensorError as error:  # hides the number of the system's error
            raise OSError(errno.ENOSPC, str(error)) from error
        write_exported_step(folder, step)

    def test(self) -> Result:
        """Score the best epoch's model on the test recordings, and write what came out."""
        self.classifier = load_classifier(self.folder.root, self.device)
        names, targets, probabilities = self._predictions("test")
        config = self.config
        provenance = software_provenance(["bestrq2 finetune", config.model, config.labelled])
        result = finetune_result(
            model_name(self.folder.root), self.data.classes, self.data.multi_label, self.best, targets, probabilities,
            config.seed, provenance,
        )  # fmt: skip
        write_finetune_result(self.folder.root, result, names, targets, probabilities)
        return result


def _padding_mask(batch: AudioBatch) -> Tensor | None:
    """Bool [B, S] on the CPU, True for samples of a clip; None where no clip is padded."""
    lengths = unequal_lengths(batch)
    return None if lengths is None else torch.arange(batch.input_values.shape[1]) < lengths[:, None]
