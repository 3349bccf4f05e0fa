"""The report of X-ARES results alone, and how a run's result gets into the run's report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bestrq2.errors import DataError
from bestrq2.evaluate.xares.command import result_files
from bestrq2.evaluate.xares.entries import RESULT_NAME, XaresResult, read_result
from bestrq2.evaluate.xares.table import write_csv
from bestrq2.files import disk_errors
from bestrq2.report.contents import ReportContents
from bestrq2.report.html import write_report


def write_xares_report(output: str | os.PathLike[str], results: Sequence[XaresResult]) -> None:
    """Write results as one self-contained page: averages and tasks as bars beside the published rows.

    Args:
        output: the HTML file, written whole or not at all.
        results: of one model or several, each of another name.

    Raises:
        DataError: there is no result, or two have one name.
        OSError: the file cannot be written.
    """
    names = [result.model for result in results]
    if not names or len(set(names)) < len(names):
        raise DataError(f"a report of X-ARES needs one result or several of different names, found {names}")
    title = f"X-ARES: {names[0]}" if len(names) == 1 else "X-ARES"
    lead = "How well frozen embeddings serve the tasks of the X-ARES benchmark, beside what was published of others."
    write_report(Path(output), ReportContents(title, lead, xares=list(results)))


def write_pages(model: str | os.PathLike[str], output: Path | None) -> list[Path]:
    """Write what `bestrq2 xares` has scored as a page and a table beside each of its JSON files.

    Args:
        model: that was scored; a run folder holds its result.
        output: the JSON file that was asked for; None for none.

    Returns:
        The pages.

    Raises:
        BestRQ2Error: a file cannot be written, or a JSON file was changed meanwhile.
    """
    pages = []
    for file in result_files(model, output):
        result = read_result(file)
        with disk_errors(file):
            write_csv(file.with_suffix(".csv"), result)
            write_xares_report(file.with_suffix(".html"), [result])
        pages.append(file.with_suffix(".html"))
    return pages


def run_result(run: Path) -> tuple[list[XaresResult], list[str]]:
    """The result in a run folder, in a list that is empty without one, and a sentence for one that cannot be read."""
    if not (run / RESULT_NAME).exists():
        return [], []
    try:
        return [read_result(run / RESULT_NAME)], []
    except DataError as error:
        return [], [f"{error}."]
