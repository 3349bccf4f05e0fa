"""An encoder with a linear head that names what a clip holds, for fine-tuning."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_bestrq2 import BestRQ2Config
from .modeling_bestrq2 import PRETRAINING_KEYS, BestRQ2Model, BestRQ2PreTrainedModel

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


class BestRQ2ForAudioClassification(BestRQ2PreTrainedModel):
    """Encoder, mean over the valid frames, and a linear map to `config.num_labels` classes."""

    _keys_to_ignore_on_load_unexpected = PRETRAINING_KEYS

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__(config)
        self.bestrq2 = BestRQ2Model(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused: Any
    ) -> SequenceClassifierOutput:
        """Classify a batch of clips.

        `config.problem_type` decides on the loss; where it is None, the first labels decide on it as in transformers:
        one class means regression, whole numbers a single label, other numbers several.

        Args:
            input_values: float [B, S], mono waveform at `config.sampling_rate`, samples in [-1, 1].
            attention_mask: [B, S], 1 for samples of the clip, 0 for padding on the right; None for none.
            labels: int64 [B], class indices ("single_label_classification"); float [B, classes] of 0 and 1
                ("multi_label_classification"); float [B] or [B, classes] ("regression"); None for no loss.
            unused: ignored keyword arguments that transformers passes around.

        Returns:
            `logits` [B, classes] and, where there are labels, `loss`: the mean cross-entropy, binary cross-entropy or
            squared error.

        Raises:
            ValueError: if `config.problem_type` is none of these.
        """
        logits = self.classifier(self.bestrq2(input_values, attention_mask).pooler_output)
        return SequenceClassifierOutput(loss=None if labels is None else self._loss(logits, labels), logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config, logits = self.config, logits.float()
        if config.problem_type is None:
            whole = not labels.is_floating_point()
            config.problem_type = REGRESSION if config.num_labels == 1 else SINGLE if whole else MULTI
        if config.problem_type == SINGLE:
            return F.cross_entropy(logits, labels)
        if config.problem_type == MULTI:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        if config.problem_type == REGRESSION:
            return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
        raise ValueError(f"problem_type must be {SINGLE}, {MULTI} or {REGRESSION}, got {config.problem_type!r}")
