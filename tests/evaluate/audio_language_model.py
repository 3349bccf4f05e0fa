"""A minimal stand-in of XARES-LLM's model: frozen encoder, linear projector, tiny causal language model."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

ENCODER = "bestrq2.evaluate.xares_llm.encoder.BestRQ2Encoder"
IGNORED = -100


class AudioLanguageConfig(PretrainedConfig):
    model_type = "audio_language_stand_in"

    def __init__(self, encoder: str = ENCODER, encoder_kwargs: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.encoder = encoder
        self.encoder_kwargs = encoder_kwargs or {}


class AudioLanguageModel(PreTrainedModel):
    """Features and text embeddings one behind the other, [audio, text]; the loss is on the text alone."""

    config_class = AudioLanguageConfig

    def __init__(self, config: AudioLanguageConfig) -> None:
        super().__init__(config)
        module, name = config.encoder.rsplit(".", 1)
        self.audio_encoder = getattr(import_module(module), name)(**config.encoder_kwargs)
        sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        self.decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.15))
        self.projector = nn.Linear(self.audio_encoder.output_dim, 32)
        self.post_init()

    def forward(self, audio: Tensor, audio_mask: Tensor | None, input_ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features, mask = self.audio_encoder(audio, audio_mask)
        if mask is None:
            mask = torch.ones(features.shape[:2])
        text = self.decoder.get_input_embeddings()(input_ids)
        no_target = torch.full(features.shape[:2], IGNORED)
        return self.decoder(
            inputs_embeds=torch.cat([self.projector(features), text], dim=1),
            attention_mask=torch.cat([mask, torch.ones_like(input_ids)], dim=1),
            labels=torch.cat([no_target, labels], dim=1),
        ).loss
