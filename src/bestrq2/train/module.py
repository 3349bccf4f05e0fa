"""The pretraining step, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from bestrq2._version import __version__
from bestrq2.data.batches import AudioBatch
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.model.outputs import BestRQ2ForPreTrainingOutput
from bestrq2.model.quantizer import code_usage
from bestrq2.train.config import PretrainConfig
from bestrq2.train.optimizer import learning_rate_factor, make_optimizer

# Keeps the random stream of stochastic depth apart from all others.
_DROP_STREAM = 0xD809


@dataclass(frozen=True)
class MaskDrawer:
    """Draws the hidden patches of a batch from (seed, step, place); picklable, so loader workers can carry it.

    A step may be cut into several batches (gradient accumulation): then the batch numbered `step` holds the places from
    `step % batches * clips` on of optimiser step `step // batches`, and the masks are those of the uncut step.
    """

    config: BestRQ2Config
    seed: int
    batches_per_step: int
    clips_per_batch: int

    def __call__(self, lengths: Tensor, step: int, places: Tensor) -> Tensor:
        """Lengths int64 [B] in samples, number of the batch, places int64 [B] to bool [B, N]."""
        columns = [self.config.columns(int(length)) for length in lengths]
        first = step % self.batches_per_step * self.clips_per_batch
        return draw_hidden_mask(
            self.config, columns, self.seed, step // self.batches_per_step, [first + int(place) for place in places]
        )


class PretrainingModule(pl.LightningModule):
    """Trains `BestRQ2ForPreTraining` and reports what tells learning from collapse.

    Args:
        model: what is trained.
        config: of the run.
    """

    def __init__(self, model: BestRQ2ForPreTraining, config: PretrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.latest: dict[str, float] = {}
        self.validation = (float("inf"), 0)  # newest loss and its step
        self._window: dict[str, Tensor] = {}

    def forward(self, batch: AudioBatch, hidden_mask: Tensor | None) -> BestRQ2ForPreTrainingOutput:
        """Loss and diagnostics of one batch."""
        return self.model(batch.input_values, padding_mask(batch), hidden_mask)

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """One batch; every `log_every_n_steps` steps the averages since the last time are logged."""
        # Stochastic depth must not depend on what ran before, so that a resumed run repeats it.
        seed = np.random.SeedSequence([self.config.seed, _DROP_STREAM, batch.step, self.global_rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        output = self(batch, batch.hidden_mask)
        self._window = add_diagnostics(self._window, output)
        step, unfinished = divmod(batch.step + 1, self.config.trainer.accumulate_grad_batches)
        trainer = self.config.trainer
        if not unfinished and (step % trainer.log_every_n_steps == 0 or step == trainer.max_steps):
            self.publish({**summarise("train", self._window), "train/learning_rate": self._learning_rate()}, step)
            self._window = {}
        return output.loss

    def _learning_rate(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def publish(self, values: Mapping[str, Tensor | float], step: int) -> None:
        """Hand values to all loggers and the progress display.

        Lightning's own `log` repeats old values on steps that log nothing; this does not.

        Args:
            values: scalars by name.
            step: steps done, from 1.
        """
        scalars = {name: float(value) for name, value in values.items()}
        self.latest.update(scalars)
        for logger in self.loggers:
            logger.log_metrics(scalars, step)
            logger.save()

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay, stepped every optimiser step."""
        optimizer = make_optimizer(self.model, self.config.optimizer, self.config.trainer.precision)
        steps, settings = self.config.trainer.max_steps, self.config.optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, steps, settings)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients; Lightning's own way refuses fused optimisers under mixed precision."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)

    def transfer_batch_to_device(self, batch: AudioBatch, device: torch.device, dataloader_idx: int) -> AudioBatch:
        """Move the audio; lengths and masks stay on the CPU, where counting them costs no synchronisation."""
        return batch.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint understandable by itself, and the averages not logged yet."""
        checkpoint["bestrq2"] = {
            "version": __version__,
            "config": self.config.to_dict(),
            "window": {key: value.cpu() for key, value in self._window.items()},
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the averages where they were."""
        self._window = dict(checkpoint["bestrq2"]["window"])

    def on_train_start(self) -> None:
        """Move the averages to the device, which is not known yet when a checkpoint is loaded."""
        self._window = {key: value.to(self.device) for key, value in self._window.items()}


def padding_mask(batch: AudioBatch) -> Tensor | None:
    """Bool [B, S] on the CPU, True for samples of a clip; None where no clip is padded."""
    samples = batch.input_values.shape[1]
    if bool((batch.lengths == samples).all()):
        return None
    return torch.arange(samples) < batch.lengths[:, None]


@torch.no_grad()
def add_diagnostics(sums: Mapping[str, Tensor], output: BestRQ2ForPreTrainingOutput) -> dict[str, Tensor]:
    """Sums of loss, accuracy and code counts with those of one more batch; nothing is synchronised."""
    one = torch.ones((), device=output.loss.device)
    new = {"batches": one, "loss": output.loss.detach(), "accuracy": output.accuracy, "codes": output.code_counts}
    return {name: sums[name] + value if name in sums else value.clone() for name, value in new.items()}


def summarise(stage: str, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages under the names that are logged, over all processes.

    Args:
        stage: "train" or "validation", put in front of every name.
        sums: as `add_diagnostics` made them. The usage of codes is that of all batches together.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in sums.values():
            torch.distributed.all_reduce(value)
    loss = sums["loss"] / sums["batches"]
    usage = code_usage(sums["codes"])
    return {
        f"{stage}/loss": loss,
        f"{stage}/excess_loss": loss - usage.entropy,
        f"{stage}/accuracy": sums["accuracy"] / sums["batches"],
        f"{stage}/target_entropy": usage.entropy,
        f"{stage}/code_perplexity": usage.perplexity,
        f"{stage}/code_coverage": usage.coverage,
        f"{stage}/top_code_share": usage.top_share,
    }
