"""The package `xares_llm` in its own environment: versions, its check of the encoder, its runs and what they leave."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.run_records import read_yaml

logger = logging.getLogger(__name__)

REPOSITORY = "https://github.com/xiaomi-research/xares-llm"
DATA_VARIABLE = "XARES_DATA_HOME"
# Packages that the encoder needs beside those that the benchmark installs.
ENCODER_NEEDS = "soundfile soxr av"
MISSING = (
    "has no package xares_llm; it is only on Git and runs only with transformers below 5, so give it an environment of "
    f"its own: python -m venv xares-llm-env && xares-llm-env/bin/pip install 'transformers<5' "
    f"'xares-llm @ git+{REPOSITORY}' {ENCODER_NEEDS}; then add --python xares-llm-env/bin/python"
)
LAUNCH = "bestrq2.evaluate.xares_llm.launch"

# Seconds that the benchmark has to end after an interruption.
_GRACE = 20.0
_KEPT_LINES = 200

_PROBE = """
import importlib.metadata, importlib.util, json, platform
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("xares_llm")
names = ("xares-llm", "torch", "transformers", "peft", "accelerate", "torchaudio")
versions = {name: version(name) for name in names} | {"python": platform.python_version()}
folder = None if spec is None else list(spec.submodule_search_locations)[0]
print(json.dumps({"folder": folder, "versions": versions}))
"""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Harness:
    """The benchmark in the environment of an interpreter.

    Attributes:
        python: path of the interpreter.
        folder: folder of the package; None where it is not installed.
        versions: versions of the package and of what scores depend on; None for missing packages.
    """

    python: str
    folder: Path | None
    versions: dict[str, str | None]

    def check_versions(self) -> Path:
        """Folder of the package, which runs with the installed transformers.

        Raises:
            ConfigError: the package is missing, or transformers is too new for it.
        """
        if self.folder is None:
            raise ConfigError(f"{self.python} {MISSING}")
        transformers = self.versions["transformers"] or "none"
        if not transformers.startswith("4."):
            raise ConfigError(
                f"xares_llm runs only with transformers below 5, but {self.python} has {transformers}; install another "
                f"there: {self.python} -m pip install 'transformers<5'"
            )
        return self.folder


def find_harness(python: str) -> Harness:
    """Find the benchmark in the environment of an interpreter, without importing it.

    Raises:
        ConfigError: the interpreter cannot be run.
    """
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ConfigError(f"{python}: cannot be run as a Python interpreter ({error}); see --python") from error
    folder = found["folder"]
    return Harness(python, None if folder is None else Path(folder), found["versions"])


def child_environment(imports: Path, data: Path) -> dict[str, str]:
    """Environment variables of the benchmark's processes, which import this package and no other of this environment.

    Args:
        imports: folder for a link to `bestrq2`; created here.
        data: folder of the benchmark's tars.
    """
    package = Path(__file__).resolve().parents[2]
    imports.mkdir(parents=True, exist_ok=True)
    link = imports / package.name
    if link.is_symlink():
        link.unlink()
    link.symlink_to(package, target_is_directory=True)
    paths = [str(imports), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", DATA_VARIABLE: str(data)}


def own_check(harness: Harness, model_args: dict[str, Any], environment: dict[str, str]) -> str:
    """Run the benchmark's own check of the encoder in its environment.

    Returns:
        What decodes audio there, see `provide_torchaudio`.

    Raises:
        ConfigError: it refuses the encoder, or cannot be imported.
    """
    command = [harness.python, "-m", LAUNCH, "--check", json.dumps(model_args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = last_error(done.stderr.splitlines())
        raise ConfigError(
            f"the check of xares_llm fails in {harness.python}: {reason}; importing the encoder there needs "
            f"{ENCODER_NEEDS}"
        )
    return done.stdout.splitlines()[-1]


def last_error(lines: Sequence[str]) -> str:
    """The line of a program's output that best explains why it ended, without its colours."""
    kept = [line.strip() for line in (_COLOURS.sub("", line) for line in lines) if line.strip()]
    named = [line for line in kept if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception", "Interrupt"))]
    return (named or kept or ["no output"])[-1][:300]


def run_harness(command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Run the benchmark; its output goes to standard error and into a file.

    Raises:
        BestRQ2Error: it fails; the sentence has the last error of its output.
    """
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command, env=environment, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kept.append(line)
                file.write(_COLOURS.sub("", line))
                file.flush()
                sys.stderr.write(line)
            code = process.wait()
        except BaseException:  # Ctrl-C too: no process is left behind
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code:
        raise BestRQ2Error(f"xares_llm ended with code {code}: {last_error(list(kept))} (log: {log})")


def drop_unfinished(folder: Path) -> bool:
    """Delete checkpoints of an interrupted training, and scores that are incomplete or of no kept checkpoint.

    The benchmark takes any checkpoint for a finished training and would score it, and cannot continue from one.

    Args:
        folder: output of the benchmark for one model and task.

    Returns:
        Whether there is a finished training.
    """
    finished = False
    for checkpoint in sorted(folder.glob("*/checkpoint-*")):
        step, steps = _progress(checkpoint)
        if steps and step >= steps:
            finished = True
            continue
        logger.warning("%s: training ended at step %d of %d and cannot be continued; deleted", checkpoint, step, steps)
        shutil.rmtree(checkpoint)
    for cache in folder.glob("*/score_*.yaml"):
        if not finished or read_score(cache) is None:
            cache.unlink()
    return finished


def read_score(cache: Path) -> float | None:
    """Score of a dataset as the benchmark keeps it, with all decimals; None where there is none."""
    try:
        return float(read_yaml(cache)["score"])
    except (DataError, OSError, KeyError, TypeError, ValueError):
        return None


def _progress(checkpoint: Path) -> tuple[int, int]:
    """Finished and planned steps; (0, 0) where they are not recorded."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
