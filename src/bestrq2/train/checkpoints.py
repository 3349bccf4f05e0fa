"""Training states on disk: whole, verified, the newest sound one found again, and only as many as asked for."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from bestrq2.errors import CheckpointError
from bestrq2.files import is_full, whole_file, write_text

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.ckpt")
_BLOCK = 1 << 24


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    Every state is a file `step-00001000.ckpt` with its SHA-256 beside it in the format of `sha256sum`. The checksum is
    written first: a state without one, or with another, was damaged afterwards. `last.ckpt` and `best.ckpt` are links.

    Args:
        folder: where the states lie.
        keep_last: newest states to keep.
        keep_every_n_steps: states of these steps stay for good; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every_n_steps: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """Steps of which there is a file, rising."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.ckpt"))
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> tuple[int, Path | None]:
        """The newest sound state: its step and file; (0, None) where no step was ever saved.

        Damaged states are passed over with a warning.

        Raises:
            CheckpointError: if there are states and all of them are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            reason = self.damage(self.path(step))
            if reason is None:
                for earlier in damaged:
                    logger.warning("%s; falling back to the state of step %d", earlier, step)
                return step, self.path(step)
            damaged.append(reason)
        if damaged:
            others = ", and so are all older ones" if len(damaged) > 1 else ""
            raise CheckpointError(f"{damaged[0]}{others}; delete {self.folder} to start the run anew")
        return 0, None

    def damage(self, path: Path) -> str | None:
        """What is wrong with a state, as the beginning of a sentence; None if it is as it was written."""
        try:
            expected = _sidecar(path).read_text().split()[0]
        except (OSError, IndexError, UnicodeDecodeError):
            return f"{path}: damaged (its checksum {_sidecar(path).name} is missing)"
        try:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            return f"{path}: damaged (cannot be read: {error.strerror})"
        return None if digest.hexdigest() == expected else f"{path}: damaged (its checksum differs)"

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of a step and let `last.ckpt` point to it.

        Raises:
            OSError: if the disk is full or refuses; what was there before is whole.
        """
        write_state(self.path(step), state)
        self._link("last.ckpt", step)

    def mark_best(self, step: int) -> None:
        """Let `best.ckpt` point to the state of a step, which stays until another is better."""
        self._link("best.ckpt", step)

    def _link(self, name: str, step: int) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(self.path(step).name)
            temporary.replace(self.folder / name)
        except OSError as error:
            if is_full(error):
                raise
            logger.warning("%s: links cannot be made here (%s)", self.folder / name, error.strerror)

    def prune(self, step: int) -> None:
        """Delete states that need not be kept.

        Args:
            step: the newest one; later ones are left of a run that was thrown back, and will be written anew.
        """
        best = self.folder / "best.ckpt"
        kept = {best.resolve().name} if best.is_symlink() else set()
        past = [old for old in self.steps() if old <= step]
        for old in past[: -self.keep_last]:
            every = self.keep_every_n_steps
            if self.path(old).name not in kept and not (every and old % every == 0):
                self.path(old).unlink(missing_ok=True)
                _sidecar(self.path(old)).unlink(missing_ok=True)
        for sidecar in self.folder.glob("step-*.ckpt.sha256"):
            if not sidecar.with_suffix("").exists():
                sidecar.unlink(missing_ok=True)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values as a file that `torch.load(weights_only=True)` reads, with its checksum beside it.

    The checksum is that of the bytes in memory, so that it also tells what the way to the disk did to them.

    Raises:
        OSError: if the disk is full or refuses; an older file of that name is whole.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
        write_text(_sidecar(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")


class RunCheckpointIO(TorchCheckpointIO):
    """How Lightning saves the states of a run: into its store.

    A full disk does not end the run: it is warned about, and the next interval tries again.

    Args:
        store: where to.
    """

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__()
        self.store = store
        self.failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one state; `failure` tells afterwards whether the disk refused it."""
        step = int(checkpoint["global_step"])
        try:
            self.store.write(step, checkpoint)
            self.failure = None
        except OSError as error:
            self.failure = f"{os.fspath(path)}: {error.strerror or error}"
            logger.warning("the state of step %d could not be saved (%s); training goes on", step, self.failure)
