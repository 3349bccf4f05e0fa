"""Checkpoints: atomic writes with checksums, the newest undamaged one found again, and as many kept as configured."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from bestrq2.errors import CheckpointError
from bestrq2.files import is_full, whole_file, write_text
from bestrq2.train.settings import earlier_order

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.ckpt")
_BLOCK = 1 << 24


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    Every state is a file `step-00001000.ckpt` with its SHA-256 beside it in the format of `sha256sum`. The checksum is
    written first: a state without one, or with another, was damaged afterwards. `last.ckpt` and `best.ckpt` are links.

    Args:
        folder: folder of the states.
        keep_last: number of newest states to keep.
        keep_every_n_steps: states of multiples of this step are never deleted; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every_n_steps: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps

    def path(self, step: int) -> Path:
        """File of a step."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """Steps of which there is a file, in rising order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.ckpt"))
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> tuple[int, Path | None]:
        """The newest undamaged state: its step and file; (0, None) where no step was ever saved.

        Damaged states are skipped with a warning.

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
        """Description of the damage to a state, as the beginning of a sentence; None if it is as it was written."""
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
        """Let `best.ckpt` point to the state of a step, which is kept until another is better."""
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
            step: the newest one; later ones remain of a run that fell back to an earlier state.
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

    The checksum is that of the bytes in memory, so that it also detects errors on the way to the disk.

    Raises:
        OSError: if the disk is full or refuses; an older file of that name is whole.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
        write_text(_sidecar(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, onto the CPU; nothing in it can run code.

    Raises:
        CheckpointError: missing, or damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no training state")
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a run.

    Raises:
        CheckpointError: missing, damaged, or of a version whose runs cannot be continued.
    """
    state = read_state(path)
    facts = state.get("bestrq2")
    if facts is None or "heard" not in facts or not {"global_step", "state_dict", "optimizer_states"} <= state.keys():
        raise earlier_order(path)
    return state


def optimizer_state(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of an optimiser with its parameters numbered; whole on the first process also where it is in shards."""
    if not _sharded(task):
        return optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named: Any = get_optimizer_state_dict(task, optimizer, options=options)
    if not named:  # the whole state is put together in the first process only
        return {}
    numbers = {name: number for number, name in enumerate(_names(task, optimizer))}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {numbers[name]: value for name, value in named["state"].items()}, "param_groups": groups}


def load_optimizer(task: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that `optimizer_state` gave, cut into shards where the model is."""
    if not _sharded(task):
        optimizer.load_state_dict(state)
        return
    names = _names(task, optimizer)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    named: Any = {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(task, optimizer, named, options=StateDictOptions(full_state_dict=True))


def model_state(task: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers; whole on the first process also where they are in shards."""
    if not _sharded(task):
        return task.state_dict()
    state: Any = get_model_state_dict(task, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state


def _sharded(task: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in task.modules())


def _names(task: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimiser numbers them."""
    names = {parameter: name for name, parameter in task.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
