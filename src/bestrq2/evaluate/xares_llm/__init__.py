"""XARES-LLM: an encoder in front of a small language model, trained and scored by the benchmark's own package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestrq2.evaluate.xares_llm.run import check_encoder, run_xares_llm

__all__ = ["check_encoder", "run_xares_llm"]


def __getattr__(name: str) -> Any:
    # the benchmark imports the encoder in an environment that lacks most packages of this one
    if name in __all__:
        from bestrq2.evaluate.xares_llm import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
