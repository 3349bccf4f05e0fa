"""What happens beside the training step: validation, online probe, checkpoints, rejected files, stopping."""

from __future__ import annotations

import errno
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors import SafetensorError
from torch import Tensor

from bestrq2.convert.weights import quiet_hub
from bestrq2.data.batches import AudioBatch
from bestrq2.data.rejections import RejectionLog
from bestrq2.evaluate.online import OnlineProbe
from bestrq2.files import disk_errors, whole_file, write_folder
from bestrq2.inference.embedder import Embedder
from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.train.module import PretrainingModule, add_diagnostics, padding_mask, summarise
from bestrq2.train.run_folder import RunFolder

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


def model_in_use(trainer: pl.Trainer, module: PretrainingModule) -> BestRQ2ForPreTraining:
    """The model that is validated, probed and exported: averaged weights where there are any."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MovingAverage) and callback.averaged is not None:
            return callback.averaged.model
    return module.model


class Evaluation(pl.Callback):
    """Validation loss on held-out clips with fixed masks, and the online probe.

    Args:
        batches: of held-out clips.
        probe: None for none.
    """

    def __init__(self, batches: Sequence[AudioBatch], probe: OnlineProbe | None) -> None:
        self.batches = batches
        self.probe = probe

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluate after the steps the configuration names, and after the last one."""
        step = finished_step(module, batch)
        if step is None:
            return
        settings, last = module.config.trainer, step == module.config.trainer.max_steps
        every = settings.val_every_n_steps
        values: dict[str, Tensor | float] = {}
        if self.batches and every and (step % every == 0 or last):
            values |= self.validate(trainer, module)
        if self.probe is not None and (step % module.config.probe.every_n_steps == 0 or last):
            model = model_in_use(trainer, module).base_model
            values |= self.probe.run(Embedder(model, module.device, name="encoder"))
        module.model.train()
        if values:
            module.publish(values, step)
            if "validation/loss" in values:
                module.validation = (float(values["validation/loss"]), step)

    @torch.no_grad()
    def validate(self, trainer: pl.Trainer, module: PretrainingModule) -> dict[str, Tensor]:
        """Averages over all held-out clips."""
        model = model_in_use(trainer, module).eval()
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(self.batches):
            columns = [model.config.columns(int(length)) for length in batch.lengths]
            mask = draw_hidden_mask(model.config, columns, _VALIDATION_SEED, index, batch.places.tolist())
            with trainer.precision_plugin.forward_context():
                sums = add_diagnostics(sums, model(batch.to(module.device).input_values, padding_mask(batch), mask))
        return summarise("validation", sums)


class RunKeeper(pl.Callback):
    """Writes checkpoints, the model folder and the list of rejected files, and stops cleanly on Ctrl-C.

    Args:
        folder: of the run.
        rejections: where rejected recordings are listed.
    """

    def __init__(self, folder: RunFolder, rejections: RejectionLog) -> None:
        self.folder = folder
        self.rejections = rejections
        self.interrupted = False
        self.best = float("inf")

    def state_dict(self) -> dict[str, Any]:
        """The best validation loss so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best validation loss so far."""
        self.best = state_dict["best"]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this block the first Ctrl-C (or SIGTERM) ends training after the step, the second at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            logger.warning("stopping after this step; press Ctrl-C again to stop at once")

        if threading.current_thread() is not threading.main_thread():
            yield  # whoever runs the thread stops it
            return
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """List rejected files; checkpoint when it is time or the run is to stop."""
        if batch.rejected and trainer.is_global_zero and self.rejections.add(batch.rejected):
            logger.info("%d recordings rejected so far, listed in %s", len(self.rejections), self.rejections.path)
        step = finished_step(module, batch)
        if step is None:
            return
        settings = module.config.trainer
        due = step % settings.checkpoint_every_n_steps == 0 or step == settings.max_steps
        loss, validated = module.validation
        if validated == step and loss < self.best:
            self.best = loss
            self._save(trainer, "best.ckpt")
        if due or self.interrupted:
            # The model first: whoever finds the checkpoint of a step finds its model too.
            self._export(trainer, module)
            self._save(trainer, "last.ckpt")
        if self.interrupted:
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        with disk_errors(self.folder.root), whole_file(self.folder.checkpoints / name) as temporary:
            trainer.save_checkpoint(temporary)

    def _export(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        if not trainer.is_global_zero:
            return
        model = model_in_use(trainer, module)
        extractor = BestRQ2FeatureExtractor(sampling_rate=model.config.sampling_rate)

        def fill(folder: Path) -> None:
            try:
                with quiet_hub():
                    model.save_pretrained(folder)
                    extractor.save_pretrained(folder)
            except SafetensorError as error:  # hides the number of the system's error
                raise OSError(errno.ENOSPC, str(error)) from error

        with disk_errors(self.folder.root):
            write_folder(self.folder.model, fill)
