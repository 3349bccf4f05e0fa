"""Outputs of the encoder and the pretraining model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class BestRQ2ModelOutput(ModelOutput):
    """Output of `BestRQ2Model`.

    Attributes:
        last_hidden_state: [B, T', D], frames: mean over the frequency rows; 0 after the end of a clip. Another readout
            (`config.readout`) takes other layers, or frames as wide as all rows together.
        pooler_output: [B, D], mean over the valid frames, or what the readout pools them to; for packed rows
            [clips, D], row by row.
        patch_hidden_states: [B, N, D], frequency-major.
        frame_attention_mask: bool [B, T'], True for frames inside the clip.
        hidden_states: None unless requested; else the input of the first block, positions included, and the output of
            every block, [B, N, D] each, frequency-major, before the final norm. Values at padding are undefined.
        attentions: None unless requested; else the attention weights of every block, [B, heads, N, N] each.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]
    pooler_output: Tensor = None  # type: ignore[assignment]
    patch_hidden_states: Tensor = None  # type: ignore[assignment]
    frame_attention_mask: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BestRQ2ForPreTrainingOutput(ModelOutput):
    """Output of `BestRQ2ForPreTraining` for B clips, H hidden patches, V codes and C codebooks.

    Without `output_logits`, `logits` and `target_entropy` to `top_code_share` are None.

    Attributes:
        loss: mean cross-entropy over hidden patches and codebooks, nats.
        logits: float [B, H, V], or [B, H, C, V] where C > 1, hidden patches in grid order.
        targets: int64 [B, H], or [B, H, C] where C > 1.
        hidden_mask: bool [B, N].
        context_hidden_state: [B, N - H, D], encoder output at the visible patches in grid order.
        accuracy: share of correctly predicted codes.
        hidden_valid: bool [B, H], False where a clip hides fewer patches than the longest does.
        code_counts: float32 [C, V], number of times each code is a target in this batch.
        target_entropy: of the batch's targets, nats.
        excess_loss: loss - target_entropy; negative once the model beats predicting by code frequency.
        code_perplexity: effective number of codes among the targets.
        code_coverage: share of the codebook among the targets.
        top_code_share: share of the most frequent target.
        hidden_states: None unless requested; else those of the encoder as in `BestRQ2ModelOutput`. In two steps it
            reads the visible patches only, [B, N - H, D] each in grid order.
        attentions: None unless requested; else the attention weights of the encoder for the same patches.
    """

    loss: Tensor = None  # type: ignore[assignment]
    logits: Tensor = None  # type: ignore[assignment]
    targets: Tensor = None  # type: ignore[assignment]
    hidden_mask: Tensor = None  # type: ignore[assignment]
    context_hidden_state: Tensor = None  # type: ignore[assignment]
    accuracy: Tensor = None  # type: ignore[assignment]
    hidden_valid: Tensor = None  # type: ignore[assignment]
    code_counts: Tensor = None  # type: ignore[assignment]
    target_entropy: Tensor = None  # type: ignore[assignment]
    excess_loss: Tensor = None  # type: ignore[assignment]
    code_perplexity: Tensor = None  # type: ignore[assignment]
    code_coverage: Tensor = None  # type: ignore[assignment]
    top_code_share: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
