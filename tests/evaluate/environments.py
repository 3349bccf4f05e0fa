"""Environments for benchmarks whose packages do not fit beside those of the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import bestrq2

SOURCES = Path(bestrq2.__file__).parents[1]


@contextmanager
def environment(folder: Path, *installs: Sequence[str]) -> Iterator[Path]:
    """Interpreter of an environment with the packages of this one and further ones; it is deleted afterwards.

    The test is skipped where pip cannot reach an index.

    Args:
        folder: new folder.
        installs: arguments of one `pip install` after another.
    """
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        for arguments in installs:
            pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--retries=1", *arguments]
            done = subprocess.run(pip, capture_output=True, text=True, timeout=1200)
            if "No matching distribution" in done.stderr or "ConnectionError" in done.stderr:
                pytest.skip(f"pip cannot reach the index: {done.stderr.splitlines()[-1]}")
            assert done.returncode == 0, done.stderr[-2000:]
        yield python
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_there(python: Path, arguments: Sequence[object], folder: Path, **variables: str) -> str:
    """Run Python of such an environment in a folder and return its output; this package is importable."""
    variables = os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
