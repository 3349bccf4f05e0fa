"""Tasks of X-ARES small enough for tests: files of the harness and tars of tones and noise."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000

TASK = """
from xares.task import TaskConfig


def {name}_config(encoder):
    {before}
    return TaskConfig(
        encoder=encoder, name="{name}", label_processor=lambda sample: {label}, output_dim=2, epochs={epochs},
        train_split="train", valid_split="train", test_split="test", batch_size_encode=4,
        k_fold_splits={folds}, torch_num_threads=1,
    )
"""


def write_task(
    root: Path,
    name: str,
    before: str = "pass",
    label: str = 'sample["label"]',
    epochs: int = 2,
    folds: list[str] | None = None,
) -> Path:
    """A task file as the harness's own are, in `root/tasks`."""
    path = root / "tasks" / f"{name}_task.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TASK.format(name=name, before=before, label=label, epochs=epochs, folds=folds))
    return path


def write_tars(
    root: Path, name: str, splits: Iterable[str] = ("train", "test"), seed: int = 0, clips: int = 14
) -> Path:
    """Clips of unequal length, a tone for label 0 and noise for 1, with a second label by chance, "coin"."""
    folder = root / "env" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split in splits:
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for index in range(clips):
                labels = {"label": index % 2, "coin": rng.integers(2).item()}
                for suffix, content in (("wav", _wav(rng, index)), ("json", json.dumps(labels).encode())):
                    info = tarfile.TarInfo(f"{split}{index:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def _wav(rng: np.random.Generator, index: int) -> bytes:
    time = np.arange(int(RATE * rng.uniform(0.8, 1.6))) / RATE
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 900) * time) if index % 2 == 0 else rng.normal(0, 0.1, len(time))
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
