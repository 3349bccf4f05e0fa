"""X-ARES (github.com/jimbozhang/xares): a model through the benchmark's own harness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestrq2.evaluate.xares.run import run_xares

__all__ = ["run_xares"]


def __getattr__(name: str) -> Any:
    # the tables of results need neither the harness nor torch
    if name == "run_xares":
        from bestrq2.evaluate.xares.run import run_xares

        return run_xares
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
