"""Seconds of audio embedded per second, and the share of the machine's matrix-product peak.

python benchmarks/embedding.py --recipes demo best-rq-2-tiny best-rq-2 --clips 16

The whole way from waveforms in memory to numpy arrays is timed; GFLOP/s counts the network's products only.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from machine import matrix_product_peak, seconds_per_call

import bestrq2
from bestrq2.inference.cost import cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["demo", "best-rq-2-tiny", "best-rq-2-small", "best-rq-2"])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    peak = matrix_product_peak(device, torch.float32)
    print(f"matrix-product peak {peak:.0f} GFLOP/s on {device}, {torch.get_num_threads()} threads")
    print(f"{'recipe':<20} {'clips':>5} {'audio s/s':>10} {'GFLOP/s':>9} {'of peak':>8}")
    for recipe in arguments.recipes:
        embedder = bestrq2.load(recipe, device)
        config = embedder.config
        rng = np.random.default_rng(0)
        audio = list(0.1 * rng.standard_normal((arguments.clips, config.max_samples), dtype=np.float32))
        seconds = seconds_per_call(lambda audio=audio, embedder=embedder: embedder.embed(audio), device, 3.0)
        achieved = arguments.clips * cost(config).inference_gflops / seconds
        rate = arguments.clips * config.max_seconds / seconds
        row = f"{recipe:<20} {arguments.clips:>5} {rate:>10.1f} {achieved:>9.1f} {achieved / peak:>8.0%}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
