"""`bestrq2 realworld`: fetch real recordings, for pretraining and as the benchmark realworld-1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestrq2 import flags

if TYPE_CHECKING:
    from bestrq2.realworld import Fetched


def fetch_realworld(output: Path, packages: Path | None = None, more: bool = False) -> Fetched:
    """Fetch real recordings from Debian packages: a list for pretraining, and the tasks of the benchmark realworld-1.

    The packages are downloaded and unpacked, not installed, and every recording is compared with the manifest that
    comes with bestrq2. `bestrq2 probe MODEL realworld-1` scores a model on the tasks.

    Args:
        output: folder to write: packages/, audio/ (recordings out of files that hold many), unlabelled.csv for
            `bestrq2 pretrain --data`, and tasks/ as tables with path, label, group and split. The same command
            continues after an interruption.
        packages: folder with the packages of docs/realworld.md, each unpacked into a folder of its name, where there
            is no apt-get and dpkg-deb; downloaded by default.
        more: also fetch 30 packages that are for pretraining only, another 5 GB: unlabelled.csv then lists 51.1 hours
            instead of 19.8. The benchmark stays the same.

    Returns:
        What is in the folder, and what is missing or differs; it prints as sentences.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.realworld import fetch, load_manifest, with_more

    manifest = load_manifest()
    return fetch(output, with_more(manifest) if more else manifest, packages)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 realworld`."""
    print(fetch_realworld(**flags.parse_command(fetch_realworld, argv, name="realworld", positional=("output",))))
