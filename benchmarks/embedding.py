"""Embedding speed in seconds of audio per second, compared with other encoders and with the machine's peak.

    python benchmarks/embedding.py                        # this package's recipes, a loop over single clips, the peers
    python benchmarks/embedding.py --recipes demo best-rq-2-tiny --peers --clips 32      # no peers

All weights are random: cost does not depend on them. One batch of clips of unequal length (1 to 10 s) is timed from
waveforms in memory to numpy arrays. The rows and a matrix product, which measures the peak, are interleaved, so that
other load on the machine affects all of them alike; medians are shown. `naive loop` embeds one clip at a time, `encoder
alone` runs the blocks on the tokens of as many clips of full length. Peers are classes of transformers at their
published sizes with inputs as from their feature extractors: AST always computes 10.24 s and Whisper 30 s per clip,
wav2vec2 pads to the longest clip. Their spectrograms are not timed, in their favour. `dasheng-base` is a ViT of its
size (12 layers of 768 over patches of 64 bands and 40 ms, 25 tokens per second), because the package needs torchaudio.
GFLOPs are counted by torch for matrix products and convolutions. `--dtype bfloat16` runs all of them under autocast.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import description
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bestrq2

RATE, LONGEST, SHORTEST = 16_000, 10.0, 1.0
PRODUCT = {"cpu": 2048, "cuda": 8192}
PEERS = ("ast", "wav2vec2-base", "whisper-base", "dasheng-base")


@dataclass
class Row:
    """One way to embed the batch: the whole call, and the network alone on its input for counting operations."""

    name: str
    call: Callable[[], object]
    network: Callable[[], object] | None = None
    seconds: float | None = None  # of audio, where it is not the batch
    times: list[float] = field(default_factory=list)

    def gflops(self) -> float | None:
        if self.network is None:
            return None
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            self.network()
        return counter.get_total_flops() / 1e9


def clips_of(count: int) -> list[np.ndarray]:
    """Noise of evenly spread lengths, in mixed order."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(SHORTEST, LONGEST, count))
    return [0.1 * rng.standard_normal(round(seconds * RATE), dtype=np.float32) for seconds in lengths]


def padded(clips: Sequence[np.ndarray], samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] and its mask."""
    samples = samples or max(map(len, clips))
    values, mask = np.zeros((len(clips), samples), np.float32), np.zeros((len(clips), samples), np.int64)
    for row, marks, clip in zip(values, mask, clips, strict=True):
        row[: len(clip)], marks[: len(clip)] = clip, 1
    return torch.from_numpy(values), torch.from_numpy(mask)


def peer(name: str, clips: Sequence[np.ndarray], device: torch.device) -> Row:
    """A published encoder of random weights and the batch in the form it takes."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    count = len(clips)
    model: nn.Module
    if name == "ast":
        model = transformers.ASTModel(transformers.ASTConfig())
        inputs = {"input_values": torch.randn(count, 1024, 128)}
    elif name == "wav2vec2-base":
        model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())
        nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")  # for the counter
        values, mask = padded(clips)
        inputs = {"input_values": values, "attention_mask": mask}
    elif name == "whisper-base":
        sizes = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
        model = WhisperEncoder(transformers.WhisperConfig(**sizes))
        inputs = {"input_features": torch.randn(count, 80, 3000)}
    else:
        frames = 4 * max(len(clip) // (4 * RATE // 100) for clip in clips)
        sizes = {"image_size": (64, frames), "patch_size": (64, 4), "num_channels": 1}
        model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
        inputs = {"pixel_values": torch.randn(count, 1, 64, frames)}
    model = model.eval().to(device)

    def run() -> np.ndarray:
        with torch.inference_mode():
            moved = {key: value.to(device) for key, value in inputs.items()}
            return np.asarray(model(**moved).last_hidden_state.float().cpu())

    return Row(name, run, run)


def ours(recipe: str, clips: list[np.ndarray], device: torch.device) -> list[Row]:
    embedder = bestrq2.load(recipe, device)
    call = partial(embedder.embed, clips, RATE)
    model = embedder.model
    full = torch.randn(len(clips), model.config.max_samples, device=device)
    with torch.inference_mode():
        patches = model.patches(full)
        tokens = model.embed_patches(patches)

    def encoder() -> torch.Tensor:
        with torch.inference_mode():
            return model.encoder(tokens, patches.columns, None, None)

    return [
        Row(recipe, call, call),
        Row(f"{recipe}, naive loop", lambda: [embedder.embed([clip], RATE) for clip in clips]),
        Row(f"{recipe}, encoder alone", encoder, encoder, len(clips) * model.config.max_seconds),
    ]


def onnx_row(recipe: str, clips: list[np.ndarray], folder: Path, name: str) -> Row:
    """The exported graph with the front end in numpy, clips of like length together as many as there are."""
    import onnxruntime

    from bestrq2.convert.numpy_front_end import FrontEnd, encode

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / name), options)
    front_end = FrontEnd.of(session)

    def run() -> None:
        for first in range(0, len(clips), 4):
            encode(session, [front_end.log_mel(clip) for clip in ordered[first : first + 4]])

    ordered = sorted(clips, key=len)
    return Row(f"{recipe}, {name}", run)


def measure(rows: Sequence[Row], turns: int, device: torch.device, dtype: torch.dtype) -> None:
    for turn in range(turns + 1):
        for row in rows:
            began = time.perf_counter()
            with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
                row.call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first is to warm up
                row.times.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["best-rq-2", "best-rq-2-small", "best-rq-2-tiny"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="none, if given without a name")
    parser.add_argument("--onnx", action="store_true", help="the first recipe as an ONNX graph too (extra onnx)")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    device, clips = torch.device(options.device), clips_of(options.clips)
    seconds = sum(map(len, clips)) / RATE
    rows = [row for recipe in options.recipes for row in ours(recipe, clips, device)]
    rows += [peer(name, clips, device) for name in options.peers]
    with tempfile.TemporaryDirectory() as folder:
        if options.onnx:
            from bestrq2.convert.onnx import export_onnx

            exported = export_onnx(options.recipes[0], Path(folder) / "onnx", int8=True)
            rows += [onnx_row(options.recipes[0], clips, exported, f"model{kind}.onnx") for kind in ("", ".int8")]
        size = PRODUCT[device.type]
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = Row("matrix product", lambda: [left @ right for _ in range(4)])
        measure([*rows, product], options.turns, device, dtype)
    peak = 4 * 2 * size**3 / 1e9 / statistics.median(product.times)
    audio = f"{len(clips)} clips of {SHORTEST:g} to {LONGEST:g} s, {seconds:.0f} s of audio"
    print(f"{audio}, on {device}, {options.dtype}")
    print(f"{torch.get_num_threads()} threads, matrix-product peak {peak:.0f} GFLOP/s\n")
    first = statistics.median(rows[0].times)
    header = ("encoder", "audio s/s", "time, times the first", "GFLOPs/audio s", "GFLOP/s", "of peak")
    print("| " + " | ".join(header) + " |\n|---|" + "--:|" * (len(header) - 1))
    figures = []
    for row in rows:
        median, operations = statistics.median(row.times), row.gflops()
        audio = row.seconds or seconds
        cells = [row.name, f"{audio / median:.1f}", f"{median / audio * seconds / first:.2f}"]
        if operations is None:
            cells += ["", "", ""]
        else:
            rate = operations / median
            cells += [f"{operations / audio:.2f}", f"{rate:.0f}", f"{rate / peak:.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        figures.append({"encoder": row.name, "audio_seconds_per_second": audio / median, "gflops": operations})
    if options.json:
        head = {"machine": description(device), "clips": len(clips), "dtype": options.dtype, "peak_gflops": peak}
        options.json.write_text(json.dumps({**head, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
