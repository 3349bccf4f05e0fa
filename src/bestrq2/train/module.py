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
from torch.distributed.fsdp import FSDPModule, fully_shard

from bestrq2._version import __version__
from bestrq2.data.batch import AudioBatch
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.conformer import Conformer, ConformerBlock
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2ForPreTrainingOutput
from bestrq2.model.quantizer import code_usage
from bestrq2.model.transformer import Block, Transformer
from bestrq2.train.guard import Guard
from bestrq2.train.optimizer import learning_rate_factor, make_optimizer
from bestrq2.train.processes import all_reduced, connected, gathered
from bestrq2.train.settings import PretrainConfig

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
        self.guard = Guard()
        self._window: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}  # sums of the step in hand, and its number
        self._step_number = 0

    def forward(self, batch: AudioBatch, hidden_mask: Tensor | None) -> BestRQ2ForPreTrainingOutput:
        """Loss and diagnostics of one batch, without logits."""
        return self.model(
            batch.input_values, hidden_mask=hidden_mask, lengths=unequal_lengths(batch), output_logits=False
        )

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """One batch of a step."""
        seed_stochastic_depth(self.config.seed, batch.step, self.global_rank, self.device)
        output = self(batch, batch.hidden_mask)
        self._step = add_diagnostics(self._step, output)
        self._step_number = batch.step // self.config.trainer.accumulate_grad_batches + 1
        return self.guard.see(output.loss) * share_of_step(output.hidden_valid.sum())

    def _close_step(self) -> None:
        """Count the step in; every `log_every_n_steps` steps the averages since the last time are logged.

        Steps that were left out are not in the averages; `train/skipped_steps` is how many there were since the start.
        """
        step, trainer = self._step_number, self.config.trainer
        kept = self.guard.kept(self._step)
        self._window = {name: self._window[name] + value if self._window else value for name, value in kept.items()}
        self._step = {}
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            means = summarise("train", all_reduced(self._window))
            means["train/skipped_steps"] = self.guard.skipped
            self.publish({**means, "train/learning_rate": self._learning_rate()}, step)
            self._window = {}

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
        # Lightning's word for the precision: on a CPU it makes bfloat16 of float16, and there is no gradient scaler.
        optimizer = make_optimizer(self.model, self.config.optimizer, self.trainer.precision)
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
        """See that the gradients are finite, and clip their norm; Lightning calls this before every optimiser step.

        Lightning's own clipping refuses fused optimisers under mixed precision.
        """
        norm = self.guard.judge(self.model.parameters(), optimizer)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), gradient_clip_val, norm)
        self._close_step()

    def transfer_batch_to_device(self, batch: AudioBatch, device: torch.device, dataloader_idx: int) -> AudioBatch:
        """Move the audio; lengths and masks stay on the CPU, where counting them costs no synchronisation."""
        return batch.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint understandable by itself, averages not logged yet, and skipped steps."""
        checkpoint["bestrq2"] = {
            "version": __version__,
            "config": self.config.to_dict(),
            "guard": self.guard.state_dict(),
            "windows": gathered({key: value.cpu() for key, value in self._window.items()}),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the averages where they were; the first process takes them all where there are fewer or more now."""
        self.guard.load_state_dict(checkpoint["bestrq2"]["guard"])
        windows, rank = checkpoint["bestrq2"]["windows"], self.global_rank
        if len(windows) == self.trainer.world_size:
            self._window = dict(windows[rank])
        else:
            totals = {key: torch.stack([window[key] for window in windows]).sum(dim=0) for key in windows[0]}
            self._window = totals if rank == 0 else {}

    def on_train_start(self) -> None:
        """Move the averages to the device, not known yet when a checkpoint is loaded, and take the rate of this step.

        A state holds the rate of the run as it was planned then; a run that was extended follows its new curve.
        """
        self.guard.to(self.device)
        self._window = {key: value.to(self.device) for key, value in self._window.items()}
        for scheduler in self.trainer.lr_scheduler_configs:
            for group, rate in zip(self.trainer.optimizers[0].param_groups, scheduler.scheduler.base_lrs, strict=True):
                group["lr"] = rate * learning_rate_factor(
                    self.trainer.global_step, self.config.trainer.max_steps, self.config.optimizer
                )


class ShardedPretrainingModule(PretrainingModule):
    """The same training with weights, gradients and optimiser state cut into shards (FSDP).

    Every block is gathered when it is needed; what lies outside of the blocks is gathered once a step.
    """

    def configure_model(self) -> None:
        """Cut the model along the mesh of devices."""
        if isinstance(self.model, FSDPModule) or self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for part in self.model.modules():
            if isinstance(part, Block | ConformerBlock):
                fully_shard(part, mesh=mesh)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False)


def checkpoint_activations(model: BestRQ2ForPreTraining) -> None:
    """Let encoder and predictor recompute their activations in the backward pass, to save memory."""
    for part in model.modules():
        if isinstance(part, Transformer | Conformer):
            part.gradient_checkpointing = True


def seed_stochastic_depth(seed: int, batch: int, rank: int, device: torch.device) -> None:
    """Draw stochastic depth from (seed of the run, number of the batch, process) and not from what ran before.

    So a resumed run repeats it. Only this device's generator and the CPU's are seeded: `torch.manual_seed` also puts
    down a stack trace for every kind of accelerator that is not there, which takes longer than all other work of a step
    that is not the device's.
    """
    state = int(np.random.SeedSequence([seed, _DROP_STREAM, batch, rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(state)


def share_of_step(patches: Tensor) -> Tensor | float:
    """What the mean over this process's patches is multiplied by, so that the mean over processes is that over patches.

    Clips of unequal length hide unequally many patches; equal weights would make several processes learn something
    else than one with all their clips.

    Args:
        patches: int64 [], hidden patches of this process's batch.
    """
    if not connected():
        return 1.0
    total = patches.float()
    torch.distributed.all_reduce(total)
    return patches * torch.distributed.get_world_size() / total


def unequal_lengths(batch: AudioBatch) -> Tensor | None:
    """Samples of each clip, int64 [B] on the CPU; None where no clip is padded."""
    return None if bool((batch.lengths == batch.input_values.shape[1]).all()) else batch.lengths


@torch.no_grad()
def add_diagnostics(sums: Mapping[str, Tensor], output: BestRQ2ForPreTrainingOutput) -> dict[str, Tensor]:
    """Sums over hidden patches of loss, accuracy and codes with those of one more batch; nothing is synchronised."""
    patches = output.hidden_valid.sum().float()
    new = {
        "patches": patches,
        "loss": output.loss.detach() * patches,
        "accuracy": output.accuracy * patches,
        "codes": output.code_counts,
    }
    return {name: sums[name] + value if name in sums else value.clone() for name, value in new.items()}


def summarise(stage: str, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages over hidden patches under the names that are logged.

    Args:
        stage: "train" or "validation", put in front of every name.
        sums: as `add_diagnostics` made them. The usage of codes is that of all batches together.
    """
    loss = sums["loss"] / sums["patches"]
    usage = code_usage(sums["codes"])
    return {
        f"{stage}/loss": loss,
        f"{stage}/excess_loss": loss - usage.entropy,
        f"{stage}/accuracy": sums["accuracy"] / sums["patches"],
        f"{stage}/target_entropy": usage.entropy,
        f"{stage}/code_perplexity": usage.perplexity,
        f"{stage}/code_coverage": usage.coverage,
        f"{stage}/top_code_share": usage.top_share,
    }
