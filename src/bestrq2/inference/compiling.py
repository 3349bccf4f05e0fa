"""Compiling a model block by block."""

from __future__ import annotations

import torch
from torch import nn

from bestrq2.model.conformer import ConformerBlock
from bestrq2.model.transformer import Block


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every block of encoder and predictor in place, so that weights keep their names.

    Blocks of one kind share what is compiled, and one graph serves all batch sizes and numbers of tokens. What cannot
    be compiled runs as it is, with a warning.

    Args:
        model: what is compiled, when its blocks run for the first time.
        backend: of torch.compile.
    """
    torch._dynamo.config.suppress_errors = True
    for part in model.modules():
        if isinstance(part, Block | ConformerBlock):
            part.compile(dynamic=True, backend=backend)
