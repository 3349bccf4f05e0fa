"""Plots and the self-contained HTML report of one or several pretraining runs."""

from bestrq2.report.contents import EmbeddedClip, MaskExample, ReportContents, RunCurves
from bestrq2.report.html import write_report
from bestrq2.report.run_folder import read_curves

__all__ = [
    "EmbeddedClip",
    "MaskExample",
    "ReportContents",
    "RunCurves",
    "read_curves",
    "write_report",
]
