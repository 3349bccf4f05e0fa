"""Comparison of runs: tables, sentences, figures and a page with intervals over seeds."""

from bestrq2.report.comparison.comparison import Comparison, compare_runs

__all__ = ["Comparison", "compare_runs"]
