"""Clips per second of one pretraining step, and its share of the machine's matrix-product peak.

python benchmarks/pretraining_step.py --recipes demo best-rq-2-tiny best-rq-2 --batch 16

The step is forward, backward and AdamW on random audio of full length, masks drawn on the CPU. GFLOP/s counts the
network's products at the mean mask ratio (`bestrq2 info`), so spectrogram, quantizer and optimiser lower the share.
"""

from __future__ import annotations

import argparse

import torch
from machine import matrix_product_peak, seconds_per_call

import bestrq2
from bestrq2.inference.cost import cost
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.train.optimizer import make_optimizer
from bestrq2.train.settings import OptimizerConfig


def clips_per_second(recipe: str, batch: int, device: torch.device, bf16: bool) -> tuple[float, float]:
    """Measured clips/s of a step and the GFLOP/s that this amounts to."""
    config = bestrq2.BestRQ2Config(**bestrq2.recipe(recipe)["model"])
    model = bestrq2.BestRQ2ForPreTraining(config).to(device).train()
    optimizer = make_optimizer(model, OptimizerConfig(), "32-true")
    audio = 0.1 * torch.randn(batch, config.max_samples, device=device)
    columns = [config.columns(config.max_samples)] * batch
    steps = iter(range(10**9))

    def step() -> None:
        mask = draw_hidden_mask(config, columns, 0, next(steps), range(batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(audio, hidden_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rate = batch / seconds_per_call(step, device, 3.0)
    return rate, rate * cost(config).training_gflops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["demo", "best-rq-2-tiny", "best-rq-2-small", "best-rq-2"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    peak = matrix_product_peak(device, torch.bfloat16 if arguments.bf16 else torch.float32)
    print(f"matrix-product peak {peak:.0f} GFLOP/s on {device}, {torch.get_num_threads()} threads")
    print(f"{'recipe':<20} {'batch':>5} {'clips/s':>9} {'GFLOP/s':>9} {'of peak':>8}")
    for recipe in arguments.recipes:
        rate, achieved = clips_per_second(recipe, arguments.batch, device, arguments.bf16)
        print(f"{recipe:<20} {arguments.batch:>5} {rate:>9.2f} {achieved:>9.1f} {achieved / peak:>8.0%}", flush=True)


if __name__ == "__main__":
    main()
