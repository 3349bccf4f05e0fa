"""The pretraining objective: masks, the loss over hidden patches, and diagnostics that tell learning from collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bestrq2.convert.weights import quiet_hub, refuse_beyond_memory
from bestrq2.data.batch import AudioBatch, fixed_batches
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor
from bestrq2.model.fields import FIELD_TYPES, ModelFields
from bestrq2.model.masking import draw_packed_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.model.quantizer import code_usage
from bestrq2.train.settings import PretrainConfig
from bestrq2.train.task import Inputs, Sums, Task, added, without_empty_rows
from bestrq2.train.teacher import Teacher

_VALIDATION_SEED = 0x7A11D
_VALIDATION_ROWS = 16


@dataclass(frozen=True)
class MaskDrawer:
    """Draws the hidden patches of a batch from (seed, step, place); picklable, so that loader workers can use it.

    A step may be cut into several batches (gradient accumulation): then the batch numbered `step` holds the rows from
    `step % batches * rows` on of optimiser step `step // batches`, and the masks are those of the uncut step.
    """

    config: BestRQ2Config
    seed: int
    batches_per_step: int
    rows_per_batch: int

    def __call__(self, segments: Tensor, step: int, places: Tensor) -> Tensor:
        """Clips int64 [R, C] as in `Packing`, number of the batch, places int64 [R] to bool [R, N]."""
        first = step % self.batches_per_step * self.rows_per_batch
        return draw_packed_mask(
            self.config, segments, self.seed, step // self.batches_per_step, [first + int(place) for place in places]
        )


class PretrainingTask(Task):
    """Names the codes of hidden patches (paper section 2).

    Args:
        model: pretraining model.
        seed: random seed of stochastic depth, dropout and noise.
        held_out: waveforms for the validation loss, float32 [samples] each; none for no validation.
        teacher: gives the codes of half of the codebooks; None for random codebooks alone.
    """

    label = "pretrain"
    # Codes of one recording are alike, so those of a few recordings have too little entropy, which no correction for
    # independent draws makes up for. The quantizer is frozen: all codes since the first step are of one distribution.
    running_sums = ("codes",)

    def __init__(
        self,
        model: BestRQ2ForPreTraining,
        seed: int,
        held_out: Sequence[np.ndarray] = (),
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(model, seed)
        self.teacher = teacher
        self.validation_batches = fixed_batches(list(held_out), model.config, _VALIDATION_ROWS) if held_out else []

    def forward(self, inputs: Inputs) -> Sums:
        """Sums over the hidden patches of a batch; see `Task.forward`."""
        sums = _sums(self.model, inputs, self.teacher)
        return sums if inputs.counts else {name: 0 * value for name, value in sums.items()}

    def inputs(self, batch: AudioBatch, device: torch.device) -> Inputs:
        """A batch on the device; packing and masks stay on the CPU, where counting them costs no synchronisation."""
        if self.model.config.encoder_type == "conformer":
            batch = without_empty_rows(batch)
        return Inputs(batch.to(device).input_values, batch.packing, batch.hidden_mask, counts=len(batch.lengths) > 0)

    def terms(self, batch: AudioBatch) -> int:
        """Number of hidden patches."""
        assert batch.hidden_mask is not None
        # The mask also marks empty patches, so that all rows have equally many.
        in_a_clip = batch.packing.patch_segments(self.model.config.patch_rows) != 0
        of_mask = in_a_clip if batch.hidden_mask.ndim == 2 else in_a_clip[:, None]
        return int((batch.hidden_mask & of_mask).sum())

    def summarise(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averages over the hidden patches of several steps, and the usage of codes since the first step."""
        usage = code_usage(sums["codes"])
        averages = _averages("train", sums, usage.entropy)
        return averages | {
            "train/target_entropy": usage.entropy,
            "train/code_perplexity": usage.perplexity,
            "train/code_coverage": usage.coverage,
            "train/top_code_share": usage.top_share,
        }

    @torch.no_grad()
    def validate(self, model: nn.Module, fabric: Fabric, step: int, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Averages over all held-out clips with masks that are the same every time; the entropy is that of training."""
        if not self.validation_batches:
            return {}
        model.eval()
        config = self.model.config
        total: Sums = {}
        for index, batch in enumerate(self.validation_batches):
            mask = draw_packed_mask(config, batch.packing.segments, _VALIDATION_SEED, index, batch.places.tolist())
            inputs = Inputs(batch.to(fabric.device).input_values, batch.packing, mask)
            with fabric.autocast():
                total = added(total, _sums(model, inputs, self.teacher))
        averages = _averages("validation", total, code_usage(sums["codes"]).entropy)
        return {name: float(value) for name, value in averages.items()}

    def describe(self, values: Mapping[str, float], better: bool) -> str:
        """One line on a validation."""
        return (
            f"step {values['step']:.0f}: validation loss {values['validation/loss']:.4f}, accuracy "
            f"{values['validation/accuracy']:.1%}{', the best so far' if better else ''}"
        )

    def export(self, model: nn.Module, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Write the model with predictor, head and quantizer, and its feature extractor."""
        with quiet_hub():
            model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
            BestRQ2FeatureExtractor(sampling_rate=self.model.config.sampling_rate).save_pretrained(folder)


def _sums(model: nn.Module, inputs: Inputs, teacher: Teacher | None) -> Sums:
    """Sums of loss, accuracy and codes over the hidden patches of a batch."""
    output = model(
        inputs.input_values,
        hidden_mask=inputs.hidden_mask,
        packing=inputs.packing,
        output_logits=False,
        teacher_codes=None if teacher is None else teacher.codes(inputs.input_values, inputs.packing),
    )
    patches = output.hidden_valid.sum().float()
    return {
        "terms": patches,
        "loss": output.loss * patches,
        "accuracy": output.accuracy * patches,
        "codes": output.code_counts,
    }


def _averages(stage: str, sums: Mapping[str, Tensor], entropy: Tensor) -> dict[str, Tensor]:
    """Averages over hidden patches, named after the stage "train" or "validation"; entropy of the codes in nats."""
    loss = sums["loss"] / sums["terms"]
    return {
        f"{stage}/loss": loss,
        f"{stage}/excess_loss": loss - entropy,
        f"{stage}/accuracy": sums["accuracy"] / sums["terms"],
    }


def model_config(fields: ModelFields) -> BestRQ2Config:
    """Configuration of a model with these architecture fields."""
    return BestRQ2Config(**{name: getattr(fields, name) for name in FIELD_TYPES})


def build_model(config: PretrainConfig) -> BestRQ2ForPreTraining:
    """The untrained model of a run, a function of its seed."""
    torch.manual_seed(config.seed)
    architecture = model_config(config.model)
    refuse_beyond_memory(architecture, whole=True)
    with quiet_hub():
        model = BestRQ2ForPreTraining(architecture)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: BestRQ2ForPreTraining) -> None:
    """Let encoder and predictor recompute their activations in the backward pass, to save memory."""
    # Its old name warns in the releases of transformers that have the new one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
