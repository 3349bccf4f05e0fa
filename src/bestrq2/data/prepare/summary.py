"""What a prepared corpus comes to: `summary.json`, and the statistics in it that normalise a model's input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestrq2._version import __version__
from bestrq2.data.band_sums import BandSums
from bestrq2.data.prepare.ledger import Ledger
from bestrq2.data.prepare.options import FRONT_END, Options
from bestrq2.data.sources import Source
from bestrq2.errors import ConfigError
from bestrq2.files import write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.text import counted

SUMMARY = "summary.json"
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


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json` atomically."""
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a prepared corpus.

    Raises:
        ConfigError: there is none, or it was not written by `bestrq2 prepare`.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); {folder} is no finished output of bestrq2 prepare"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged (no JSON); move it away and run bestrq2 prepare again") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("made_from"), dict):
        raise ConfigError(f"{path}: was not written by bestrq2 prepare; name another folder")
    wrong = [name for name, kind in _KINDS.items() if not isinstance(summary.get(name), kind)]
    if not wrong and not _STATISTICS.issubset(summary["log_mel"]):
        wrong = ["log_mel"]
    if wrong:
        raise ConfigError(
            f"{path}: has lost {', '.join(map(repr, wrong))}; move it away and run the command it was made by again"
        )
    return summary


def statistics_entry(sums: BandSums, options: Options) -> dict[str, Any]:
    """Mean and deviation per mel band with the front end they belong to, ready for JSON."""
    mean, deviation = sums.statistics()
    config = options.front_end()
    front_end = {name: getattr(config, name) for name in FRONT_END}
    return {"front_end": front_end, "mean_db": mean.tolist(), "standard_deviation_db": deviation.tolist()}


def prepared_statistics(source: Source | str | Path, config: BestRQ2Config) -> tuple[Tensor, Tensor] | None:
    """Statistics of the log-mel spectrogram over all clips of a prepared corpus, as `bestrq2 prepare` found them.

    Args:
        source: the folder of the corpus, or a source that is named by it.
        config: of the model whose input they are to normalise.

    Returns:
        mean and deviation in dB, float32 [bands] each (the deviation at least 1 dB); None where the source is no
        finished prepared corpus, or where its spectrogram is another one than the model's.
    """
    folder = Path(source.name if isinstance(source, Source) else source).expanduser()
    try:
        statistics = read_summary(folder).get("log_mel", {})
        front_end = statistics["front_end"]
        mean, deviation = statistics["mean_db"], statistics["standard_deviation_db"]
    except (ConfigError, OSError, KeyError, TypeError):
        return None
    if front_end != {name: getattr(config, name) for name in FRONT_END}:
        return None
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)


def summary_of(totals: Ledger, source: Source, options: Options, shards: int, size: int) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        totals: ledger over the whole source.
        source: what was prepared.
        options: how.
        shards: number of tars.
        size: their bytes.
    """
    hour = 3600 * options.sampling_rate
    return {
        "bestrq2": __version__,
        "recordings": len(source),
        "clips": totals.clips,
        "dropped": totals.dropped,
        "clipped": totals.clipped,
        "hours_in": totals.samples_in / hour,
        "hours_kept": totals.samples_kept / hour,
        "shards": shards,
        "bytes": size,
        "format": options.format,
        "sampling_rate": options.sampling_rate,
        "made_from": totals.identity,
        "log_mel": statistics_entry(totals.sums, options),
    }


def in_words(summary: dict[str, Any]) -> str:
    """One sentence on a prepared corpus."""
    dropped = ", ".join(f"{count} {kind}" for kind, count in summary["dropped"].items() if count)
    clipped = f", {summary['clipped']} with samples beyond full scale" if summary["clipped"] else ""
    return (
        f"{counted(summary['clips'], 'clip')}{clipped}, {summary['hours_kept']:.2f} of {summary['hours_in']:.2f} hours "
        f"from {counted(summary['recordings'], 'recording')}, in {counted(summary['shards'], 'shard')} of "
        f"{summary['bytes'] / 1e6:,.0f} MB; "
        f"dropped: {dropped or 'nothing'}"
    )
