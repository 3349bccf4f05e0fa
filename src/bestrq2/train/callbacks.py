"""What happens beside the training step: validation, checkpoints, rejected files, stopping."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bestrq2.convert.weights import quiet_hub, write_exported_step
from bestrq2.data.batch import AudioBatch
from bestrq2.data.rejections import RejectionLog
from bestrq2.errors import ConfigError
from bestrq2.files import write_folder
from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.text import counted
from bestrq2.train.checkpoints import RunCheckpointIO
from bestrq2.train.module import PretrainingModule, add_diagnostics, summarise, unequal_lengths
from bestrq2.train.processes import gathered
from bestrq2.train.run_folder import RunFolder
from bestrq2.train.stopping import StopRequest

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 0x7A11D


def finished_step(module: PretrainingModule, batch: AudioBatch) -> int | None:
    """Number of the optimiser step (from 1) that this batch completed; None in the middle of an accumulation."""
    step, unfinished = divmod(batch.step + 1, module.config.trainer.accumulate_grad_batches)
    return None if unfinished else step


class MovingAverage(EMAWeightAveraging):
    """Exponential moving average of the weights that starts after the warm-up.

    Args:
        decay: share of the average kept at each step.
        start: steps before the first update.
    """

    def __init__(self, decay: float, start: int) -> None:
        # Frozen buffers would only gather rounding errors.
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=start)

    @property
    def averaged(self) -> PretrainingModule | None:
        """The module with averaged weights; None before the first update."""
        average: Any = self._average_model
        return average.module if average is not None and int(average.n_averaged) > 0 else None


def whole_state(trainer: pl.Trainer, module: PretrainingModule) -> dict[str, Tensor] | None:
    """The weights of a model that is cut into shards, put together on the first process; None where it is whole."""
    if not isinstance(module.model, FSDPModule):
        return None
    state = trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix("model."): value for name, value in state.items()}


@contextmanager
def usable_parts(model: BestRQ2ForPreTraining) -> Iterator[None]:
    """In this block parts of a model may be called by themselves, also where it is cut into shards."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def model_in_use(trainer: pl.Trainer, module: PretrainingModule) -> BestRQ2ForPreTraining:
    """The model that is validated, probed and exported: averaged weights where there are any."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MovingAverage) and callback.averaged is not None:
            return callback.averaged.model
    return module.model


class Evaluation(pl.Callback):
    """Validation loss on held-out clips with fixed masks.

    Args:
        batches: of held-out clips.
    """

    def __init__(self, batches: Sequence[AudioBatch]) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluate after the steps the configuration names, and after the last one."""
        step, settings = finished_step(module, batch), module.config.trainer
        every = settings.val_every_n_steps
        if step is None or not self.batches or not every or (step % every and step != settings.max_steps):
            return
        with usable_parts(module.model):
            values = self.validate(trainer, module)
        module.model.train()
        module.publish(values, step)
        # The same number everywhere: it decides whether all save together.
        module.validation = (trainer.strategy.broadcast(float(values["validation/loss"])), step)

    @torch.no_grad()
    def validate(self, trainer: pl.Trainer, module: PretrainingModule) -> dict[str, Tensor]:
        """Averages over all held-out clips."""
        model = model_in_use(trainer, module).eval()
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(self.batches):
            columns = [model.config.columns(int(length)) for length in batch.lengths]
            mask = draw_hidden_mask(model.config, columns, _VALIDATION_SEED, index, batch.places.tolist(), masks=1)
            with trainer.precision_plugin.forward_context():
                values, lengths = batch.to(module.device).input_values, unequal_lengths(batch)
                output = model(values, hidden_mask=mask, lengths=lengths, output_logits=False)
            sums = add_diagnostics(sums, output)
        return summarise("validation", sums)


class RunKeeper(pl.Callback):
    """Writes checkpoints, the model folder and the list of rejected files, and stops where it is asked to.

    Args:
        folder: of the run.
        rejections: where rejected recordings are listed.
        io: how states are saved.
        stop: who asks to stop.
        start: steps done before.
    """

    def __init__(
        self, folder: RunFolder, rejections: RejectionLog, io: RunCheckpointIO, stop: StopRequest, start: int
    ) -> None:
        self.folder = folder
        self.rejections = rejections
        self.io = io
        self.stop = stop
        self.start = start
        self.best = float("inf")
        self._rejected: list[tuple[str, str]] = []

    def state_dict(self) -> dict[str, Any]:
        """The best validation loss so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best validation loss so far."""
        self.best = state_dict["best"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check, before anything is restored, that all processes see the same run.

        Raises:
            ConfigError: if they do not.
        """
        starts = gathered(self.start)
        if len(set(starts)) > 1:
            raise ConfigError(
                f"{self.folder.root}: the processes find checkpoints of different steps there ({sorted(set(starts))}); "
                "put the run on storage that all machines share"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals."""
        self.stop.take_over()
        self.stop.connect()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """List rejected files; checkpoint when it is time or the run is to stop."""
        self._rejected += batch.rejected
        step = finished_step(module, batch)
        if step is None:
            return
        settings = module.config.trainer
        stopping = self.stop.agreed()
        due = step % settings.checkpoint_every_n_steps == 0 or step == settings.max_steps or stopping
        if due or trainer.world_size == 1:
            self._list_rejected(trainer)
        loss, validated = module.validation
        best = validated == step and loss < self.best
        if best:
            self.best = loss
        if due:
            # The model first: whoever finds the checkpoint of a step finds its model too.
            self._export(trainer, module, step)
        if due or best:
            trainer.save_checkpoint(self.io.store.path(step))
            if trainer.is_global_zero and self.io.failure is None:
                if best:
                    self.io.store.mark_best(step)
                self.io.store.prune(step)
        if stopping:
            trainer.should_stop = True

    def _list_rejected(self, trainer: pl.Trainer) -> None:
        rejected = [entry for entries in gathered(self._rejected) for entry in entries]
        self._rejected = []
        if trainer.is_global_zero and rejected and self.rejections.add(rejected):
            count = counted(len(self.rejections), "recording")
            logger.info("%s rejected so far, listed in %s", count, self.rejections.path)

    def _export(self, trainer: pl.Trainer, module: PretrainingModule, step: int) -> None:
        state = whole_state(trainer, module)
        if not trainer.is_global_zero:
            return
        model = model_in_use(trainer, module)
        extractor = BestRQ2FeatureExtractor(sampling_rate=model.config.sampling_rate)

        def fill(folder: Path) -> None:
            try:
                with quiet_hub():
                    model.save_pretrained(folder, state_dict=state)
                    extractor.save_pretrained(folder)
                write_exported_step(folder, step)
            except SafetensorError as error:  # hides the number of the system's error
                raise OSError(errno.ENOSPC, str(error)) from error

        try:
            write_folder(self.folder.model, fill)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); training goes on", self.folder.model, error.strerror or error)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No more steps follow."""
        self.stop.close()
