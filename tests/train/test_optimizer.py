"""Optimisers: Muon equals PyTorch's, leaves vectors to AdamW, skips what is not finite, and resumes."""

from __future__ import annotations

import copy

import pytest
import torch

from bestrq2.train.optimizer import make_optimizer, orthogonalised
from bestrq2.train.settings import OptimizerConfig

MUON = OptimizerConfig(algorithm="muon", lr=0.01)


def steps_of(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_orthogonalised_matrices_have_singular_values_of_about_one(shape):
    found = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert found.min() > 0.5
    assert found.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_moves_matrices_like_that_of_torch_and_all_else_like_adamw(tiny_pretraining):
    model = tiny_pretraining()
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    matrices = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "head"}
    of_torch = [p for n, p in twin.named_parameters() if n.removesuffix(".weight") in matrices and p.ndim == 2]
    others = [p for p in twin.parameters() if all(p is not q for q in of_torch)]
    decay = MUON.weight_decay
    first = torch.optim.Muon(of_torch, lr=0.01, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    decayed = [twin.head.weight]
    plain = [p for p in others if p is not twin.head.weight]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    second = torch.optim.AdamW(groups, lr=0.01, betas=MUON.betas, eps=MUON.eps)
    steps_of(model, [make_optimizer(model, MUON, "32-true")], range(3))
    steps_of(twin, [first, second], range(3))
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        way = (expected - start.get_parameter(name)).norm()
        assert way > 0.001, name
        assert (found - expected).norm() / way < 0.06, name  # both round to bfloat16, in another order


def test_a_skipped_step_changes_nothing_and_a_loaded_state_goes_on(tiny_pretraining):
    model = tiny_pretraining()
    optimizer = make_optimizer(model, MUON, "32-true")
    steps_of(model, [optimizer], range(2))
    kept, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.found_inf = torch.ones(())
    steps_of(model, [optimizer], range(2, 3))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept.get_parameter(name)), name
    optimizer.found_inf = torch.zeros(())
    resumed = make_optimizer(kept, MUON, "32-true")
    resumed.load_state_dict(state)
    steps_of(model, [optimizer], range(3, 5))
    steps_of(kept, [resumed], range(3, 5))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept.get_parameter(name)), name


def test_muon_moves_several_matrices_together_as_one_by_one(tiny_pretraining):
    model = tiny_pretraining(num_hidden_layers=3)
    twin = copy.deepcopy(model)
    for each, together in ((model, False), (twin, True)):
        optimizer = make_optimizer(each, MUON, "32-true")
        matrices = [block.mlp.fc1.weight for block in each.bestrq2.encoder.blocks]
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=generator)
            for alike in [matrices] if together else [[matrix] for matrix in matrices]:
                with torch.no_grad():
                    optimizer._move(alike, lr=0.01, weight_decay=0.1)
        assert all(optimizer.state[matrix]["step"] == 2 for matrix in matrices)
    for expected, found in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # products of stacks may sum in another order
