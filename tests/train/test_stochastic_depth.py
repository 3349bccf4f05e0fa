"""What stochastic depth draws is a function of run, batch and process."""

from __future__ import annotations

import torch

from bestrq2.train.module import seed_stochastic_depth

CPU = torch.device("cpu")


def drawn(seed: int, batch: int, rank: int) -> list[float]:
    seed_stochastic_depth(seed, batch, rank, CPU)
    return torch.rand(4).tolist()


def test_the_same_place_draws_the_same_numbers_whatever_ran_before():
    first = drawn(1, 7, 0)
    torch.rand(100)
    assert drawn(1, 7, 0) == first
    assert len({tuple(drawn(*place)) for place in [(1, 7, 0), (2, 7, 0), (1, 8, 0), (1, 7, 1)]}) == 4


def test_nothing_piles_up_for_accelerators_that_are_not_there():
    waiting = len(torch.cuda._queued_calls)
    for batch in range(3):
        drawn(0, batch, 0)
    assert len(torch.cuda._queued_calls) == waiting
