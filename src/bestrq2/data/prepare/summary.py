"""Summary of a prepared corpus: `summary.json`, with the statistics that normalise a model's input.

Mean and standard deviation per mel band come from sums that can be merged, so that shards count for themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestrq2.data.sources import Source
from bestrq2.errors import ConfigError
from bestrq2.files import regular_file, write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.text import counted

SUMMARY = "summary.json"

FRONT_END = (
    *("sampling_rate", "n_fft", "win_length", "hop_length", "num_mel_bands", "mel_min_hz", "mel_max_hz"),
    *("short_win_length", "short_mel_bands"),
)
"""Fields of `BestRQ2Config` that define the log-mel spectrogram."""

_KINDS: dict[str, type | tuple[type, ...]] = {
    "recordings": int,
    "clips": int,
    "dropped": dict,
    "clipped": int,
    "hours_in": (int, float),
    "hours_kept": (int, float),
    "shards": int,
    "bytes": int,
    "format": str,
    "sampling_rate": int,
    "log_mel": dict,
}
_STATISTICS = {"front_end", "mean_db", "standard_deviation_db"}
# In dB: normalisation would otherwise turn a band that never changes into noise.
_SMALLEST_DEVIATION = 1.0


class BandSums:
    """Number of frames, sums and sums of squares per mel band over any number of log-mel spectrograms.

    Args:
        bands: number of mel bands.

    Attributes:
        count: float64 [], number of frames.
        total: float64 [bands], sum over frames, dB.
        squares: float64 [bands], sum of squares over frames, dB².
    """

    def __init__(self, bands: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(bands, dtype=torch.float64)
        self.squares = torch.zeros(bands, dtype=torch.float64)

    @torch.no_grad()
    def add(self, log_mel: Tensor, frames: Tensor) -> None:
        """Add the valid frames of some clips.

        Args:
            log_mel: float [B, bands, T], dB.
            frames: int [B], number of valid frames of each clip.
        """
        inside = torch.arange(log_mel.shape[-1]) < frames[:, None]
        self.add_frames(log_mel.transpose(1, 2)[inside])

    @torch.no_grad()
    def add_frames(self, values: Tensor) -> None:
        """Add frames, float [frames, bands] in dB."""
        values = values.double()
        self.count += len(values)
        self.total += values.sum(dim=0)
        self.squares += values.square().sum(dim=0)

    def merge(self, other: BandSums) -> None:
        """Add the sums of another one."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in dB, float32 [bands] each; the deviation is at least 1 dB."""
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp_min(0.0).sqrt()
        return mean.float(), deviation.clamp_min(_SMALLEST_DEVIATION).float()

    def to_bytes(self) -> bytes:
        """The sums as little-endian float64: count, totals, squares."""
        return torch.cat([self.count[None], self.total, self.squares]).numpy().astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> BandSums:
        """The sums written by `to_bytes`."""
        values = torch.frombuffer(bytearray(content), dtype=torch.float64)
        sums = cls(len(values) // 2)
        sums.count, (sums.total, sums.squares) = values[0], values[1:].split(len(values) // 2)
        return sums


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json` atomically."""
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """Summary in the folder of a prepared corpus.

    Raises:
        ConfigError: it does not exist, is damaged, or was not written by `bestrq2 prepare`.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); {folder} is not a finished output of bestrq2 prepare"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged (not JSON); move it away and run bestrq2 prepare again") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("made_from"), dict):
        raise ConfigError(f"{path}: was not written by bestrq2 prepare; name another folder")
    wrong = [name for name, kind in _KINDS.items() if not isinstance(summary.get(name), kind)]
    if not wrong and not _STATISTICS.issubset(summary["log_mel"]):
        wrong = ["log_mel"]
    if wrong:
        raise ConfigError(
            f"{path}: lacks {', '.join(map(repr, wrong))}; move it away and repeat the command that made it"
        )
    return summary


def statistics_entry(sums: BandSums, config: BestRQ2Config) -> dict[str, Any]:
    """Mean and standard deviation per mel band with their front end, ready for JSON."""
    mean, deviation = sums.statistics()
    front_end = {name: getattr(config, name) for name in FRONT_END}
    return {"front_end": front_end, "mean_db": mean.tolist(), "standard_deviation_db": deviation.tolist()}


def prepared_statistics(source: Source | str | Path, config: BestRQ2Config) -> tuple[Tensor, Tensor] | None:
    """Statistics of the log-mel spectrogram over all clips of a prepared corpus, read from its summary.

    Args:
        source: folder of the corpus, or a source with that name.
        config: configuration of the model whose input they normalise.

    Returns:
        Mean and standard deviation in dB, float32 [bands] each (the deviation at least 1 dB); None if the source is not
        a finished prepared corpus, or its spectrogram differs from the model's.
    """
    folder = Path(source.name if isinstance(source, Source) else source).expanduser()
    try:
        statistics = read_summary(folder).get("log_mel", {})
        front_end = statistics["front_end"]
        mean, deviation = statistics["mean_db"], statistics["standard_deviation_db"]
    except (ConfigError, OSError, KeyError, TypeError):
        return None
    one_window = {"short_win_length": 0, "short_mel_bands": 0}  # corpora of earlier versions had no other
    if one_window | front_end != {name: getattr(config, name) for name in FRONT_END}:
        return None
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)


def describe_summary(summary: dict[str, Any]) -> str:
    """Summary of a prepared corpus in one sentence."""
    dropped = ", ".join(f"{count} {kind}" for kind, count in summary["dropped"].items() if count)
    clipped = f", {summary['clipped']} with samples beyond full scale" if summary["clipped"] else ""
    shorter = summary.get("shorter_than_announced", 0)
    return (
        f"{counted(summary['clips'], 'clip')}{clipped}, {summary['hours_kept']:.2f} of {summary['hours_in']:.2f} hours "
        f"from {counted(summary['recordings'], 'recording')}, in {counted(summary['shards'], 'shard')} of "
        f"{summary['bytes'] / 1e6:,.0f} MB; "
        f"dropped: {dropped or 'nothing'}"
        + (f"; shorter than announced: {shorter}, listed in shorter.csv" if shorter else "")
    )
