"""A training step never waits for the device.

The device of these tests holds shapes and no values: whatever would have to read one (`item`, `nonzero`, a comparison
in an `if`, a copy to the CPU) fails there, as it would make the host wait on a GPU. Masks and lengths are on the CPU by
design.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bestrq2 import BestRQ2Config, BestRQ2ForPreTraining, recipe
from bestrq2.data.batch import fixed_batches
from bestrq2.model.masking import draw_packed_mask
from bestrq2.train.guard import Guard
from bestrq2.train.objective import PretrainingTask
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig
from bestrq2.train.task import added

META = torch.device("meta")
RECIPES = [
    "demo",
    "best-rq-2-tiny",
    "best-rq-2-plus-tiny",
    "best-rq-2.1-tiny",
    "best-rq-vit-tiny",
    "best-rq-conformer-tiny",
]


@pytest.fixture(autouse=True)
def _autocast_on_meta(monkeypatch):
    """The meta device has no autocast of its own; that of the CPU casts the same products."""
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda kind, *others, original=original, **named: original(
                "cpu" if kind == "meta" else kind, *others, **named
            ),
        )


def step_on_device(name: str, share: float = 1.0, **changes):
    """A task on the device, and a batch with a clip of that share of the full length and one of half as much."""
    model_config = BestRQ2Config(**{**recipe(name)["model"], **changes})
    with torch.device("meta"):
        model = BestRQ2ForPreTraining(model_config).train()
    samples = model_config.max_samples
    clips = [np.zeros(int(part * samples), np.float32) for part in (1.0, share, 0.5 * share)]
    (batch,) = fixed_batches(clips, model_config, 3)
    batch.hidden_mask = draw_packed_mask(model_config, batch.packing.segments, 0, 0, range(len(batch.places)))
    batch.input_values = batch.input_values.to(META)
    return PretrainingTask(model, 0), batch


def loss_of(task, batch):
    return task(task.inputs(batch, META))["loss"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("share", [1.0, 0.4], ids=["one clip a row", "packed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_forward_backward_diagnostics_and_clipping_read_nothing_from_the_device(name, share, bf16):
    task, batch = step_on_device(name, share)
    guard = Guard()
    guard.to(META)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sums = task(task.inputs(batch, META))
    loss = guard.see(sums["loss"]) * (1 / task.terms(batch))
    loss.backward()
    optimizer = torch.optim.AdamW(task.parameters(), foreach=True)
    optimizer.param_groups[0]["fused"] = False
    norm = guard.judge(task.parameters(), optimizer)
    torch.nn.utils.clip_grads_with_norm_(task.parameters(), 1.0, norm)
    window = added(added({}, guard.kept(sums)), guard.kept(sums))
    assert loss.device.type == norm.device.type == "meta"
    assert {value.device.type for value in window.values()} == {"meta"}
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_several_codebooks_read_nothing_either():
    task, batch = step_on_device("best-rq-2-plus-tiny", 0.6, num_codebooks=2)
    loss_of(task, batch).backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_the_optimiser_is_fused():
    model = torch.nn.Linear(2, 2)
    for precision, fused in (("32-true", True), ("bf16-mixed", True), ("16-mixed", False)):
        optimizer = make_optimizer(model, OptimizerConfig(), precision)
        assert all(group["fused"] is fused for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss),
        lambda loss: 1 if loss > 0 else 0,
        lambda loss: loss[None].nonzero(),
        lambda loss: loss.cpu(),
        lambda loss: loss[None][loss[None] > 0],
    ],
    ids=["item", "float", "if", "nonzero", "copy", "boolean index"],
)
def test_this_device_would_notice(read):
    task, batch = step_on_device("demo")
    loss = loss_of(task, batch).detach()
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(loss)


def test_a_mask_on_the_device_has_to_be_read():
    task, batch = step_on_device("demo")
    with pytest.raises((RuntimeError, NotImplementedError)):
        task.model(
            batch.input_values, hidden_mask=batch.hidden_mask.to("meta"), output_logits=False, packing=batch.packing
        )
