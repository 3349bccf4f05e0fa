"""How many recordings remote shards hold, kept so that a resumed run need not fetch those it has behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl

from bestrq2.data.remote import StreamSource
from bestrq2.files import write_text

AnySource = TypeVar("AnySource")


def with_known_counts(source: AnySource, path: Path) -> AnySource:
    """A stream with the counts that an earlier part of the run learned; any other source as it is.

    A file that is not there, or damaged, only means that shards are fetched again.
    """
    if not isinstance(source, StreamSource):
        return source
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
        known = {str(url): int(count) for url, count in counts.items() if int(count) >= 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return source
    return replace(source, counts=known)


class ShardCounts(pl.Callback):
    """Writes the counts that come with the batches of a stream.

    Args:
        path: JSON file, from URLs to numbers of recordings; one that exists is added to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add what this batch brought, if anything."""
        if batch.shard_counts and trainer.is_global_zero:
            known = with_known_counts(StreamSource("", ()), self.path).counts
            self.counts = {**known, **self.counts, **batch.shard_counts}
            write_text(self.path, json.dumps(self.counts, indent=1))
