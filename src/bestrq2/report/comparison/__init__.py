"""Several runs beside each other: tables, sentences and figures with intervals over seeds."""

from bestrq2.report.comparison.command import compare
from bestrq2.report.comparison.contents import Comparison

__all__ = ["Comparison", "compare"]
