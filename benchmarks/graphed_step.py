"""Pretraining step whose forward and backward pass are one CUDA graph, an upper bound of what graphs can gain.

The host then launches one graph and the optimiser, whatever the size of the model. A graph has fixed shapes, so that as
many patches have to be hidden in every step; their places are copied into it before each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import bestrq2
from bestrq2.model import modeling_bestrq2
from bestrq2.model.masking import Split, split_by_mask


def graphed_step(
    model: bestrq2.BestRQ2ForPreTraining,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    masks: Iterator[Tensor],
    bf16: bool,
) -> Callable[[], None]:
    """Capture a step.

    Args:
        model: on a GPU, in training mode.
        optimizer: of the model's parameters; it runs outside of the graph.
        audio: float [B, S], on the GPU.
        masks: hidden patches of each step, bool [B, N] on the CPU, equally many in all clips and steps.
        bf16: run under autocast.
    """
    mask = next(masks)
    first = split_by_mask(mask, None, audio.device)
    places = first.places.clone()
    fixed = Split(places, places, first.visible_count)

    def forward_and_backward() -> None:
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
            loss = model(audio, hidden_mask=mask, output_logits=False).loss
        loss.backward()

    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    modeling_bestrq2.split_by_mask = lambda *_: fixed
    try:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compile, plan Fourier transforms, fill caches
                forward_and_backward()
                optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            forward_and_backward()
    finally:
        modeling_bestrq2.split_by_mask = split_by_mask
    # Each replay writes gradients anew to the same memory, which an optimiser may have let go of.
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]

    def step() -> None:
        places.copy_(split_by_mask(next(masks), None, audio.device).places)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        optimizer.step()

    return step
