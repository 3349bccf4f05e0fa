"""Virtual environments with chosen installed packages and their dependencies, without this package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from typing import Any


def make_environment(folder: Path, *packages: str) -> Path:
    """Make the environment by links to the packages installed here; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = site_packages(folder)
    for name in _required(*packages):
        for file in metadata.distribution(name).files or ():
            top = file.parts[0]
            link = site / top
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))).resolve())
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    """Folder of the packages of a virtual environment."""
    return Path(sysconfig.get_path("purelib", "posix_prefix", vars={"base": str(folder), "platbase": str(folder)}))


def _required(*packages: str) -> set[str]:
    """The packages and all that they need, extras aside."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        waiting += [match[0] for one in requirements if "extra ==" not in one and (match := re.match(r"[\w.-]+", one))]
    return found


def run_there(python: Path, program: str, home: Path, arguments: dict[str, Any]) -> Any:
    """Run a program that prints JSON in its last line; it reads its arguments as `given`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    beginning = f"import json\ngiven = json.loads({json.dumps(arguments)!r})\n"
    done = subprocess.run(
        [python, "-I", "-c", beginning + program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
