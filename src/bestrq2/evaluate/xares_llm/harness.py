"""The package `xares_llm` in its own environment: versions, task files, tars, its check and its runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import braceexpand

from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.run_records import read_yaml
from bestrq2.text import nearest

logger = logging.getLogger(__name__)

REPOSITORY = "https://github.com/xiaomi-research/xares-llm"
JOINT_TASKS = ("task1", "task2", "all")
DATA_VARIABLE = "XARES_DATA_HOME"
# Packages that the encoder needs beside those that the benchmark installs.
ENCODER_NEEDS = "soundfile soxr av"
MISSING = (
    f"has no package xares_llm; it is only on Git and needs transformers 4, so give it an environment of its own: "
    f"python -m venv xares-llm-env && xares-llm-env/bin/pip install 'xares-llm @ git+{REPOSITORY}' {ENCODER_NEEDS}; "
    f"then add --python xares-llm-env/bin/python"
)

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
_CHECK = """
import importlib.util, json, sys
if importlib.util.find_spec("xares_llm.audio_encoder_checker") is None:
    sys.exit()  # another version, without this module
from xares_llm.audio_encoder_checker import check_audio_encoder
from bestrq2.evaluate.xares_llm.encoder import BestRQ2Encoder
encoder = BestRQ2Encoder(**json.loads(sys.argv[1]))
passed = check_audio_encoder(encoder)
assert passed is None or passed, "check_audio_encoder refuses it"
"""


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

    @property
    def tasks(self) -> Path:
        """Folder of its task files."""
        if self.folder is None:
            raise ConfigError(f"{self.python} {MISSING}")
        return self.folder / "tasks"


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


def own_check(harness: Harness, model_args: dict[str, Any], environment: dict[str, str]) -> None:
    """Run the benchmark's own check of the encoder in its environment.

    Raises:
        ConfigError: it refuses the encoder, or cannot import it.
    """
    command = [harness.python, "-c", _CHECK, json.dumps(model_args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = last_error(done.stderr.splitlines())
        raise ConfigError(
            f"the check of xares_llm fails in {harness.python}: {reason}; importing the encoder there needs "
            f"{ENCODER_NEEDS}"
        )


def last_error(lines: Sequence[str]) -> str:
    """The line of a program's output that best explains why it ended."""
    kept = [line.strip() for line in lines if line.strip()]
    named = [line for line in kept if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception", "Interrupt"))]
    return (named or kept or ["no output"])[-1][:300]


def task_file(harness: Harness, task: str, part: Literal["train", "eval"]) -> Path:
    """Find the file that defines the training or the scoring of a joint task or of one dataset, or a custom one.

    Raises:
        ConfigError: there is no such task.
    """
    if Path(task).suffix in (".yaml", ".yml"):
        if not Path(task).is_file():
            raise ConfigError(f"{task}: there is no such task file")
        return Path(task).resolve()
    if task in JOINT_TASKS:
        found = sorted((harness.tasks / task / part).glob("*.y*ml"))
        if not found:
            raise ConfigError(f"{harness.tasks / task / part}: holds no task file; reinstall xares_llm")
        return found[0]
    ending = {"train": "_config", "eval": "_test_config"}[part]
    single = {file.stem.removesuffix(ending): file for file in (harness.tasks / "single" / part).glob("*.y*ml")}
    if task not in single:
        known = [*JOINT_TASKS, *sorted(single)]
        raise ConfigError(
            f"there is no task '{task}' to {part}{nearest(task, known)}; there are {', '.join(known)}, and .yaml files"
        )
    return single[task]


def read_task_file(path: Path) -> dict[str, Any]:
    """Read a task file.

    Raises:
        DataError: it cannot be read, or is not a mapping.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no tasks; expected a mapping of names to their data")
    return content


def check_tars(training: Path, evaluation: Path, data: Path) -> None:
    """Check the tars that a task needs before days of training; those that are missing are logged or refused.

    Args:
        training: task file of the training.
        evaluation: task file of the scoring.
        data: folder that the benchmark downloads into.

    Raises:
        DataError: a task file names no data, a tar is missing and cannot be downloaded, or one is empty or not a tar.
    """
    trained = read_task_file(training).get("train_data")
    if not isinstance(trained, dict) or not trained:
        raise DataError(f"{training}: has no train_data")
    here: list[Path] = []
    absent: list[Path] = []
    for name, entry in (*trained.items(), *read_task_file(evaluation).items()):
        entry = entry.get("data") if isinstance(entry, dict) and isinstance(entry.get("data"), dict) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("data"), list):
            raise DataError(f"{training if name in trained else evaluation}: {name} names no data")
        for path in (one for pattern in entry["data"] for one in braceexpand.braceexpand(str(pattern))):
            remote = entry.get("repo_id") is not None
            place = data / path if remote else Path(path)
            if "://" in path:
                continue
            if not place.is_file() and not remote:
                raise DataError(f"{place}: there is no such tar, but {name} names it")
            (here if place.is_file() else absent).append(place)
    for place in here:
        _check_tar(place)
    if not absent:
        return
    missing = f"{len(absent)} of {len(here) + len(absent)} tars are missing, first {absent[0]}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise DataError(f"{data}: {missing}; download them (docs/benchmarks.md), or unset HF_HUB_OFFLINE")
    logger.info("%s: %s; xares_llm downloads them", data, missing)


def _check_tar(path: Path) -> None:
    """Check the first bytes only: reading all would take as long as a download."""
    with path.open("rb") as file:
        head = file.read(512)
    if not (head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar"):
        what = "is empty" if not head else "is not a tar"
        raise DataError(f"{path}: {what}, perhaps a broken download; delete it, and it is downloaded again")


def run_harness(command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Run the benchmark; its output goes to standard error and into a file.

    Raises:
        BestRQ2Error: it fails; the sentence has the last error of its output.
    """
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            list(command),
            env=environment,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kept.append(line)
                file.write(line)
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
    """Delete checkpoints of an interrupted training, and incomplete caches of scores.

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
    if not finished:
        for cache in folder.glob("*/score_*.yaml"):  # their checkpoint is gone
            cache.unlink()
    for cache in folder.glob("*/score_*.yaml"):
        if not cache.read_text(encoding="utf-8", errors="replace").strip():
            cache.unlink()
    return finished


def _progress(checkpoint: Path) -> tuple[int, int]:
    """Finished and planned steps; (0, 0) where they are not recorded."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
