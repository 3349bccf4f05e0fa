"""A run that cannot go on leaves behind what made it fail, to be looked at with `bestrq2 replay`.

`RUN/failures/step-00000123/` holds `state.ckpt` (weights, optimiser, counters, settings), `failure.json` (what
happened, and on what), and for every process a folder `rank-0/` with its batches (`batch-0.safetensors` and so on, one
of each accumulated batch), `sources.csv` (which recording every clip is from) and the clips as 32-bit float wav files.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import soundfile
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bestrq2.data.batch import AudioBatch
from bestrq2.errors import BestRQ2Error, CheckpointError
from bestrq2.files import disk_errors, write_bytes, write_text
from bestrq2.train.callbacks import finished_step
from bestrq2.train.checkpoints import CheckpointStore, write_state
from bestrq2.train.module import PretrainingModule
from bestrq2.train.run_folder import environment

_COLUMNS = ["batch", "place", "recording", "samples", "file"]


class FailureKeeper(pl.Callback):
    """Stops a run when too many steps in a row were skipped, and saves what is needed to see why.

    Args:
        root: the run folder.
        limit: skipped steps in a row that are too many.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        self._batches: list[AudioBatch] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the count of skipped steps.

        Raises:
            BestRQ2Error: there are too many in a row.
        """
        self._batches.append(batch)
        step = finished_step(module, batch)
        if step is None:
            return
        batches, self._batches = self._batches, []
        if not module.guard.too_many(self.limit):
            return
        folder = self.root / "failures" / f"step-{step:08d}"
        with disk_errors(folder):
            save_failure(folder, trainer, module, step, batches)
        raise BestRQ2Error(
            f"{self.root}: loss or gradient was not finite in {int(module.guard.in_a_row)} steps in a row, so training "
            f"stopped after step {step}; it is saved in {folder}, to see what is wrong run: bestrq2 replay {folder}"
        )


def save_failure(
    folder: Path, trainer: pl.Trainer, module: PretrainingModule, step: int, batches: list[AudioBatch]
) -> None:
    """Save a skipped step; every process must call it.

    Args:
        folder: to write; `failure.json` comes last, so that what has one is whole.
        trainer: of the run.
        module: of the run, still as it was before the step.
        step: steps done, with this one.
        batches: of this step in this process.

    Raises:
        OSError: if the disk is full or refuses.
    """
    rank, guard = module.global_rank, module.guard
    _save_batches(folder / f"rank-{rank}", batches, guard.losses, module.config.model.sampling_rate)
    # Put together from all processes where each has a part only.
    state: dict[str, Any] = {
        "global_step": step,
        "state_dict": trainer.strategy.lightning_module_state_dict(),
        "optimizer_states": [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    module.on_save_checkpoint(state)
    if trainer.is_global_zero:
        write_state(folder / "state.ckpt", state)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        facts = {
            "step": step,
            "skipped_in_a_row": int(guard.in_a_row),
            "rank": rank,
            "ranks": trainer.world_size,
            "batches": len(batches),
            "loss": [_to_json(float(loss)) for loss in guard.losses],
            "gradient_norm": _to_json(float(guard.norm)),
            "loss_scale": _loss_scale(trainer),
            "precision": trainer.precision,
            "device": str(module.device),
            "environment": environment(),
        }
        write_text(folder / "failure.json", json.dumps(facts, indent=2) + "\n")


def _loss_scale(trainer: pl.Trainer) -> float:
    """What the loss of the step was multiplied by; a float16 scaler has reduced it once since."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale() / scaler.get_backoff_factor())


def _save_batches(folder: Path, batches: list[AudioBatch], losses: list[Tensor], sampling_rate: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    sources = csv.writer(table, lineterminator="\n")
    sources.writerow(_COLUMNS)
    for number, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
        waveforms = batch.input_values.detach().cpu()
        tensors = {
            "input_values": waveforms,
            "lengths": batch.lengths,
            "places": batch.places,
            "number": torch.tensor(batch.step),
            "loss": loss.float().cpu(),
        }
        if batch.hidden_mask is not None:
            tensors["hidden_mask"] = batch.hidden_mask.cpu()
        write_bytes(folder / f"batch-{number}.safetensors", save(tensors))
        names = batch.recordings or [""] * len(batch)
        for name, place, length, waveform in zip(names, batch.places, batch.lengths, waveforms, strict=True):
            file = f"batch-{number}-place-{int(place):04d}.wav"
            write_bytes(folder / file, _wav(waveform[: int(length)].numpy(), sampling_rate))
            sources.writerow([number, int(place), name, int(length), file])
    write_text(folder / "sources.csv", table.getvalue())


def _wav(waveform: np.ndarray, sampling_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, sampling_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _to_json(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class SavedBatch:
    """One batch of a saved step.

    Attributes:
        batch: as it was trained on, on the CPU.
        loss: it had, nats.
    """

    batch: AudioBatch
    loss: float


@dataclass(frozen=True)
class Failure:
    """A saved step.

    Attributes:
        step: its number, from 1.
        gradient_norm: of all processes together.
        loss_scale: what the loss was multiplied by before the gradients were taken.
        precision: of the run, as Lightning calls it.
        device: where it ran, "cuda:0".
        state: weights and settings, as in a checkpoint.
        ranks: the batches of every process.
    """

    step: int
    gradient_norm: float
    loss_scale: float
    precision: str
    device: str
    state: dict[str, Any]
    ranks: list[list[SavedBatch]]


def load_failure(folder: Path) -> Failure:
    """Read a saved step; nothing in it can run code.

    Raises:
        CheckpointError: missing, or damaged, with the file that is.
    """
    if not (folder / "failure.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no saved step (failure.json is missing); name a folder like RUN/failures/step-00000123"
        )
    file = folder / "failure.json"
    try:
        facts = json.loads(file.read_text())
        numbers = {name: float(facts[name]) for name in ("gradient_norm", "loss_scale")}
        words = {name: str(facts[name]) for name in ("precision", "device")}
        step, ranks, batches = int(facts["step"]), int(facts["ranks"]), int(facts["batches"])
        file = folder / "state.ckpt"
        if damage := CheckpointStore(folder).damage(file):
            raise CheckpointError(damage)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not {"state_dict", "bestrq2"} <= state.keys():
            raise CheckpointError(f"{file}: holds no training state")
        loaded: list[list[SavedBatch]] = []
        for rank in range(ranks):
            file = folder / f"rank-{rank}" / "sources.csv"
            with file.open(newline="") as table:
                sources = list(csv.DictReader(table))
            loaded.append([])
            for number in range(batches):
                file = folder / f"rank-{rank}" / f"batch-{number}.safetensors"
                names = [row["recording"] for row in sources if int(row["batch"]) == number]
                loaded[-1].append(_load_batch(file, names))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({' '.join(str(error).split())[:200]})") from error
    return Failure(step, **numbers, **words, state=state, ranks=loaded)  # type: ignore[arg-type]


def _load_batch(file: Path, recordings: list[str]) -> SavedBatch:
    tensors = load_file(file)
    batch = AudioBatch(
        input_values=tensors["input_values"],
        lengths=tensors["lengths"],
        step=int(tensors["number"]),
        places=tensors["places"],
        hidden_mask=tensors.get("hidden_mask"),
        recordings=recordings,
    )
    if len(recordings) != len(batch):
        raise ValueError(f"{len(batch)} clips, and sources.csv names {len(recordings)}")
    return SavedBatch(batch, float(tensors["loss"]))
