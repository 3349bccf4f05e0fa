"""A change that makes the training step dearer fails here: operations, bytes kept for the backward pass, kernels.

Nothing is timed. The figures of `step_budget.json` are for six clips of full length at the mean mask ratio; after a
change that is worth its price, or that saves something, write them anew with

    BESTRQ2_WRITE_BUDGET=1 python -m pytest tests/train/test_step_budget.py
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bestrq2 import BestRQ2Config, BestRQ2ForPreTraining, recipe
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig

BUDGET = Path(__file__).with_name("step_budget.json")
RECIPES = [
    "demo", "best-rq-2-tiny", "best-rq-2-plus-tiny", "best-rq-2.1-tiny", "best-rq-vit-tiny", "best-rq-conformer-tiny",
]  # fmt: skip
CLIPS, TOLERANCE = 6, 1.02


def attention_flop(queries, keys, values, *_, **__):
    return sdpa_flop_count(queries, keys, values)


def attention_backward_flop(gradient, queries, keys, values, *_, **__):
    """The scores once more, and two products for each of the two of the forward pass."""
    return 5 * sdpa_flop_count(queries, keys, values) // 2


# PyTorch counts the attention kernels of GPUs only.
OF_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


class Kernels(TorchDispatchMode):
    """Counts the operations that touch memory: views are free."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        view = function.is_view or function.name() in ("aten::detach", "aten::_unsafe_view", "aten::alias")
        self.number += not view
        return function(*arguments, **(keywords or {}))


class Kept:
    """Bytes of the storages that autograd keeps, those of the model itself left out."""

    def __init__(self, model):
        self.own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # so that no other storage gets the same address

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)
        return tensor


@pytest.fixture(autouse=True)
def _one_thread():
    """A CPU works out as many spectrograms at a time as it has threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spent(name: str) -> dict[str, float]:
    config = BestRQ2Config(**recipe(name)["model"])
    middle = sum(config.mask_ratio) / 2
    config.mask_ratio = [middle, middle]
    torch.manual_seed(0)
    model = BestRQ2ForPreTraining(config).train()
    optimizer = make_optimizer(model, OptimizerConfig(), "32-true")
    audio = 0.1 * torch.randn(CLIPS, config.max_samples)
    mask = draw_hidden_mask(config, [config.columns(config.max_samples)] * CLIPS, 0, 0, range(CLIPS))
    found: dict[str, float] = {}
    # The first step makes moments and tables that stay.
    model(audio, hidden_mask=mask, output_logits=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for precision in ("fp32", "bf16"):
        kept = Kept(model)
        with FlopCounterMode(display=False, custom_mapping=OF_CPU_ATTENTION) as flops, Kernels() as kernels:
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
                torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
            ):
                loss = model(audio, hidden_mask=mask, output_logits=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found |= {
            f"gflop {precision}": flops.get_total_flops() / 1e9,
            f"kept MiB {precision}": sum(kept.sizes.values()) / 2**20,
            f"kernels {precision}": kernels.number,
        }
    return found


@pytest.mark.parametrize(
    "name", [name if name == "best-rq-2-tiny" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_step_is_not_dearer_than_it_was(name):
    found = spent(name)
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"torch": torch.__version__}
    if os.environ.get("BESTRQ2_WRITE_BUDGET"):
        budget |= {
            "torch": torch.__version__.split("+")[0],
            name: {key: round(value, 4) for key, value in found.items()},
        }
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    for key, value in found.items():
        if "gflop" not in key and budget["torch"] != torch.__version__.split("+")[0]:
            continue  # another version may keep and launch otherwise
        assert value <= TOLERANCE * budget[name][key], f"{name}: {key} was {budget[name][key]}, is {value:.4g}"
        assert value >= budget[name][key] / TOLERANCE, f"{name}: {key} fell to {value:.4g}: write the budget anew"


def test_the_budget_would_notice(monkeypatch):
    """Logits of all hidden patches, or a block more, are beyond the tolerance."""
    budget = json.loads(BUDGET.read_text())["best-rq-2-tiny"]
    original = BestRQ2ForPreTraining.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            BestRQ2ForPreTraining, "forward",
            lambda self, *a, **k: original(self, *a, **{**k, "output_logits": True}),
        )  # fmt: skip
        assert spent("best-rq-2-tiny")["kept MiB fp32"] > TOLERANCE * budget["kept MiB fp32"]
    deeper = copy.deepcopy(recipe("best-rq-2-tiny"))
    deeper["model"]["num_hidden_layers"] += 1
    monkeypatch.setitem(globals(), "recipe", lambda name: deeper)
    assert all(value > TOLERANCE * budget[key] for key, value in spent("best-rq-2-tiny").items())
