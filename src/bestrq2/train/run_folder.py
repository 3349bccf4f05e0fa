"""Run folder: paths of its files, settings and environment, and the checks before a run writes there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bestrq2._version import __version__
from bestrq2.errors import CheckpointError, ConfigError, DataError
from bestrq2.files import regular_file, write_text
from bestrq2.run_records import read_settings
from bestrq2.train.checkpoints import CheckpointStore
from bestrq2.train.settings import TrainerConfig


class RunFolder:
    """Paths inside a run folder, and the files that say what the run is.

    Attributes:
        config: resolved settings.
        model: model in hub format: the newest, or of a fine-tuning run the best.
        checkpoints: folder of training states.
        metrics: logged values, one row per step.
        timing: seconds of training up to every logged or saved step.
        heard: seconds of audio heard of each top folder.
        rejected: recordings that could not be used.
        warnings: warnings given in the course of training.
        environment: versions, commit and hardware.
        report: report for people.
        teacher: encoder and clusters that give a second round its targets.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.model = root / "model"
        self.checkpoints = root / "checkpoints"
        self.metrics = root / "metrics.csv"
        self.timing = root / "timing.csv"
        self.heard = root / "heard.csv"
        self.rejected = root / "rejected.csv"
        self.warnings = root / "warnings.txt"
        self.environment = root / "environment.json"
        self.report = root / "report.html"
        self.teacher = root / "teacher"

    def store(self, trainer: TrainerConfig) -> CheckpointStore:
        """Training states, kept as the settings say."""
        return CheckpointStore(self.checkpoints, trainer.keep_last, trainer.keep_every_n_steps)

    def create(self, resume: bool) -> None:
        """Make the folder, or check that an existing one may be written to.

        Raises:
            ConfigError: if it holds a run and `resume` is off, or something else.
            OSError: if it cannot be written to.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{self.root}: this is a file; give --output a folder")
        if CheckpointStore(self.checkpoints).steps() and not resume:
            raise ConfigError(
                f"{self.root}: holds a run already; add --resume to continue it, or name another --output"
            )
        # A run that was killed at its very start leaves nothing but an empty folder of checkpoints and hidden files.
        foreign = [path for path in self.root.glob("[!.]*") if path != self.checkpoints]
        if self.root.is_dir() and not self.config.exists() and foreign:
            raise ConfigError(f"{self.root}: is not empty and holds no run; name a new folder with --output")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root):
            pass

    def read_config(self) -> dict[str, Any]:
        """Settings of the run.

        Raises:
            CheckpointError: if they cannot be read.
        """
        try:
            settings = read_settings(self.config)
        except DataError as error:
            raise CheckpointError(str(error)) from error
        if not settings:
            raise CheckpointError(f"{self.config}: holds no settings")
        return settings

    def read_environment(self) -> dict[str, Any]:
        """Environment when the run was last started; empty where it cannot be read."""
        try:
            loaded = json.loads(regular_file(self.environment).read_text())
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def remove_leftovers(self) -> None:
        """Delete temporary files of a killed process."""
        for folder in (self.root, self.checkpoints):
            for leftover in folder.glob(".*.tmp"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)

    def write_config(self, settings: dict[str, Any]) -> None:
        """Write the resolved settings."""
        write_text(self.config, yaml.safe_dump(settings, sort_keys=False))

    def write_environment(self, extra: dict[str, Any]) -> None:
        """Write versions, commit and hardware, and further facts."""
        write_text(self.environment, json.dumps({**environment(), **extra}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, git commit of the working folder, and hardware."""
    import torch

    packages = ("torch", "transformers", "lightning-fabric", "numpy", "soundfile", "av", "soxr")
    return {
        "bestrq2": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "git_commit": _git_commit(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
