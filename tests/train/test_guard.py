"""A step that is not finite changes nothing but the count of such steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import after_steps, killed_copy, metrics, same_runs, small_pretrain
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bestrq2.train import loop
from bestrq2.train.guard import Guard, gradient_norm, marked
from bestrq2.train.objective import PretrainingTask


def spoil(monkeypatch: pytest.MonkeyPatch, batches: set[int], where: str = "loss") -> None:
    """Make loss or gradient of the batches of these numbers (from 0) not finite."""
    inputs, forward = PretrainingTask.inputs, PretrainingTask.forward

    def numbered(task: PretrainingTask, batch: Any, device: Any) -> Any:
        made = inputs(task, batch, device)
        made.number = batch.step
        return made

    def spoiled(task: PretrainingTask, batch: Any) -> Any:
        sums = forward(task, batch)
        if batch.number in batches:
            # The loss alone, whose gradients would be finite; or the gradient alone: the square root of 0 is infinitely
            # steep.
            sums["loss"] = sums["loss"] + (torch.nan if where == "loss" else (0.0 * task.model.mask_token.sum()).sqrt())
        return sums

    monkeypatch.setattr(PretrainingTask, "inputs", numbered)
    monkeypatch.setattr(PretrainingTask, "forward", spoiled)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Weights and optimiser state after every step."""
    found: list[dict[str, Tensor]] = []

    def record(run: loop.Run, step: int) -> None:
        state = {name: value.clone() for name, value in run.task.model.state_dict().items()}
        for number, moments in run.optimizer.optimizer.state_dict()["state"].items():
            state |= {f"{number}.{name}": value.clone() for name, value in moments.items()}
        found.append(state)

    after_steps(monkeypatch, record)
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("where", "trainer"),
    [
        ("loss", {}),
        ("gradient", {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}),
        ("loss", {"precision": "16-mixed"}),  # bfloat16 on a CPU
    ],
    ids=["loss", "gradient-bf16-clipped", "loss-float16"],
)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments_nor_the_step_count(
    where: str,
    trainer: dict[str, Any],
    tmp_path: Path,
    recordings: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: list[dict[str, Tensor]],
):
    spoil(monkeypatch, {2}, where)
    settings = {"log_every_n_steps": 1, "val_every_n_steps": 0, "checkpoint_every_n_steps": 6, **trainer}
    run = small_pretrain(recordings, tmp_path / "run", trainer=settings)
    assert len(states) == 6
    assert equal(states[1], states[2])
    assert not any(equal(states[k], states[k + 1]) for k in (0, 2, 3, 4))
    assert all(value.isfinite().all() for value in states[-1].values())
    rows = metrics(run)
    assert [float(row["train/skipped_steps"]) for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [math.isfinite(float(row["train/loss"])) for row in rows] == [True, True, False, True, True, True]
    rates = [float(row["train/learning_rate"]) for row in rows]
    assert all(now < before for before, now in pairwise(rates))  # the schedule goes on


def test_averages_leave_skipped_steps_out(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    def run(name: str, steps: int) -> Path:
        settings = {"log_every_n_steps": steps, "max_steps": steps, "val_every_n_steps": 0}
        return small_pretrain(recordings, tmp_path / name, trainer=settings)

    alone = run("alone", 1)
    spoil(monkeypatch, {1})
    spoiled = run("spoiled", 2)
    (row,), (expected,) = metrics(spoiled), metrics(alone)
    for name in ("loss", "accuracy", "code_perplexity", "target_entropy"):
        assert float(row[f"train/{name}"]) == float(expected[f"train/{name}"])


def test_one_bad_batch_of_an_accumulation_spoils_its_step_and_no_other(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, states: list[dict[str, Tensor]]
):
    spoil(monkeypatch, {4})  # the first of the two batches of step 3
    settings = {"accumulate_grad_batches": 2, "max_steps": 4, "log_every_n_steps": 1, "val_every_n_steps": 0}
    run = small_pretrain(recordings, tmp_path / "run", trainer=settings)
    assert equal(states[1], states[2])
    assert not equal(states[2], states[3])
    assert [float(row["train/skipped_steps"]) for row in metrics(run)] == [0, 0, 1, 1]


@pytest.mark.parametrize("trainer", [{}, {"ema": True}], ids=["plain", "averaged"])
def test_a_run_resumed_after_a_skipped_step_is_the_uninterrupted_one(
    trainer: dict[str, Any], tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, {1, 3})
    trainer = {"log_every_n_steps": 3, **trainer}
    whole = small_pretrain(recordings, tmp_path / "whole", trainer=trainer)
    killed = killed_copy(tmp_path, recordings, monkeypatch, trainer=trainer)
    small_pretrain(recordings, killed, trainer=trainer, resume=True)
    assert same_runs(whole, killed)
    assert float(metrics(killed)[-1]["train/skipped_steps"]) == 2


def test_a_float16_step_is_skipped_by_the_gradient_scaler_where_the_guard_says_so():
    guard, weight = Guard(), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, scaler = torch.optim.AdamW([weight], lr=0.1), torch.amp.GradScaler("cpu")
    values = []
    for slope, offset in ((1.0, 0.0), (1.0, torch.nan), (1e38, 0.0)):  # the last is finite until it is scaled
        optimizer.zero_grad()
        scaler.scale(guard.see((slope * weight).sum() + offset)).backward()
        scaler.unscale_(optimizer)
        guard.judge([weight], optimizer)
        scaler.step(optimizer)
        scaler.update()
        values.append((weight.detach().clone(), int(guard.skipped)))
    assert [skipped for _, skipped in values] == [0, 1, 2]
    assert torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][0], values[2][0])
    assert not torch.equal(values[0][0], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_marks_all_gradients_and_a_finite_one_none(bad: float):
    weight = torch.tensor([1.5, -0.5], requires_grad=True)
    marked(weight.square().sum() + bad).backward()
    assert weight.grad is not None
    assert weight.grad.isnan().all()
    plain = torch.autograd.grad(weight.square().sum(), weight)[0]
    assert torch.equal(plain, torch.autograd.grad(marked(weight.square().sum()), weight)[0])


def test_skipped_steps_in_a_row_are_those_since_the_last_good_one():
    guard, weight = Guard(), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], fused=True)
    counts = []
    for bad in (False, True, True, False, True):
        weight.grad = torch.tensor([3.0, torch.inf if bad else 4.0])
        norm = guard.judge([weight], optimizer)
        assert math.isfinite(norm) != bad
        counts.append((int(guard.skipped), int(guard.in_a_row), guard.too_many(2)))
    assert counts == [(0, 0, False), (1, 1, False), (2, 2, True), (2, 0, False), (3, 1, False)]
    again = Guard()
    again.load_state_dict(guard.state_dict())
    assert (int(again.skipped), int(again.in_a_row)) == (3, 1)


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_are_judged_skipped_and_clipped_like_whole_ones():
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))

    def after(model: nn.Module, whole: Callable[[Tensor], Tensor]) -> list[Tensor]:
        guard, optimizer = Guard(), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        inputs = torch.linspace(-2, 3, 24).view(3, 8)
        norms = []
        for bad in (False, True, False):
            loss = guard.see(model(inputs).square().mean() + (torch.nan if bad else 0.0))
            loss.backward()
            norms.append(guard.judge(model.parameters(), optimizer))
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norms[-1])
            optimizer.step()
            optimizer.zero_grad()
        assert [int(guard.skipped), int(guard.in_a_row)] == [1, 0]
        steps = [state["step"] for state in optimizer.state_dict()["state"].values()]
        assert all(int(step) == 2 for step in steps)
        return [*norms[::2], *(whole(parameter.detach()) for parameter in model.parameters())]

    sharded = build()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    plain = after(build(), lambda value: value)
    assert all(map(torch.allclose, plain, after(sharded, lambda value: value.full_tensor())))
    assert gradient_norm(sharded.parameters()) == 0
