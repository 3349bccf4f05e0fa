"""`bestrq2 compare`: tables and figures of several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestrq2 import flags

if TYPE_CHECKING:
    from bestrq2.report.comparison import Comparison


def compare(
    runs: Sequence[str | os.PathLike[str]],
    output: Path = Path("compare"),
    reference: bool = False,
    unfinished: bool = False,
) -> Comparison:
    """Compare runs: probes, cost and losses with 95 % intervals over seeds, as tables, figures and a page.

    Runs that differ only in their seed form an arm; the arm of the first run is the baseline.

    Args:
        runs: run folders.
        output: folder for table.md, comparison.json, comparison.html and SVG figures; an earlier comparison there is
            replaced.
        reference: add the reference runs of the package, and check the runs against them.
        unfinished: also compare runs that have not done all their steps, marked as such.

    Returns:
        The comparison: its text, tables, numbers and folder.

    Raises:
        ConfigError: the output cannot be written.
        DataError: with one sentence that names the run that cannot be compared and says what to do.
    """
    from bestrq2.report.comparison import compare_runs

    runs = [runs] if isinstance(runs, str | os.PathLike) else runs
    return compare_runs(runs, output, reference=reference, unfinished=unfinished)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 compare`."""
    comparison = compare(**flags.parse_command(compare, argv, positional=("runs",)))
    print(f"{comparison.text}\n\npage, figures and numbers: {comparison.output}")
