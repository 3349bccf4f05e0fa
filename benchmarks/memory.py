"""Memory of a training step: counted on the network, and measured if the model fits this machine.

python benchmarks/memory.py --measure best-rq-2-tiny best-rq-2-small best-rq-2-base

The state is weights, gradients and the two moments of AdamW, 16 bytes per trainable parameter. Activations are the
tensors that autograd keeps for the backward pass of one clip of full length, recorded by hooks on a real forward pass
(bfloat16 under autocast with --bf16); parameters are not counted twice. `--measure` trains two steps and reads the
peak: that of the allocator on a GPU, the growth of the resident set of this process on a CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import bestrq2
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.transformer import Transformer
from bestrq2.train import step_cost
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig

STATE_BYTES = 16
RECIPES = ["best-rq-2-tiny", "best-rq-2-small", "best-rq-2-base", "best-rq-2-large"]


def build(recipe: str, checkpointing: bool, device: torch.device) -> bestrq2.BestRQ2ForPreTraining:
    """The model of a recipe, ready to train."""
    config = bestrq2.BestRQ2Config(**bestrq2.recipe(recipe)["model"])
    model = bestrq2.BestRQ2ForPreTraining(config).to(device).train()
    for part in model.modules():
        if isinstance(part, Transformer):
            part.gradient_checkpointing = checkpointing
    return model


def forward(model: bestrq2.BestRQ2ForPreTraining, batch: int, bf16: bool, device: torch.device) -> torch.Tensor:
    """Loss of a batch of full-length clips at the mean mask ratio."""
    config = model.config
    middle = sum(config.mask_ratio) / 2
    config.mask_ratio = (middle, middle)
    audio = 0.1 * torch.randn(batch, config.max_samples, device=device)
    mask = draw_hidden_mask(config, [config.columns(config.max_samples)] * batch, 0, 0, range(batch))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(audio, hidden_mask=mask, output_logits=False).loss


def state_bytes(model: torch.nn.Module) -> int:
    """Weights, gradients and both moments."""
    return STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)


def kept_bytes(model: bestrq2.BestRQ2ForPreTraining, batch: int, bf16: bool, device: torch.device) -> int:
    """Bytes of the storages that autograd keeps, parameters and buffers left out."""
    with step_cost.kept_bytes([*model.parameters(), *model.buffers()]) as kept:
        loss = forward(model, batch, bf16, device)
    del loss
    return sum(kept.values())


def resident_bytes(which: str) -> int:
    """Memory of this process: "VmRSS" now, "VmHWM" at its peak (Linux)."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0])


def peak_bytes(recipe: str, batch: int, checkpointing: bool, bf16: bool, device: torch.device) -> int:
    """Peak of two real steps beyond what an empty process takes."""

    def make_step() -> Callable[[], None]:
        model = build(recipe, checkpointing, device)
        optimizer = make_optimizer(model, OptimizerConfig(), "32-true")

        def step() -> None:
            forward(model, batch, bf16, device).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return peak_of(make_step, device)


def peak_of(make_step: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Peak of making a step and doing it twice, beyond what there was before; on a CPU, call it in a new process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        step = make_step()
        for _ in range(2):
            step()
        return torch.cuda.max_memory_allocated(device) - allocated
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: a child begins with that of its parent
    before = resident_bytes("VmRSS")
    step = make_step()
    for _ in range(2):
        step()
    return resident_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--measure", nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=16, help="of the measurement")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, gib = torch.device(arguments.device), 2**30
    if arguments.peak_of:  # a process of its own for each measurement
        recipe, checkpointing = arguments.peak_of.split(",")
        print(peak_bytes(recipe, arguments.batch, checkpointing == "True", arguments.bf16, device))
        return
    names = f"{'recipe':<18} {'checkpointing':>13} {'state GiB':>10} {'MiB/clip':>9} {'clips in 80 GB':>15}"
    print(f"{names} measured / computed at batch {arguments.batch}")
    for recipe in arguments.recipes:
        for checkpointing in (False, True):
            model = build(recipe, checkpointing, device)
            state = state_bytes(model)
            one, two = (kept_bytes(model, batch, arguments.bf16, device) for batch in (2, 4))
            clip = (two - one) / 2
            row = f"{recipe:<18} {checkpointing!s:>13} {state / gib:>10.2f} {clip / 2**20:>9.1f} "
            row += f"{int((80e9 * 0.9 - state) / clip):>15}"
            if recipe in arguments.measure:
                command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", f"{recipe},{checkpointing}"]
                measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                computed = state + arguments.batch * clip
                row += f" {measured / gib:.2f} / {computed / gib:.2f} GiB = {measured / computed:.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
