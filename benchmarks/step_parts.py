"""Effect of each optimisation of the training step: every part in its present and its former form.

python benchmarks/step_parts.py --recipe best-rq-2-plus-tiny --batch 16

Forward and backward of single parts at the sizes of a recipe, on random numbers. Ratios are times of the former over
those of the present form, medians over interleaved rounds; bytes are what autograd keeps of each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import description, timed
from torch import Tensor, nn

import bestrq2
from bestrq2.model.kernels import RMSNormalization, Rotation, SwiGLU, head_cross_entropy
from bestrq2.model.masking import draw_hidden_mask, order_by_mask, split_by_mask

Forms = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def former_rotation(states: Tensor, cosine: Tensor, sine: Tensor, parts: int) -> Tensor:
    first, second = states.unflatten(-1, (parts, -1)).chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1).flatten(-2) * sine


def former_loss(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    logits = head(states).flatten(0, 1)
    (logits.detach().argmax(dim=-1) == targets.flatten()).sum()
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def former_attention_input(qkv: Tensor, heads: int) -> Tensor:
    queries, keys, values = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(queries, keys, values)


def attention_input(qkv: Tensor, heads: int) -> Tensor:
    parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(*parts)


def parts_of(config: bestrq2.BestRQ2Config, batch: int, device: torch.device) -> dict[str, Forms]:
    """Former and present form of every part."""
    width, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    patches = config.patch_rows * config.columns(config.max_samples)
    hidden = max(1, int(config.mean_hidden_share * patches))
    rows = lambda *shape: torch.randn(batch, *shape, device=device, requires_grad=True)  # noqa: E731
    tokens, gates, qkv, states = (
        rows(patches, width),
        rows(patches, 2 * inner),
        rows(patches, 3 * width),
        rows(hidden, width),
    )
    weight = torch.ones(width, device=device, requires_grad=True)
    angles = torch.rand(batch, 1, patches, width // heads, device=device)
    cosine, sine = angles.cos(), angles.sin()
    per_head = lambda: tokens.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    head = nn.Linear(width, config.codebook_size).to(device)
    targets = torch.randint(config.codebook_size, (batch, hidden), device=device)
    mask = draw_hidden_mask(config, [config.columns(config.max_samples)] * batch, 0, 0, range(batch))
    mask = mask if mask.ndim == 2 else mask[:, 0]
    return {
        "RMSNorm": (
            lambda: F.rms_norm(tokens, (width,), weight, 1e-5),
            lambda: RMSNormalization.apply(tokens, weight, 1e-5),
        ),
        "rotation": (
            lambda: former_rotation(per_head(), cosine, sine, 2),
            lambda: Rotation.apply(per_head(), cosine, sine, 2),
        ),
        "SwiGLU": (lambda: F.silu(gates.chunk(2, -1)[0]) * gates.chunk(2, -1)[1], lambda: SwiGLU.apply(gates)),
        "cut of qkv": (lambda: former_attention_input(qkv, heads), lambda: attention_input(qkv, heads)),
        "head and loss": (
            lambda: former_loss(head, states, targets),
            lambda: head_cross_entropy(head, states, targets, None)[0],
        ),
        "order of patches": (
            lambda: order_by_mask(mask)[0].sum() + order_by_mask(~mask)[0].sum(),
            lambda: split_by_mask(mask, None, device).places.sum(),
        ),
    }


def kept_mib(compute: Callable[[], Tensor]) -> float:
    """MiB that autograd keeps of one part, including its inputs."""
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(sizes.values()) / 2**20


def step(compute: Callable[[], Tensor]) -> None:
    result = compute()
    if result.requires_grad:
        result.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best-rq-2-plus-tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = bestrq2.BestRQ2Config(**bestrq2.recipe(arguments.recipe)["model"])
    print(", ".join(f"{key} {value}" for key, value in description(device).items()))
    print(f"{arguments.recipe}, batch {arguments.batch}")
    print(f"{'part':<18} {'former ms':>10} {'present ms':>10} {'ratio':>6} {'former MiB':>11} {'present MiB':>12}")
    for name, forms in parts_of(config, arguments.batch, device).items():
        times: list[list[float]] = [[], []]
        for round_number in range(arguments.rounds + 2):
            for form, each in zip(forms, times, strict=True):
                seconds = timed(lambda form=form: step(form), device)
                if round_number > 1:
                    each.append(seconds)
        former, present = (1000 * statistics.median(each) for each in times)
        sizes = [kept_mib(form) for form in forms]
        print(
            f"{name:<18} {former:>10.2f} {present:>10.2f} {former / present:>6.2f} {sizes[0]:>11.2f} {sizes[1]:>12.2f}"
        )


if __name__ == "__main__":
    main()
