"""Compiled blocks compute what blocks compute, and one graph serves all sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from bestrq2 import BestRQ2ForPreTraining
from bestrq2.inference.compiling import compile_blocks


def test_compiled_blocks_give_the_same_loss_and_gradients_at_any_size(tiny_config):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = BestRQ2ForPreTraining(
        tiny_config(position_embedding="rope_2d", norm="rmsnorm", activation="swiglu", drop_path_rate=0.0)
    ).train()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    before = counters["stats"]["unique_graphs"]
    samples = plain.config.max_samples
    for clips, share in ((2, 1.0), (3, 0.5), (4, 1.0), (5, 0.75)):
        waveforms = 0.1 * torch.randn(clips, int(samples * share))
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            output = model(waveforms, generator=torch.Generator().manual_seed(clips))
            output.loss.backward()
            losses.append(output.loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for ours, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    # encoder and predictor, with and without a mask over padded tokens
    assert counters["stats"]["unique_graphs"] - before <= 4
