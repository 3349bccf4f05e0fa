"""Cost of a model: parameters, tokens and floating-point operations, counted on the network itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.fields import FIELD_TYPES
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining, BestRQ2Model


@dataclass(frozen=True)
class Cost:
    """Size and cost of an architecture; a multiplication with its addition counts as two operations.

    Attributes:
        encoder_parameters: parameters of the encoder.
        pretraining_parameters: parameters of encoder, predictor and head.
        inference_gflops: operations to embed one clip of `max_seconds`: patch embedding and transformer.
        training_gflops: operations of forward and backward pass for one such clip at the mean share of hidden patches,
            without spectrogram and quantizer.
    """

    encoder_parameters: int
    pretraining_parameters: int
    inference_gflops: float
    training_gflops: float


def cost(config: BestRQ2Config) -> Cost:
    """Parameters and operations of a configuration, without allocating its weights; counted once per configuration."""
    return _counted(json.dumps({name: getattr(config, name) for name in FIELD_TYPES}))


@lru_cache(maxsize=64)
def _counted(settings: str) -> Cost:
    config = BestRQ2Config(**json.loads(settings))
    with torch.device("meta"):  # shapes without memory
        model = BestRQ2ForPreTraining(config)
    columns = config.columns(config.max_samples)
    patches = config.patch_rows * columns
    encoder = model.bestrq2
    return Cost(
        encoder_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        pretraining_parameters=sum(parameter.numel() for parameter in model.parameters()),
        inference_gflops=_gflops(encoder, patches, columns),
        training_gflops=_training_gflops(model, patches, columns),
    )


def _gflops(encoder: BestRQ2Model, tokens: int, columns: int) -> float:
    """Operations of patch embedding and encoder for one clip."""
    config = encoder.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.patch_embedding(torch.empty(1, tokens, config.patch_values, device="meta"))
        places = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        encoder.encoder(torch.empty(1, tokens, config.hidden_size, device="meta"), columns, places, None)
    return counter.get_total_flops() / 1e9


def _training_gflops(model: BestRQ2ForPreTraining, patches: int, columns: int) -> float:
    """Operations of the forward pass, and twice as many for the backward pass."""
    config, encoder = model.config, model.bestrq2
    hidden = min(max(1, int(config.mean_hidden_share * patches)), patches - 1)
    visible = patches - hidden
    if config.objective == "one_stage":
        forward = _gflops(encoder, patches, columns)
    else:
        forward = _gflops(encoder, visible, columns)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if config.objective == "two_step":
            model.predictor_input(torch.empty(1, visible, config.hidden_size, device="meta"))
            tokens = torch.empty(1, patches, config.predictor_hidden_size, device="meta")
            model.predictor(tokens, columns, torch.zeros(1, patches, dtype=torch.int64, device="meta"), None)
        model.head(torch.empty(1, hidden, model.head.in_features, device="meta"))
    return 3 * (forward + counter.get_total_flops() / 1e9)
