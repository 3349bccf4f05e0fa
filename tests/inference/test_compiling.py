"""What is compiled computes what it did before, for all sizes by few graphs, and runs as it is where it cannot be."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from bestrq2 import BestRQ2ForPreTraining
from bestrq2.data.batch import fixed_batches
from bestrq2.inference.compiling import BLOCKS, MOST_GRAPHS, compile_parts
from example_sounds import padded_batch, scene, scenes

MODERN = {"position_embedding": "rope_2d", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}

CONFORMER = {
    "encoder_type": "conformer", "position_embedding": "relative", "objective": "one_stage", "mask_fill": "noise",
    "mask_ratio": [0.6, 0.6], "num_mel_bands": 80, "patch_size": [80, 4], "n_fft": 400,
    "hop_length": 160, "conformer_channels": [8, 4], "input_normalization": "clip",
}  # fmt: skip


def both(config, compile, backend):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = BestRQ2ForPreTraining(config).train()
    compiled = copy.deepcopy(plain)
    compile(compiled, backend=backend)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    return plain, compiled


def assert_equal_steps(plain, compiled, seed, *arguments, **keywords):
    losses = []
    for model in (plain, compiled):
        model.zero_grad()
        torch.manual_seed(seed)  # of stochastic depth
        generator = torch.Generator().manual_seed(seed)
        loss = model(*arguments, generator=generator, output_logits=False, **keywords).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


SIZES = {"one size": [(2, 1.0)], "any size": [(2, 1.0), (3, 0.5), (4, 1.0), (5, 0.75)]}


@pytest.mark.parametrize("sizes", ["one size", pytest.param("any size", marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_loss_and_gradients(tiny_config, sizes):
    config = tiny_config(**MODERN, mask_ratio=[0.3, 0.7])
    plain, compiled = both(config, partial(compile_parts, kinds=BLOCKS), "aot_eager")
    for clips, share in SIZES[sizes]:
        assert_equal_steps(plain, compiled, clips, 0.1 * torch.randn(clips, int(config.max_samples * share)))
    if sizes == "any size":
        assert_equal_steps(plain, compiled, 9, *padded_batch([80_000, 31_000, 52_000]))
    # One for the blocks of encoder and predictor each, with a mask over padded tokens and without; and two by chance.
    assert counters["stats"]["unique_graphs"] <= 6


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients_on_packed_rows(tiny_config):
    config = tiny_config(**MODERN, drop_path_rate=0.3)
    plain, compiled = both(config, partial(compile_parts, kinds=BLOCKS), "aot_eager")
    for seed in range(2):
        (batch,) = fixed_batches([scene(length, seed) for length in (31_000, 20_000, 52_000 + seed, 9_000)], config, 4)
        assert_equal_steps(plain, compiled, seed, batch.input_values, packing=batch.packing)
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
def test_a_compiled_step_is_the_step_for_every_hidden_count(tiny_config):
    """Generated code, front end included: many hidden counts cost no more graphs than the first few."""
    config = tiny_config(
        **MODERN, drop_path_rate=0.3, mask_ratio=[0.2, 0.8], input_normalization="dataset",
        quantizer_normalization="layernorm",
    )  # fmt: skip
    plain, compiled = both(config, compile_parts, "inductor")
    clips = scenes(4, 80_000)
    graphs = []
    for seed in range(10):
        assert_equal_steps(plain, compiled, seed, clips)
        graphs.append(counters["stats"]["unique_graphs"])
    # Blocks of encoder and predictor, decibels, normalisation, quantizer; and one by chance.
    assert 5 <= graphs[0] <= graphs[-1] <= 6 < MOST_GRAPHS
    with torch.no_grad():
        hidden = torch.arange(64) % 2 == 0
        expected = plain.eval()(clips, hidden_mask=hidden)
        found = compiled.eval()(clips, hidden_mask=hidden)
    assert torch.equal(expected.targets, found.targets)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(tiny_config, caplog):
    def refuse(graph, inputs):
        raise RuntimeError("no C++ compiler found")

    plain, compiled = both(tiny_config(), compile_parts, refuse)
    clips = 0.1 * torch.randn(2, plain.config.max_samples)
    with caplog.at_level(logging.WARNING, logger="bestrq2"):
        assert_equal_steps(plain, compiled, 0, clips)
        assert_equal_steps(plain, compiled, 1, clips)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "runs uncompiled" in message
    assert "no C++ compiler found" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "strict"),
    [({"win_length": 1800}, False), ({"win_length": 1700, **MODERN}, True), ({"win_length": 399, **CONFORMER}, False)],
    ids=["vit", "modern", "conformer"],
)
def test_an_exported_encoder_gives_the_same_and_leaves_the_model_as_it_was(tiny_encoder, changes, strict):
    model = tiny_encoder(mel_min_hz=35.0, **changes)  # of no other test, so that its constants are made in the export
    clips, mask = padded_batch([40_000, 30_000])
    with torch.no_grad():
        exported = torch.export.export(model, (clips, mask), strict=strict).module()(clips, mask).pooler_output
    clips.requires_grad_()
    found = model(clips, mask).pooler_output
    torch.testing.assert_close(exported, found, atol=1e-5, rtol=0)
    found.square().sum().backward()
    assert (clips.grad.abs().amax(dim=1) > 0).all()
