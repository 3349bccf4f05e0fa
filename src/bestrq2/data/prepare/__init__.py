"""Preparation of any source as tars of short, checked, mono 16-bit clips: decoded once, read many times."""

from bestrq2.data.prepare.check import check_prepared
from bestrq2.data.prepare.run import run_prepare

__all__ = ["check_prepared", "run_prepare"]
