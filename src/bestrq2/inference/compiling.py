"""Compilation of a model block by block with torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn

from bestrq2.model.conformer import ConformerBlock
from bestrq2.model.log_mel import Decibels, InputStatistics
from bestrq2.model.quantizer import RandomProjectionQuantizer
from bestrq2.model.transformer import Block

logger = logging.getLogger(__name__)

BLOCKS = (Block, ConformerBlock)
# Without the Fourier transform, which the compiler does not speed up.
FRONT_END = (Decibels, InputStatistics, RandomProjectionQuantizer)
# Graphs per kind of part before it runs uncompiled: blocks of encoder and predictor, each with and without padding,
# stochastic depth and gradients, and for a single clip.
MOST_GRAPHS = 32


def compile_parts(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (*BLOCKS, *FRONT_END), backend: str = "inductor"
) -> None:
    """Compile parts of a model in place and separately, so that weights keep their names.

    Parts of one kind share compiled code, and one graph serves all batch sizes and numbers of tokens, so that a hidden
    count that changes from step to step, as in the paper, causes no recompilation. If compilation fails (no C++
    compiler, no Triton), one warning is logged and the model runs uncompiled; only a backward pass that fails to
    compile after its forward pass did is an error.

    Args:
        model: model whose parts are compiled when they first run.
        kinds: classes of modules to compile, such as `BLOCKS`; by default blocks and front end.
        backend: backend of torch.compile.
    """
    settings = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
    # The default limit of 8 graphs would leave most kinds of blocks uncompiled.
    setattr(settings, limit, max(getattr(settings, limit), MOST_GRAPHS))
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    for part in parts:
        part.compile(dynamic=True, backend=backend)
        part._compiled_call_impl = _with_fallback(part, part._compiled_call_impl, parts)


def _with_fallback(part: nn.Module, compiled: Callable[..., Any] | None, parts: list[nn.Module]) -> Callable[..., Any]:
    """Call of a compiled part that falls back to uncompiled parts if compilation fails."""
    assert compiled is not None

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return compiled(*arguments, **keywords)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            logger.warning("torch.compile does not work here, the model runs uncompiled: %s", reason)
            for each in parts:
                each._compiled_call_impl = None
            return part._call_impl(*arguments, **keywords)

    return call
