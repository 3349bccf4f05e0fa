"""Audio that a run has heard: its duration over all processes, by top folder, and its share of the batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from bestrq2.data.batch import AudioBatch
from bestrq2.data.sources import Source, common_folder, top_folder
from bestrq2.files import write_text
from bestrq2.text import csv_line
from bestrq2.train.processes import all_reduced, gathered


class Heard:
    """Counts the samples of all clips that training was given, without padding; exact over interruptions.

    Args:
        source: all recordings of the run; below the folder that they have in common are the top folders.
        sampling_rate: rate of the model in Hz.
    """

    def __init__(self, source: Source, sampling_rate: int) -> None:
        # Names in remote shards are not known before these have been fetched.
        self.root = "" if source.is_remote() else common_folder(source.names())
        self.sampling_rate = sampling_rate
        # Of this process; the first one also has what was heard before this start of the run.
        self.samples: Counter[str] = Counter()
        self.before = self.since_start = 0
        self._columns = self._taken = 0

    def add(self, batch: AudioBatch) -> None:
        """Count a batch."""
        for name, samples in zip(batch.recordings, batch.lengths.tolist(), strict=True):
            self.samples[top_folder(name, self.root)] += samples
            self.since_start += samples
        self._columns += batch.packing.segments.numel()
        self._taken += int((batch.packing.segments != 0).sum())

    def seconds(self, device: torch.device) -> float:
        """Seconds over all processes since the start of the run; every process must ask."""
        own = torch.tensor(self.samples.total(), device=device)
        return int(all_reduced({"samples": own})["samples"]) / self.sampling_rate

    def everywhere(self) -> dict[str, int]:
        """Samples of each top folder over all processes; every process must ask."""
        return dict(sum(gathered(self.samples), Counter()))

    def restore(self, samples: dict[str, int], rank: int) -> None:
        """Continue from what `everywhere` gave."""
        self.before = sum(samples.values())
        self.samples = Counter(samples if rank == 0 else {})

    def describe(self, elapsed: float, processes: int) -> str:
        """Hours heard, share of the batches that is audio, and speed, as a run shows its progress.

        Other processes are taken to have heard as much as this one, which costs no exchange.

        Args:
            elapsed: time since this start of the run (s).
            processes: number of processes.
        """
        here = self.since_start * processes
        return (
            f"{(self.before + here) / self.sampling_rate / 3600:.2f} h heard, "
            f"{self._taken / max(1, self._columns):.0%} of the batch audio, "
            f"{here / self.sampling_rate / elapsed:.0f} x real time"
        )

    def write(self, path: Path, samples: dict[str, int]) -> None:
        """Write heard.csv: seconds of each top folder, the longest first; what is outside of all has the name "."."""
        rows = sorted(samples.items(), key=lambda entry: (-entry[1], entry[0]))
        lines = [csv_line([folder or ".", repr(count / self.sampling_rate)]) for folder, count in rows]
        write_text(path, "".join([csv_line(["folder", "seconds"]), *lines]))
